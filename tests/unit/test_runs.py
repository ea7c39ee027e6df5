"""Ranges hold what was named and nothing else: what they hold is deleted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outbox.stores.runs import runs


@given(st.lists(st.integers(-30, 30) | st.integers(-(2**63), 2**63 - 1), max_size=60))
def test_runs_hold_each_position_once_and_no_other(positions: list[int]) -> None:
    found = list(runs(positions))
    held = [position for first, last in found for position in range(first, last + 1)]
    assert held == sorted(set(positions))


@given(st.sets(st.integers(0, 40), max_size=40))
def test_runs_are_as_few_as_can_be(positions: set[int]) -> None:
    assert len(list(runs(positions))) == sum(position - 1 not in positions for position in positions)
