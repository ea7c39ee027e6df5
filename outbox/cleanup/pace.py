"""How much at once, and how long to wait after it: by what the last batch took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

AIM: Final = 0.05  # seconds that a batch should take
SHARE: Final = 0.1  # of the time is spent in batches, the rest in pauses
LEAST: Final = 10  # rows
LONGEST: Final = 60.0  # seconds of one pause


@dataclass
class Pace:
    """``most``: rows of a batch, while the database is quick. Batches become smaller where it is slow, and the pauses longer
    with what each took: whoever has work for it goes first."""

    most: int
    share: float = SHARE
    rows: int = 0

    def __post_init__(self) -> None:
        self.rows = min(self.most, 200)

    def after(self, seconds: float, *, full: bool) -> float:
        """Seconds to wait after a batch that took so long. ``full``: it found as much as it asked for."""
        if seconds > 2 * AIM:
            self.rows = max(min(LEAST, self.most), int(self.rows * AIM / seconds))
        elif seconds < AIM / 2 and full:
            self.rows = min(self.most, 2 * self.rows)
        return min(LONGEST, seconds * (1 / self.share - 1))
