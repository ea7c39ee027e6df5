"""How often a failing message is tried, and when."""

from __future__ import annotations

from dataclasses import dataclass, field

from outbox.backoff import Backoff
from outbox.errors import ConfigurationError, Retry


@dataclass(frozen=True, slots=True)
class Retries:
    """``attempts`` in all, the first included; then the message is a dead letter. ``backoff`` is the wait between them
    (seconds). Raises `ConfigurationError` for less than one attempt."""

    attempts: int = 5
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        if not isinstance(self.attempts, int) or isinstance(self.attempts, bool) or self.attempts < 1:
            raise ConfigurationError(f"retries: attempts={self.attempts!r}; it must be a number from 1 on")

    def delay(self, attempt: int, error: BaseException | None = None) -> float:
        """Seconds to wait after attempt number ``attempt`` failed with ``error``: what `Retry` says, else the back-off."""
        if isinstance(error, Retry) and error.after is not None:
            return max(0.0, error.after)
        return self.backoff.delay(attempt)


def retries_from(value: Retries | int | None) -> Retries:
    """What a user wrote as ``retries=``."""
    if value is None:
        return Retries()
    return value if isinstance(value, Retries) else Retries(attempts=value)
