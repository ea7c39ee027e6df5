"""Positions that follow each other, as ranges of the primary key, and what a relay knows by them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Final

Run = tuple[int, int]
"""Lowest and highest position, both in it."""

GAPS: Final = 100  # positions that are looked up one by one


def runs(positions: Collection[int]) -> Iterator[Run]:
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


class Settled:
    """Positions whose rows this relay has removed. The database gives no position twice, so nothing can come there any more,
    whichever transactions are still open. Of all others nothing is known: those `below`, the `gaps` and those `above`
    are to be read. Where there are too many gaps (rolled-back transactions, rows of other relays), what was removed before
    them is forgotten; that costs a walk over it, and no message.
    """

    def __init__(self) -> None:
        self._runs: list[Run] = []

    def __bool__(self) -> bool:
        return bool(self._runs)

    def __contains__(self, position: int) -> bool:
        return any(first <= position <= last for first, last in self._runs)

    @property
    def below(self) -> int:
        """The lowest."""
        return self._runs[0][0]

    @property
    def above(self) -> int:
        """The highest."""
        return self._runs[-1][1]

    @property
    def gaps(self) -> list[int]:
        """What lies between, at most `GAPS` positions."""
        return [p for (_, last), (first, _) in pairwise(self._runs) for p in range(last + 1, first)]

    def add(self, positions: Collection[int]) -> None:
        joined: list[Run] = []
        gaps = 0
        for first, last in sorted([*self._runs, *runs(positions)], reverse=True):
            if joined and last >= joined[-1][0] - 1:
                joined[-1] = min(first, joined[-1][0]), joined[-1][1]
                continue
            if joined and (gaps := gaps + joined[-1][0] - last - 1) > GAPS:
                break
            joined.append((first, last))
        self._runs = joined[::-1]
