"""The tracker of what may be committed, against a model that is too simple to be wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.transports._offsets import Offsets, Progress


def test_nothing_is_committed_before_something_is_done() -> None:
    offsets = Offsets(7)
    for offset in (7, 8, 9):
        offsets.hand_out(offset)
    assert offsets.progress == Progress(7, 0)
    assert not offsets.dirty
    assert offsets.uncommitted == offsets.unacked == 3


def test_a_message_that_is_not_done_holds_back_all_behind_it() -> None:
    offsets = Offsets(0)
    for offset in range(5):
        offsets.hand_out(offset)
    offsets.ack([4, 2, 1])
    assert offsets.progress.position == 0
    offsets.ack([0])
    assert offsets.progress == Progress(3, 3)
    offsets.ack([3])
    assert offsets.progress == Progress(5, 5)
    assert offsets.unacked == 0


def test_holes_in_the_log_hold_back_nothing() -> None:
    offsets = Offsets(0)
    for offset in (0, 10, 11, 500):
        offsets.hand_out(offset)
    offsets.ack([0, 10])
    assert offsets.progress == Progress(11, 2)
    offsets.ack([11, 500])
    assert offsets.progress == Progress(501, 4)


def test_what_was_never_handed_out_or_is_done_already_changes_nothing() -> None:
    offsets = Offsets(0)
    offsets.hand_out(0)
    offsets.hand_out(5)
    offsets.ack([3, 99, -1, 0, 0])
    assert offsets.progress.position == 5
    assert offsets.unacked == 1


def test_a_partition_is_read_forwards() -> None:
    offsets = Offsets(3)
    with pytest.raises(ValueError, match="forwards"):
        offsets.hand_out(2)
    offsets.hand_out(3)
    with pytest.raises(ValueError, match="forwards"):
        offsets.hand_out(3)


def test_done_rows_count_as_uncommitted_until_the_commit_is_known() -> None:
    offsets = Offsets(0)
    for offset in range(4):
        offsets.hand_out(offset)
    offsets.ack(range(4))
    assert (offsets.unacked, offsets.uncommitted, offsets.dirty) == (0, 4, True)
    offsets.committed = offsets.progress
    assert (offsets.uncommitted, offsets.dirty) == (0, False)


@given(data=st.data())
def test_it_agrees_with_a_naive_model(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 50))
    offsets = Offsets(start)
    handed_out: list[int] = []
    done: set[int] = set()
    committed = 0
    for _ in range(data.draw(st.integers(0, 40))):
        match data.draw(st.sampled_from(["hand out", "ack", "ack anything", "commit"])):
            case "hand out":
                offset = (handed_out[-1] + 1 if handed_out else start) + data.draw(st.sampled_from([0, 0, 0, 1, 7]))
                assert offsets.hand_out(offset) == len(handed_out)
                handed_out.append(offset)
            case "ack" if handed_out:
                some = data.draw(st.lists(st.sampled_from(handed_out)))
                offsets.ack(some)
                done |= set(some)
            case "ack anything":
                some = data.draw(st.lists(st.integers(-5, 400)))
                offsets.ack(some)
                done |= set(some) & set(handed_out)
            case "commit":
                offsets.committed = offsets.progress
                committed = offsets.committed.rows
        waiting = [offset for offset in handed_out if offset not in done]
        rows = handed_out.index(waiting[0]) if waiting else len(handed_out)
        position = waiting[0] if waiting else (handed_out[-1] + 1 if handed_out else start)
        assert offsets.progress == Progress(position, rows)
        assert offsets.unacked == len(waiting)
        assert offsets.uncommitted == len(handed_out) - committed
        # what must hold whatever the model says: nothing that is not done lies below what is committed
        assert all(offset >= offsets.progress.position for offset in waiting)
