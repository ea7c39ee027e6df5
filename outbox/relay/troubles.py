"""What fails again and again: how long for, and how long to pause because of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from outbox.backoff import Backoff

REST: Final = Backoff(first=0.2, factor=2.0, most=5.0)  # seconds, after the fate of messages could not be stored


@dataclass(slots=True)
class _Trouble:
    since: float  # monotonic seconds
    failures: int  # in a row
    error: BaseException


class Troubles:
    """Of one relay, by what was done."""

    def __init__(self) -> None:
        self._known: dict[str, _Trouble] = {}
        self._resting_until = 0.0  # monotonic seconds

    def fails(self, what: str, error: BaseException) -> int:
        """Note that this failed; returns how often in a row."""
        known = self._known.setdefault(what, _Trouble(time.monotonic(), 0, error))
        known.failures += 1
        known.error = error
        return known.failures

    def works(self, what: str) -> None:
        """The opposite of `fails`."""
        if self._known:
            self._known.pop(what, None)

    def lasting(self, seconds: float) -> BaseException | None:
        """The error of what has not worked for so long."""
        now = time.monotonic()
        return next((trouble.error for trouble in self._known.values() if now - trouble.since > seconds), None)

    def rest(self, after: str, error: BaseException) -> None:
        """The fate of messages could not be stored: pause, longer each time, instead of sending them again and again."""
        self._resting_until = time.monotonic() + REST.delay(self.fails(after, error))

    def resting(self) -> float:
        """Seconds for which nothing should be sent."""
        return max(0.0, self._resting_until - time.monotonic())
