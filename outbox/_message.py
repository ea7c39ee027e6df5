"""Messages: what they are made of, how their classes are declared, which bucket they belong to. Standard library only."""

from __future__ import annotations

import builtins
import os
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from operator import attrgetter
from typing import Any, Final, TypeVar

from outbox.errors import ConfigurationError, EncodingError

BUCKETS: Final = 64
"""A key's bucket is CRC-32 of its UTF-8 bytes modulo this. Documented in docs/table.md: other languages write rows too."""

TOPIC_LENGTH: Final = 255
KEY_LENGTH: Final = 255
TYPE_LENGTH: Final = 255
CONTENT_TYPE_LENGTH: Final = 255

VERSION_HEADER: Final = "outbox-version"
"""Of a declared message whose version is not 1."""

# Foreign message ids that are not UUIDs are mapped into this namespace (RFC 9562, version 5), so that the inbox's index
# stays 16 bytes a row.
FOREIGN_IDS: Final = uuid.UUID("5c0b7a3e-7f0e-5d0c-9a55-6f7574626f78")

Key = str | int | uuid.UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message. ``payload`` is bytes as they go over the wire; None is a tombstone (delete marker of the key).

    ``key`` orders: messages of one (topic, key) are delivered in order; None has no order. ``position`` is None until
    the row has been read back from the table. ``headers`` are text to text.
    """

    id: uuid.UUID
    topic: str
    payload: bytes | None = field(repr=False)
    key: str | None = None
    type: str | None = None
    content_type: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    deliver_at: datetime | None = None
    created_at: datetime | None = None
    position: int | None = None


def bucket_of(key: str | None, id: uuid.UUID) -> int:
    """The bucket, 0–63: of the key where there is one, else any (the id's random bits)."""
    if key is None:
        return id.int & (BUCKETS - 1)
    return zlib.crc32(key.encode()) % BUCKETS


_last_ms = 0
_counter = 0
_lock = threading.Lock()
_random: list[int] = []  # drawn in advance: a system call for each id costs a third of it


def _begin_in_child() -> None:
    """A child forked while another thread held the lock would wait for that thread, which it does not have; and what its
    parent drew in advance is its parent's."""
    global _lock
    _lock = threading.Lock()
    _random.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)


def new_id() -> uuid.UUID:
    """A UUID version 7 (RFC 9562, section 5.7): milliseconds, then a 12-bit counter, then random bits.

    Ids of one process increase, which keeps the indexes they are in compact. They are names, not an order: delivery
    order never comes from a clock.
    """
    global _last_ms, _counter
    with _lock:
        now = time.time_ns() // 1_000_000
        if now > _last_ms:
            _last_ms, _counter = now, 0
        else:
            _counter += 1
            if _counter > 0xFFF:
                _last_ms, _counter = _last_ms + 1, 0
        ms, counter = _last_ms, _counter
        if not _random:
            _random.extend(struct.unpack("128Q", os.urandom(1024)))
        rand = _random.pop() & 0x3FFFFFFFFFFFFFFF
    return uuid.UUID(int=(ms << 80) | (0x7 << 76) | (counter << 64) | (0b10 << 62) | rand)


def message_id(value: uuid.UUID | str) -> uuid.UUID:
    """The UUID under which the inbox knows a message: a UUID or its text as it is, any other text as UUID version 5.
    Raises `TypeError`, or `EncodingError` for empty text and text that is not UTF-8."""
    if isinstance(value, uuid.UUID):
        return value
    if not isinstance(value, str):
        raise TypeError(f"a message id is a UUID or a str, not {type(value).__name__}")
    try:
        return uuid.UUID(value)
    except ValueError:
        if not value:
            raise EncodingError("the message id is empty: all messages without one would be the same message") from None
        _require_utf8(value, "message id")
        return uuid.uuid5(FOREIGN_IDS, value)


class _Absent:
    """The key was left out, which is not the same as ``key=None``."""

    def __repr__(self) -> str:
        return "<absent>"


ABSENT: Final = _Absent()


def key_text(key: Key | _Absent | None, topic: str) -> str | None:
    """A key as the text that is stored and hashed. ``key=None`` raises: it is an id that has not been flushed yet."""
    if key is ABSENT:
        return None
    if isinstance(key, str):
        text = _plain(key)
    elif isinstance(key, bool):
        raise EncodingError(f"message for {topic!r}: key is a bool; it must be a str, int or UUID")
    elif isinstance(key, int):
        # int.__repr__: an IntEnum is its number; longer ones than this many bits Python may refuse to print at all
        text = int.__repr__(key) if key.bit_length() < KEY_LENGTH * 4 else "9" * KEY_LENGTH * 2
    elif isinstance(key, uuid.UUID):
        text = str(key)
    elif key is None:
        raise EncodingError(
            f"message for {topic!r}: key is None; flush the entity first (session.flush()) so that its id exists, "
            "or leave key out if these messages need no order"
        )
    else:
        raise EncodingError(f"message for {topic!r}: key is a {type(key).__name__}; it must be a str, int or UUID")
    if not 0 < len(text) <= KEY_LENGTH:
        raise EncodingError(
            f"message for {topic!r}: key has {len(text)} characters; between 1 and {KEY_LENGTH} are possible"
        )
    _require_text(text, f"message for {topic!r}: key")
    return text


def check_topic(topic: object) -> str:
    """The topic, if it is one: text of 1 to 255 characters. Whether the broker likes it is the transport's to say."""
    if not isinstance(topic, str):
        raise EncodingError(f"topic is a {type(topic).__name__}; it must be a str")
    if not 0 < len(topic) <= TOPIC_LENGTH:
        raise EncodingError(f"topic has {len(topic)} characters; between 1 and {TOPIC_LENGTH} are possible")
    _require_text(topic, "topic")
    return _plain(topic)


def check_type(type_: object, topic: str) -> str | None:
    """The message type, if it is one: None, or text of 1 to 255 characters."""
    return _check_short_text(type_, f"message for {topic!r}: type", TYPE_LENGTH)


def check_content_type(content_type: object, topic: str) -> str | None:
    """The content type, if it is one: None, or text of 1 to 255 characters."""
    return _check_short_text(content_type, f"message for {topic!r}: content_type", CONTENT_TYPE_LENGTH)


def check_headers(headers: object, topic: str) -> dict[str, str]:
    """The headers, if they are a mapping of text to text. No error shows a value: it may be a secret."""
    if not isinstance(headers, Mapping):
        raise EncodingError(f"message for {topic!r}: headers are a {type(headers).__name__}; they must be a mapping")
    checked = {}
    for name, value in headers.items():
        if not isinstance(name, str) or not name:
            raise EncodingError(f"message for {topic!r}: header names are non-empty text, not {type(name).__name__}")
        _require_text(name, f"message for {topic!r}: a header name")
        if name.lower().startswith("outbox-") or name.lower() == "content-type":
            raise EncodingError(
                f"message for {topic!r}: header {name!r} is ours and would replace the message's own (an id that another "
                "message has makes consumers skip this one); leave it out, and use id=, type=, key= or content_type="
            )
        if not isinstance(value, str):
            raise EncodingError(
                f"message for {topic!r}: header {name!r} is a {type(value).__name__}; header values are text"
            )
        _require_text(value, f"message for {topic!r}: header {name!r}")
        checked[_plain(name)] = _plain(value)
    return checked


def _check_short_text(value: object, what: str, length: int) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= length:
        raise EncodingError(f"{what} must be a str of 1 to {length} characters")
    _require_text(value, what)
    return _plain(value)


def _plain(text: str) -> str:
    """Text as a plain str: drivers treat subclasses differently (psycopg writes an Enum's name, others its value)."""
    return text if type(text) is str else str.__str__(text)


def _require_text(text: str, what: str) -> None:
    """PostgreSQL stores no NUL, and a lone surrogate is not UTF-8: found here, in the app's transaction."""
    if "\x00" in text:
        raise EncodingError(f"{what} contains a NUL character")
    if not text.isascii():
        _require_utf8(text, what)


def _require_utf8(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise EncodingError(f"{what} contains a lone surrogate, which is not valid UTF-8") from None


@dataclass(frozen=True, slots=True)
class Declaration:
    """What ``@event`` said of a message class."""

    topic: str
    type: str
    key: Callable[[Any], Key | None] | None
    version: int


T = TypeVar("T")
_DECLARED: Final = "__outbox_event__"


def event(
    topic: str, *, type: str, key: str | Callable[[Any], Key | None] | None = None, version: int = 1
) -> Callable[[type[T]], type[T]]:
    """Declare a message class: its topic, its type on the wire, and the attribute (or function) that is its key.

    ``type`` has no default on purpose: renaming a class must not change what consumers see. ``version`` travels as the
    header ``outbox-version`` when it is not 1. The class itself is returned unchanged, so services can share it
    without sharing a database.

    Raises `ConfigurationError` for an empty topic or type, and if ``key`` names nothing that the class has.
    """
    try:
        topic = check_topic(topic)
        checked = check_type(type, topic)
    except EncodingError as error:
        raise ConfigurationError(f"@event: {error}") from None
    if checked is None:
        raise ConfigurationError(f"@event({topic!r}): type is required; it names the message on the wire")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ConfigurationError(f"@event({topic!r}, type={type!r}): version must be an int from 1 on")
    if key is not None and not isinstance(key, str) and not callable(key):
        raise ConfigurationError(f"@event({topic!r}, type={type!r}): key is the name of an attribute, or a function")

    def declare(cls: builtins.type[T]) -> builtins.type[T]:
        given: object = cls
        if not isinstance(given, builtins.type):
            raise ConfigurationError(f"@event({topic!r}, type={type!r}) declares a class, not {given!r}")
        if isinstance(key, str):
            names = set(dir(cls))
            for base in cls.__mro__:
                names.update(getattr(base, "__annotations__", ()))
            if key not in names:
                raise ConfigurationError(f"@event({topic!r}, type={type!r}): {cls.__name__} has no attribute {key!r}")
        setattr(cls, _DECLARED, Declaration(topic, checked, attrgetter(key) if isinstance(key, str) else key, version))
        return cls

    return declare


def declaration(cls: object) -> Declaration | None:
    """What `event` declared on this very class (a subclass declares itself, or is none)."""
    found = vars(cls).get(_DECLARED) if isinstance(cls, type) else None
    return found if isinstance(found, Declaration) else None
