"""Ranges hold what was named and nothing else: what they hold is deleted."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from outbox.stores import runs as runs_module
from outbox.stores.runs import Settled, runs


@given(st.lists(st.integers(-30, 30) | st.integers(-(2**63), 2**63 - 1), max_size=60))
def test_runs_hold_each_position_once_and_no_other(positions: list[int]) -> None:
    found = list(runs(positions))
    held = [position for first, last in found for position in range(first, last + 1)]
    assert held == sorted(set(positions))


@given(st.sets(st.integers(0, 40), max_size=40))
def test_runs_are_as_few_as_can_be(positions: set[int]) -> None:
    assert len(list(runs(positions))) == sum(position - 1 not in positions for position in positions)


@given(st.lists(st.sets(st.integers(0, 60) | st.integers(0, 600), min_size=1, max_size=30), max_size=12))
def test_what_is_settled_was_added_and_the_rest_is_read(batches: list[set[int]]) -> None:
    settled, added = Settled(), set[int]()
    with patch.object(runs_module, "GAPS", 10):
        for batch in batches:
            settled.add(batch)
            added |= batch
            held = {position for position in range(601) if position in settled}
            assert held <= added
            assert max(added) in held
            assert (settled.below, settled.above) == (min(held), max(held))
            assert settled.gaps == [p for p in range(settled.below, settled.above) if p not in held]
            assert len(settled.gaps) <= 10


def test_nothing_is_forgotten_while_there_are_few_gaps() -> None:
    settled = Settled()
    for first in range(0, 100_000, 1000):
        settled.add(range(first, first + 999))  # each thousandth is missing
    assert settled.below == 0
    assert settled.gaps == list(range(999, 99_000, 1000))
