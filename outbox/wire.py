"""Our headers on the wire, the same for every transport (docs/wire.md)."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Final

import msgspec

from outbox import encoding
from outbox._outgoing import Outgoing

ID: Final = "outbox-id"
TYPE: Final = "outbox-type"
KEY: Final = "outbox-key"
CYCLE: Final = "outbox-cycle"
CONTENT_TYPE: Final = "content-type"
TOMBSTONE: Final = "outbox-tombstone"
"""Marks a message without a payload, on brokers that cannot tell it from an empty one."""


_OF_THE_ROW: Final = frozenset((ID, TYPE, KEY, CONTENT_TYPE))
# Made once: `msgspec.json.decode(…, type=…)` looks its type up on each call, which costs 0.6 µs a message.
_load = msgspec.json.Decoder(dict[str, str]).decode


def as_text(message: Outgoing) -> dict[str, str]:
    """The headers of a stored message for brokers whose headers are text, with the key and the tombstone's mark. As
    `headers` otherwise."""
    found = {ID: message.id}
    if message.type is not None:
        found[TYPE] = message.type
    if message.key is not None:
        found[KEY] = message.key
    if message.content_type is not None:
        found[CONTENT_TYPE] = message.content_type
    if message.payload is None:
        found[TOMBSTONE] = "1"
    if text := message.headers:
        try:
            for name, value in _load(text).items():
                if name not in _OF_THE_ROW and name != TOMBSTONE:
                    found[name] = value
        except ValueError:
            encoding.load_headers(text)  # which explains it
            raise
    return found


def headers(message: Outgoing) -> list[tuple[str, bytes]]:
    """The headers of a stored message: ours, from its columns, then the user's. What a row written by hand has among
    its headers under the name of a column is left out: under another message's id, consumers would skip it. Raises
    `DecodingError` where they are no JSON object of text. On the relay's hot path: 0.5 µs."""
    found = [(ID, message.id.encode())]
    if message.type is not None:
        found.append((TYPE, message.type.encode()))
    if message.content_type is not None:
        found.append((CONTENT_TYPE, message.content_type.encode()))
    if text := message.headers:
        try:
            found += [(name, value.encode()) for name, value in _load(text).items() if name not in _OF_THE_ROW]
        except ValueError:  # msgspec's and Unicode's errors alike
            encoding.load_headers(text)  # which explains it
            raise
    return found


def text_headers(raw: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """Received headers as text. Of a repeated name the last one counts, as in Kafka's own `lastHeader`; a value that is
    not UTF-8 becomes ``base64:…``."""
    found: dict[str, str] = {}
    for name, value in raw:
        text = encoding.header_text(value)
        if text is None:
            import base64

            text = "base64:" + base64.b64encode(value).decode()
        found[name] = text
    return found


def cycle(headers: dict[str, str]) -> int:
    """How often this message was replayed, by its header; 0 where there is none, or none that makes sense."""
    text = headers.get(CYCLE, "0")
    return int(text) if text.isdecimal() and len(text) < 9 else 0


def message_id(headers: dict[str, str]) -> uuid.UUID | None:
    """The id that a producer gave the message: ours, or the ``id`` of Debezium's Event Router."""
    return encoding.parse_uuid(headers.get(ID)) or encoding.parse_uuid(headers.get("id"))
