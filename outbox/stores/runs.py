"""Positions that follow each other, as ranges of the primary key."""

from __future__ import annotations

from collections.abc import Collection, Iterator


def runs(positions: Collection[int]) -> Iterator[tuple[int, int]]:
    """The runs of whole numbers of which **each** is among ``positions``: of 9, 4, 6, 5 they are 4 to 6 and 9 to 9. Between
    the ends of a run there is no other position, so also none that is committed later."""
    ordered = sorted(set(positions))
    if not ordered:
        return
    first = last = ordered[0]
    if ordered[-1] - first == len(ordered) - 1:  # as nearly always
        yield first, ordered[-1]
        return
    for position in ordered:
        if position > last + 1:
            yield first, last
            first = position
        last = position
    yield first, last
