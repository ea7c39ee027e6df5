"""What a consumer is doing, for `status`, probes and tests."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counts:
    """Messages since the start. Each that was received is ``handled``, ``skipped`` (its effect was there already),
    ``ignored`` or ``dead`` in the end, or is still in ``State.in_memory``, or was dropped to be delivered again."""

    received: int = 0
    """From the broker."""
    replays: int = 0
    """Dead letters that were handed back."""
    handled: int = 0
    skipped: int = 0
    failed: int = 0
    """Attempts that failed."""
    ignored: int = 0
    """Without a handler, by a consumer with ``unknown="ignore"``."""
    dead: int = 0

    def said(self) -> str:
        """For a log."""
        return (
            f"{self.handled} handled, {self.skipped} skipped, {self.failed} attempts failed, {self.dead} dead letters"
        )


@dataclass(slots=True)
class State:
    """Of one consumer in this process. ``broker`` and ``database`` are None while all is well, else what is wrong, without
    secrets; ``error`` is what ended it."""

    running: bool = False
    subscribed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while this process is a member of the group."""
    broker: str | None = None
    database: str | None = None
    error: BaseException | None = None
    in_memory: int = 0
    counts: Counts = field(default_factory=Counts)
