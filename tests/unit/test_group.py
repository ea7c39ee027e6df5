"""Consumer groups without a broker: who reads what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.transports._group import Group, Member, Owned, Replaced, even_shares

TOPICS = {"orders": 4}


def member(life: str = "life", session: float = 10.0) -> Member:
    return Member(life, frozenset(TOPICS), session)


def joined(group: Group, name: str, now: float, session: float = 10.0) -> Member:
    found = member(name, session)
    group.join(name, found, now)
    return found


def test_a_single_member_owns_all() -> None:
    group = Group()
    owned, give_up = group.beat("a", joined(group, "a", 0), 0, TOPICS)
    assert owned == {("orders", partition): Owned(1, 0) for partition in range(4)}
    assert give_up == frozenset()


def test_a_second_member_gets_its_share_when_the_first_has_let_go() -> None:
    group = Group()
    a, b = joined(group, "a", 0), joined(group, "b", 0)
    group.members.pop("b")
    group.beat("a", a, 0, TOPICS)
    group.join("b", b, 0)
    assert group.beat("b", b, 0, TOPICS)[0] == {}
    owned, give_up = group.beat("a", a, 0, TOPICS)
    assert (len(owned), len(give_up)) == (4, 2)
    done = {place: Owned(state.epoch, 5) for place, state in owned.items()}
    assert group.commit("a", "a", done, give_up) == frozenset()
    taken, _ = group.beat("b", b, 0, TOPICS)
    assert taken.keys() == give_up
    assert {state.position for state in taken.values()} == {5}


def test_a_dead_member_loses_its_partitions_and_its_commits_are_refused() -> None:
    group = Group()
    a, b = joined(group, "a", 0), joined(group, "b", 0)
    owned, _ = group.beat("a", a, 0, TOPICS)
    group.beat("b", b, 0, TOPICS)
    group.beat("b", b, 9, TOPICS)
    taken, _ = group.beat("b", b, 11, TOPICS)
    assert len(taken) == 4
    done = {place: Owned(state.epoch, 9) for place, state in owned.items()}
    assert group.commit("a", "a", done) == owned.keys()
    assert all(share.position == 0 for share in group.shares.values())


def test_a_member_that_lost_a_partition_and_has_it_again_is_told_by_the_epoch() -> None:
    group = Group()
    a = joined(group, "a", 0)
    before, _ = group.beat("a", a, 0, TOPICS)
    b = joined(group, "b", 20)
    group.beat("b", b, 20, TOPICS)
    group.leave("b", "b")
    after, _ = group.beat("a", a, 21, TOPICS)
    assert before.keys() == after.keys()
    assert all(after[place].epoch > before[place].epoch for place in before)
    assert group.commit("a", "a", before) == before.keys()


def test_a_static_member_that_joins_again_has_its_partitions_at_once() -> None:
    group = Group()
    first = member("first")
    group.join("pod-0", first, 0)
    joined(group, "other", 0)
    mine, _ = group.beat("pod-0", first, 0, TOPICS)
    second = member("second")
    group.join("pod-0", second, 1)
    again, give_up = group.beat("pod-0", second, 1, TOPICS)
    assert again.keys() == mine.keys()
    assert give_up == frozenset()
    # and its former life is over
    assert group.commit("pod-0", "first", mine) == mine.keys()
    with pytest.raises(Replaced):
        group.beat("pod-0", first, 1, TOPICS)


def test_a_clock_that_was_set_back_keeps_no_dead_member_alive() -> None:
    group = Group()
    joined(group, "dead", 1_000_000)
    b = joined(group, "b", 50)
    assert len(group.beat("b", b, 50, TOPICS)[0]) == 4


def test_a_beat_writes_only_now_and_then() -> None:
    group = Group()
    a = joined(group, "a", 0)
    group.beat("a", a, 0, TOPICS)
    group.beat("a", a, 1, TOPICS)
    assert group.members["a"].expires == 10
    group.beat("a", a, 4, TOPICS)
    assert group.members["a"].expires == 14


names = st.sampled_from(["a", "b", "c", "d", "e"])
places = st.tuples(st.sampled_from(["x", "y"]), st.integers(0, 8))


@given(
    members=st.dictionaries(names, st.sets(st.sampled_from(["x", "y"]), min_size=1).map(frozenset), min_size=1),
    owners=st.dictionaries(places, st.none() | names),
)
def test_shares_are_even_and_change_little(
    members: dict[str, frozenset[str]], owners: dict[tuple[str, int], str | None]
) -> None:
    wanted = even_shares(members, owners)
    readers = {place: [name for name in members if place[0] in members[name]] for place in owners}
    assert wanted.keys() == {place for place, found in readers.items() if found}
    assert all(wanted[place] in readers[place] for place in wanted)
    counts = {name: sum(owner == name for owner in wanted.values()) for name in members}
    for place, owner in wanted.items():
        assert all(counts[owner] <= counts[other] + 1 for other in readers[place])
    assert even_shares(members, dict(wanted)) == wanted
