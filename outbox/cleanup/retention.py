"""How long what is over is kept."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Final, Self

from outbox.errors import ConfigurationError
from outbox.observe.words import duration, seconds
from outbox.stores.engine import from_environment

HOUR: Final = 3600.0
DAY: Final = 24 * HOUR

FOREVER: Final = math.inf
LEAST_INBOX: Final = HOUR  # what no broker's redelivery and no retry of ours is known to exceed while all is well


@dataclass(frozen=True, slots=True)
class Retention:
    """Seconds for which rows are kept once nothing waits for them; ``math.inf`` keeps them for ever.

    Raises `ConfigurationError` for what is no time, and for an ``inbox`` below an hour: a redelivery would find it empty.
    """

    inbox: float = 30 * DAY
    """Since a consumer handled, or gave up, the message. **A duplicate that comes later has its effect again**: longer
    than the broker keeps messages (Kafka 7 days unless told otherwise, SQS 14 at most) and than a topic is ever rewound."""
    dead_letter: float = 30 * DAY
    """Since a dead letter was replayed or discarded. Open ones are never removed."""
    audit: float = 365 * DAY
    """Since the line was written: who replayed or discarded what."""
    sent: float = DAY
    """Since a message was sent, where that is kept."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigurationError(f"retention: {field.name}={value!r}; it is a number of seconds above 0")
        if self.inbox < LEAST_INBOX:
            raise ConfigurationError(
                f"retention: inbox={self.inbox:g} seconds; at least {LEAST_INBOX:g}, or a message that comes again would "
                "have its effect again"
            )

    @classmethod
    def from_environment(cls, **given: float | None) -> Self:
        """What is given, then ``OUTBOX_RETENTION_INBOX``, ``…_DEAD_LETTER``, ``…_AUDIT`` and ``…_SENT`` (``90s``, ``12h``,
        ``30d``, ``forever``), then the defaults."""
        found: dict[str, float] = {}
        for field in dataclasses.fields(cls):
            value = given.get(field.name)
            name = f"OUTBOX_RETENTION_{field.name.upper()}"
            if value is None and (text := from_environment(name)) is not None:
                try:
                    value = age(text)
                except ConfigurationError as error:
                    raise ConfigurationError(f"{name}: {error}") from None
            if value is not None:
                found[field.name] = value
        return cls(**found)

    @classmethod
    def forever(cls) -> Self:
        """Keep everything: a relay with this removes nothing."""
        return cls(**{field.name: FOREVER for field in dataclasses.fields(cls)})

    @property
    def removes(self) -> bool:
        """Whether anything is removed at all."""
        return any(math.isfinite(value) for value in self.as_dict().values())

    def as_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)

    def require(self, least: float, what: str) -> None:
        """Raise `ConfigurationError` where the inbox forgets sooner than ``what`` (which takes ``least`` seconds) is over:
        what was handled in the meantime can be delivered again."""
        if self.inbox < least:
            raise ConfigurationError(
                f"retention: the inbox is kept for {duration(self.inbox)}, and {what} can take {duration(least)}: a message "
                "that comes again after that would have its effect again. Keep it longer (OUTBOX_RETENTION_INBOX)"
            )


def age(text: str) -> float:
    """``30d`` or ``forever`` in seconds. Raises `ConfigurationError`."""
    return FOREVER if text.strip() == "forever" else seconds(text.strip())
