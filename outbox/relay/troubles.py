"""What fails again and again: how long for, and how long to pause because of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from outbox.backoff import Backoff

REST: Final = Backoff(first=0.2, factor=2.0, most=5.0)  # seconds, after the fate of messages could not be stored
OVER: Final = 30.0  # seconds without a failure: the next one is a new trouble
NEWS: Final = 60.0  # seconds after which what still fails in the same way is said again


@dataclass(slots=True)
class _Trouble:
    since: float  # monotonic seconds
    last: float
    failures: int  # in a row
    error: BaseException
    said: str | None = None  # the text of an error that was logged, and when
    said_at: float = 0.0


class Troubles:
    """Of one relay, by what was done."""

    def __init__(self) -> None:
        self._known: dict[str, _Trouble] = {}
        self._resting_until = 0.0  # monotonic seconds

    def fails(self, what: str, error: BaseException) -> int:
        """Note that this failed; returns how often in a row."""
        now = time.monotonic()
        known = self._known.get(what)
        if known is None or now - known.last > OVER:
            known = self._known[what] = _Trouble(now, now, 0, error)
        known.last, known.error = now, error
        known.failures += 1
        return known.failures

    def is_news(self, what: str) -> bool:
        """Whether to log how this failed last: a text that was not the last one logged, or once in `NEWS` the same. Else an
        outage of an hour would be thousands of lines, and hide the others."""
        known, now = self._known[what], time.monotonic()
        text = str(known.error)
        if text == known.said and now - known.said_at < NEWS:
            return False
        known.said, known.said_at = text, now
        return True

    def works(self, what: str) -> None:
        """The opposite of `fails`."""
        if self._known:
            self._known.pop(what, None)

    def lasting(self, seconds: float) -> BaseException | None:
        """The error of what has failed for so long, and failed again not longer ago than that."""
        now = time.monotonic()
        lasting = (t for t in self._known.values() if now - t.since > seconds > now - t.last and t.failures > 1)
        return next((trouble.error for trouble in lasting), None)

    def rest(self, after: str, error: BaseException) -> None:
        """The fate of messages could not be stored: pause, longer each time, instead of sending them again and again."""
        self._resting_until = time.monotonic() + REST.delay(self.fails(after, error))

    def resting(self) -> float:
        """Seconds for which nothing should be sent."""
        return max(0.0, self._resting_until - time.monotonic())
