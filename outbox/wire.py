"""Our headers on the wire, the same for every transport (docs/wire.md)."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Final

from outbox import encoding
from outbox._message import Outgoing

ID: Final = "outbox-id"
TYPE: Final = "outbox-type"
KEY: Final = "outbox-key"
VERSION: Final = "outbox-version"
CYCLE: Final = "outbox-cycle"
CONTENT_TYPE: Final = "content-type"


def headers(message: Outgoing, *, with_key: bool = False) -> list[tuple[str, bytes]]:
    """The headers of a stored message: ours first, then the user's. Raises `DecodingError` where a row written by hand
    has headers that are no JSON object of text."""
    found: list[tuple[str, bytes]] = [(ID, message.id.encode())]
    if message.type is not None:
        found.append((TYPE, message.type.encode()))
    if message.content_type is not None:
        found.append((CONTENT_TYPE, message.content_type.encode()))
    if with_key and message.key is not None:
        found.append((KEY, message.key.encode()))
    if message.headers:
        found += [(name, value.encode()) for name, value in encoding.load_headers(message.headers).items()]
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
