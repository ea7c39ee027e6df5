"""What is unavailable, since when, and when to try again. No attempt of any message is spent meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from outbox.backoff import Backoff

EVERYTHING = "*"


@dataclass(slots=True)
class _Open:
    reason: str
    since: float  # wall clock, seconds, for people
    until: float  # monotonic
    failures: int = 1


@dataclass
class Circuits:
    """Open circuits: of the whole transport (`EVERYTHING`), or of single topics."""

    name: str = "the broker"
    """Of the transport, for people."""
    backoff: Backoff = field(default_factory=lambda: Backoff(first=0.2, factor=2.0, most=5.0))
    clock: Callable[[], float] = time.monotonic
    _open: dict[str, _Open] = field(default_factory=dict)

    def failed(self, scope: str, reason: str) -> bool:
        """One more failure; returns whether the circuit was closed until now."""
        known = self._open.get(scope)
        if known is None:
            self._open[scope] = _Open(reason, time.time(), self.clock() + self.backoff.delay(1))
            return True
        if self.clock() >= known.until:  # else an answer to what was sent before it opened
            known.failures += 1
            known.until = self.clock() + self.backoff.delay(known.failures)
        known.reason = reason
        return False

    def succeeded(self, scope: str) -> bool:
        """Something was sent; returns whether the circuit had been open."""
        return self._open.pop(scope, None) is not None

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, scope: str) -> bool:
        return scope in self._open

    def wait(self, scope: str = EVERYTHING) -> float:
        """Seconds until this may be tried again; 0 if now."""
        known = self._open.get(scope)
        return 0.0 if known is None else max(0.0, known.until - self.clock())

    def topics_left_out(self) -> list[str]:
        """The topics that are not to be tried yet."""
        return [scope for scope in self._open if scope != EVERYTHING and self.wait(scope) > 0]

    def what(self, scope: str) -> str:
        """The scope, for people."""
        return self.name if scope == EVERYTHING else f"topic {scope!r}"

    def state(self) -> dict[str, Any]:
        """For `outbox status`: scope to reason and since when (epoch seconds)."""
        return {scope: {"reason": o.reason, "since": o.since} for scope, o in self._open.items()}
