"""Numbers and times as the sentences for operators say them."""

from __future__ import annotations

import datetime as dt
import re

from outbox.errors import ConfigurationError


def some(number: int, noun: str, plural: str | None = None) -> str:
    """``1 message``, ``2,000 messages``, ``1 reply``, ``2 replies`` (where ``plural`` says so)."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def word(number: int, one: str, more: str) -> str:
    """The word that goes with a number: ``word(2, "is", "are")``."""
    return one if number == 1 else more


def times(number: int) -> str:
    """``once``, ``twice``, ``3 times``."""
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def at(moment: dt.datetime) -> str:
    """An instant, to the second: ``2026-11-22 18:01:12 UTC``."""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: float) -> str:
    """Seconds as people read them: ``3.2 s``, ``4 m 12 s``, ``2 h 5 m``, ``3 d 4 h``."""
    if seconds < 59.95:  # else it would read 60.0 s
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(max(60.0, seconds)), 60)
    if minutes < 60:
        return f"{minutes} m {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} m" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def seconds(text: str) -> float:
    """The other way: ``90s``, ``5m``, ``2h``, ``1d`` (without a unit: seconds). Raises `ConfigurationError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|d)?", text)
    if match is None:
        raise ConfigurationError(f"{text!r} is no age: write 90s, 5m, 2h or 1d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2] or "s"]


def listed(names: list[str], most: int = 3) -> str:
    """``a, b and 2 more``."""
    if len(names) <= most + 1:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
