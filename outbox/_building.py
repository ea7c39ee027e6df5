"""What ``add`` is given, checked and encoded: the one place that builds rows, for sessions and raw connections, sync and
async."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from outbox import encoding
from outbox._message import (
    ABSENT,
    VERSION_HEADER,
    Declaration,
    Key,
    Message,
    _Absent,
    bucket_of,
    check_content_type,
    check_headers,
    check_topic,
    check_type,
    declaration,
    key_text,
    new_id,
)
from outbox._rows import Built
from outbox.errors import EncodingError
from outbox.tables import Tables

_REQUIRED: Final = {"topic", "payload"}
_ARGUMENTS: Final = {"topic", "payload", "key", "type", "headers", "content_type", "deliver_at", "id"}


class Builder:
    """Builds the rows of one outbox. Raises `EncodingError`, and `TypeError` for what is no message at all."""

    __slots__ = ("codec", "tables")

    def __init__(self, tables: Tables, codec: encoding.Codec) -> None:
        self.tables = tables
        self.codec = codec

    def one(
        self,
        topic: Any,
        payload: Any = ABSENT,
        *,
        key: Any = ABSENT,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
        deliver_at: dt.datetime | dt.timedelta | None = None,
        id: uuid.UUID | None = None,
    ) -> Built:
        """The row of a topic and its payload or, without a payload, of an event."""
        if payload is not ABSENT:
            return self._build(topic, payload, key, type, headers, content_type, deliver_at, id)
        declared = _declared(topic)
        if key is not ABSENT or type is not None or content_type is not None:
            raise TypeError(f"add(…, {topic.__class__.__name__}): topic, key and type come from its @event declaration")
        return self._build(declared.topic, topic, headers=headers, deliver_at=deliver_at, id=id)

    def many(self, messages: Iterable[object]) -> list[Built]:
        """The rows of what `Outbox.add_all` takes."""
        built: list[Built] = []
        for message in messages:
            if type(message) is dict or (isinstance(message, Mapping) and declaration(type(message)) is None):
                if not _REQUIRED <= message.keys() <= _ARGUMENTS:
                    raise TypeError(
                        f"add_all: a mapping needs 'topic' and 'payload' and may have {sorted(_ARGUMENTS)}; got "
                        f"{sorted(map(str, message))}"
                    )
                built.append(self._build(**message))
            elif isinstance(message, Message):
                built.append(self._message(message))
            else:
                built.append(self._build(_declared(message).topic, message))
        return built

    def _build(
        self,
        topic: str,
        payload: Any,
        key: Key | _Absent | None = ABSENT,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
        deliver_at: dt.datetime | dt.timedelta | None = None,
        id: uuid.UUID | None = None,
    ) -> Built:
        """What is not said and the payload's class declares is as declared, also when it goes to another topic."""
        topic = check_topic(topic)
        if id is not None and not isinstance(id, uuid.UUID):
            raise EncodingError(f"message for {topic!r}: id is a {id.__class__.__name__}; it must be a UUID")
        checked = {} if headers is None else check_headers(headers, topic)
        declared = declaration(payload.__class__)
        if declared is not None:
            type = declared.type if type is None else type
            if key is ABSENT and declared.key is not None:
                key = declared.key(payload)
            if declared.version != 1:
                checked[VERSION_HEADER] = str(declared.version)
        text = key_text(key, topic)
        body, content_type = encoding.encode(payload, topic, check_content_type(content_type, topic), self.codec)
        return self._built(
            Message(
                id=id or new_id(),
                topic=topic,
                payload=body,
                key=text,
                type=check_type(type, topic),
                content_type=content_type,
                headers=checked,
                deliver_at=None if deliver_at is None else _instant(deliver_at, topic),
            )
        )

    def _message(self, message: Message) -> Built:
        if message.payload is not None and not isinstance(message.payload, bytes):
            raise EncodingError(
                f"message for {message.topic!r}: the payload of a Message is bytes or None, not "
                f"{message.payload.__class__.__name__}; give a mapping of add's arguments to have it encoded"
            )
        headers = message.headers
        version = headers.get(VERSION_HEADER) if isinstance(headers, Mapping) else None
        if version is not None:  # a declared message, staged or received before: what its payload is
            headers = {name: value for name, value in headers.items() if name != VERSION_HEADER}
        # checked like any other, and with the content type that it has: None stays None
        checked = self._build(
            message.topic,
            message.payload,
            ABSENT if message.key is None else message.key,
            message.type,
            headers,
            message.content_type,
            message.deliver_at,
            message.id,
        )[2]
        if version is not None:
            checked = replace(checked, headers={**checked.headers, VERSION_HEADER: version})
        return self._built(replace(checked, content_type=message.content_type))

    def _built(self, message: Message) -> Built:
        parameters: dict[str, Any] = {
            "id": message.id,
            "bucket": bucket_of(message.key, message.id),
            "topic": message.topic,
            "key": message.key,
            "type": message.type,
            "payload": message.payload,
            "content_type": message.content_type,
            "headers": encoding.dump_headers(message.headers) if message.headers else None,
        }
        if message.deliver_at is None:
            return self.tables.message, parameters, message
        parameters["deliver_at"] = message.deliver_at
        return self.tables.scheduled, parameters, message


def _instant(value: dt.datetime | dt.timedelta, topic: str) -> dt.datetime:
    try:
        if isinstance(value, dt.timedelta):
            return dt.datetime.now(dt.UTC) + value
        if not isinstance(value, dt.datetime):
            raise EncodingError(
                f"message for {topic!r}: deliver_at is a {value.__class__.__name__}; an aware datetime or a timedelta"
            )
        if value.tzinfo is None or value.utcoffset() is None:
            raise EncodingError(
                f"message for {topic!r}: deliver_at has no time zone; use datetime.now(UTC) + … or a timedelta"
            )
        return value.astimezone(dt.UTC)
    except OverflowError:
        raise EncodingError(f"message for {topic!r}: deliver_at is out of range") from None


def _declared(event: object) -> Declaration:
    """What was declared for this object's class; else a TypeError that says what was forgotten."""
    if isinstance(event, str):
        raise TypeError(f"add(…, {event!r}): the payload is missing, as in add(session, {event!r}, {{…}}, key=…)")
    if isinstance(event, type):
        hint = "an instance of it" if declaration(event) else "an instance of a class declared with @event"
        raise TypeError(f"add(…, {event.__name__}): this is the class itself; add takes {hint}")
    declared = declaration(type(event))
    if declared is None:
        raise TypeError(
            f"add(…, {type(event).__name__} object): its class is not declared; decorate it with "
            "@event(topic, type=…), or give topic and payload"
        )
    return declared
