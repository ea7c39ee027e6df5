"""What has been handed out of one partition, what of it is done, and how far that may be committed."""

from __future__ import annotations

from collections.abc import Iterable


class Offsets:
    """One partition in one assignment. Acknowledgements come in any order; `position` moves over a gapless run of them
    only, so that a crash redelivers some messages that were done and never skips one that was not.

    Offsets increase, with holes where a log was compacted or holds transaction markers.
    """

    __slots__ = ("_end", "_handed_out", "_unacked", "committed")

    def __init__(self, start: int) -> None:
        """``start``: the offset at which reading begins, everything below it is committed."""
        self._end = start
        # offset -> how many were handed out before it. In order of the offsets, because they are put in increasing.
        self._unacked: dict[int, int] = {}
        self._handed_out = 0
        self.committed = start
        """What the broker is known to have stored: the reader's business, see `dirty`."""

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
    def position(self) -> int:
        """The offset up to which, itself excluded, all is done: what may be committed."""
        return next(iter(self._unacked), self._end)

    @property
    def end(self) -> int:
        """The offset after the last that was handed out."""
        return self._end

    @property
    def unacked(self) -> int:
        """Rows handed out and not done."""
        return len(self._unacked)

    @property
    def span(self) -> int:
        """Rows handed out from the first that is not done on, done ones among them: what a crash would redeliver
        at the most, once `position` is committed."""
        first = next(iter(self._unacked.values()), None)
        return 0 if first is None else self._handed_out - first

    @property
    def dirty(self) -> bool:
        return self.position != self.committed
