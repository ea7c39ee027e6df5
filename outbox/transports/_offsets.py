"""What has been handed out of one partition, what of it is done, and how far that may be committed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Progress(NamedTuple):
    """How far a partition is done without a gap."""

    position: int
    """The offset below which all is done: what a broker stores."""
    rows: int
    """How many rows that is since the assignment; offsets have holes, so it cannot be told from them."""


class Offsets:
    """One partition in one assignment. Acknowledgements come in any order; `progress` moves over a gapless run of them
    only, so that a crash redelivers some messages that were done and never skips one that was not.

    Offsets increase, with holes where a log was compacted or holds transaction markers.
    """

    __slots__ = ("_end", "_handed_out", "_unacked", "committed")

    def __init__(self, start: int) -> None:
        """``start``: the offset at which reading begins; all below it is committed."""
        self._end = start
        # offset -> how many were handed out before it; in the order of the offsets, because that is how they are put in.
        self._unacked: dict[int, int] = {}
        self._handed_out = 0
        self.committed = Progress(start, 0)
        """What the broker is known to have stored; set by whoever commits, to what `progress` was when it did."""

    def hand_out(self, offset: int) -> int:
        """This offset is given to the consumer. Returns how many were before it in this assignment."""
        if offset < self._end:
            raise ValueError(f"offset {offset} after {self._end - 1}: a partition is read forwards")
        before = self._unacked[offset] = self._handed_out
        self._handed_out = before + 1
        self._end = offset + 1
        return before

    def ack(self, offsets: Iterable[int]) -> None:
        """These are done. Those that were done before, or were never handed out, change nothing."""
        pop = self._unacked.pop
        for offset in offsets:
            pop(offset, None)

    @property
    def progress(self) -> Progress:
        """How far all is done. To commit: keep it, commit its position, then set `committed` to it."""
        for offset, before in self._unacked.items():
            return Progress(offset, before)
        return Progress(self._end, self._handed_out)

    @property
    def dirty(self) -> bool:
        """Whether there is something to commit."""
        return self.progress.position != self.committed.position

    @property
    def end(self) -> int:
        """The offset after the last that was handed out."""
        return self._end

    @property
    def unacked(self) -> int:
        """Rows that are handed out and not done."""
        return len(self._unacked)

    @property
    def uncommitted(self) -> int:
        """Rows that are handed out and not known to be committed, done or not: what a crash would redeliver."""
        return self._handed_out - self.committed.rows
