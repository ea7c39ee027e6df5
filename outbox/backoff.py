"""How long to wait before the next attempt."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential delays in seconds with full jitter above half: ``first``, ``first * factor``, … up to ``most``.

    Half of each delay is kept, so that a retry is never immediate; the other half is random, so that many failures of
    one moment do not come back at one moment.
    """

    first: float = 0.5
    factor: float = 2.0
    most: float = 60.0

    def delay(self, attempt: int, *, jitter: float | None = None) -> float:
        """Seconds to wait after attempt number ``attempt`` (1 is the first one that failed).

        ``jitter`` in [0, 1] replaces the random part, for tests.
        """
        # beyond 2**64 the float would overflow long after `most` has been reached
        full = min(self.most, self.first * self.factor ** min(attempt - 1, 64))
        return full * (0.5 + 0.5 * (random.random() if jitter is None else jitter))
