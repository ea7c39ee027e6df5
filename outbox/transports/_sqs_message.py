"""A stored message as SQS takes it, and a received one as we hand it out.

A body is text that XML can hold, and not empty; a message has up to ten attributes. So a payload that is such text is the
body as it is, any other one is in Base64, which the attribute ``outbox-encoding`` says; of an empty one, or none, the body is
a dot. Headers are attributes, ours first; those beyond the tenth, and those that an attribute cannot hold, are together in
``outbox-headers``, a JSON object.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from outbox import wire
from outbox._outgoing import Outgoing

ENCODING: Final = "outbox-encoding"
HEADERS: Final = "outbox-headers"
ATTRIBUTES: Final = 10
EMPTY_BODY: Final = "."
LONGEST_ID: Final = 128  # characters of a deduplication id

_NO_TEXT: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NAME: Final = re.compile(
    r"(?!AWS\.|Amazon\.)(?!.*\.\.)[A-Za-z0-9_-]([A-Za-z0-9_.-]{0,254}[A-Za-z0-9_-])?", re.IGNORECASE
)
_GROUP: Final = re.compile(r"[A-Za-z0-9!-/:-@\[-`{-~]{1,128}")

Entry = dict[str, Any]


def entry_of(message: Outgoing, *, fifo: bool) -> tuple[Entry, int]:
    """An entry of ``SendMessageBatch``, without its ``Id``, and its size in bytes as SQS counts them. Raises
    `DecodingError` where the headers cannot be read."""
    headers = wire.as_text(message)
    body, encoding = _body(message.payload)
    if encoding is not None:
        headers[ENCODING] = encoding
    attributes = _attributes(headers)
    size = len(body.encode()) + sum(
        len(name.encode()) + len("String") + len(value["StringValue"].encode()) for name, value in attributes.items()
    )
    entry: Entry = {"MessageBody": body, "MessageAttributes": attributes}
    if fifo:
        cycle = headers.get(wire.CYCLE, "0")
        entry["MessageGroupId"] = message.id if message.key is None else group_id(message.key)
        entry["MessageDeduplicationId"] = message.id if cycle == "0" else f"{message.id}-{cycle}"[:LONGEST_ID]
    return entry, size


def group_id(key: str) -> str:
    """A key as a message group, of which messages come in order."""
    return key if _GROUP.fullmatch(key) else "sha256-" + hashlib.sha256(key.encode()).hexdigest()


def _body(payload: bytes | None) -> tuple[str, str | None]:
    if not payload:
        return EMPTY_BODY, None if payload is None else "empty"
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        text = None
    if text is None or _NO_TEXT.search(text):
        return base64.b64encode(payload).decode(), "base64"
    return text, None


def _attributes(headers: Mapping[str, str]) -> dict[str, dict[str, str]]:
    fits = {name: value for name, value in headers.items() if _is_attribute(name, value)}
    packed = {name: value for name, value in headers.items() if name not in fits}
    # whatever says how to read the rest is never packed
    if len(fits) + bool(packed) > ATTRIBUTES:
        ours = [name for name in fits if name.startswith("outbox-")]
        order = [*ours, *(name for name in fits if name not in ours)]
        for name in order[ATTRIBUTES - 1 :]:
            packed[name] = fits.pop(name)
    if packed:
        fits[HEADERS] = json.dumps(packed, separators=(",", ":"))
    return {name: {"DataType": "String", "StringValue": value} for name, value in fits.items()}


def _is_attribute(name: str, value: str) -> bool:
    return bool(value and name != HEADERS and _NAME.fullmatch(name)) and _NO_TEXT.search(value) is None


def read(message: Mapping[str, Any]) -> tuple[bytes | None, list[tuple[str, bytes]]]:
    """Payload and headers of a received message, also of a foreign one, whatever it holds."""
    headers: list[tuple[str, bytes]] = []
    packed = encoding = None
    empty = False
    for name, value in (message.get("MessageAttributes") or {}).items():
        text, binary = value.get("StringValue"), value.get("BinaryValue")
        if name == HEADERS and text is not None:
            packed = text
        elif name == ENCODING:
            encoding = text
        elif name == wire.TOMBSTONE:
            empty = True
        else:
            headers.append((name, binary if binary is not None else str(text or "").encode()))
    if packed is not None:
        headers += _unpacked(packed)
    return _payload(message.get("Body") or "", encoding, empty), headers


def _unpacked(text: str) -> list[tuple[str, bytes]]:
    try:
        found = json.loads(text)
        return [(str(name), str(value).encode()) for name, value in found.items()]
    except (ValueError, AttributeError, RecursionError):
        return [(HEADERS, text.encode(errors="surrogatepass"))]  # a foreign one's


def _payload(body: str, encoding: str | None, tombstone: bool) -> bytes | None:
    if tombstone:
        return None
    if encoding == "empty":
        return b""
    if encoding == "base64":
        try:
            return base64.b64decode(body, validate=True)
        except ValueError:
            pass
    return body.encode(errors="surrogatepass")
