"""`wire.headers` for the hot path: 0.5 instead of 1.5 µs a message, measured with three headers on Python 3.11."""

from __future__ import annotations

import msgspec

from outbox import wire
from outbox._message import Outgoing

# Made once: `msgspec.json.decode(…, type=…)` looks its type up on each call, which costs 0.6 µs.
_load = msgspec.json.Decoder(dict[str, str]).decode


def headers(message: Outgoing) -> list[tuple[str, bytes]]:
    """The same as `wire.headers(message)`, and as it raises `DecodingError`."""
    _, id, _, _, type, _, content_type, text, _ = message
    found = [(wire.ID, id.encode())]
    if type is not None:
        found.append((wire.TYPE, type.encode()))
    if content_type is not None:
        found.append((wire.CONTENT_TYPE, content_type.encode()))
    if text:
        try:
            found += [(name, value.encode()) for name, value in _load(text).items()]
        except ValueError:  # msgspec's and Unicode's errors alike
            return wire.headers(message)  # which explains it
    return found
