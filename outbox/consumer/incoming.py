"""One message on its way through a consumer: what the broker delivered, or a replay out of the database."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import sqlalchemy as sa

from outbox import encoding, wire
from outbox._message import CONTENT_TYPE_LENGTH, KEY_LENGTH, TYPE_LENGTH, Message, message_id, new_id
from outbox.errors import ConfigurationError, DecodingError
from outbox.transport import Delivery

Identify = Callable[[Delivery], "uuid.UUID | str"]

_OURS: Final = (wire.ID, wire.TYPE, wire.KEY, wire.CONTENT_TYPE, wire.CYCLE)


@dataclass(slots=True, eq=False)
class Incoming:
    """``cycle``: 0 in a message's first life. ``trouble``: why nothing can be done with it, whatever the handler."""

    message: Message
    cycle: int
    delivery: Delivery | None = None
    """None for a replay."""
    raw_key: bytes | None = field(default=None, repr=False)
    """The key, where it is not text that a column can hold."""
    order: tuple[str, bytes] | None = None
    """Messages with the same one are handled one after the other; None: no order."""
    trouble: Exception | None = None
    failures: int = 0
    """Attempts that failed, as far as this process knows."""
    spared: int = 0
    """How often a failure was put down to the database, not to the message."""
    defects: int = 0
    """How often it could not be processed at all, through no fault of its handler."""
    not_before: float = 0.0
    """When its next attempt is due, by the event loop's clock."""
    given_up: bool = False
    """Its partition goes to another member: finish it or drop it, and do not begin it again."""
    task: asyncio.Task[None] | None = None

    @property
    def replay(self) -> bool:
        return self.delivery is None

    @property
    def has_attempt_row(self) -> bool:
        """Whether a row of ``attempt`` may be left of it, to be deleted with its effect: of messages that failed here, were
        in flight when a previous owner ended, or wait there. All others cost no statement."""
        return self.delivery is None or self.failures > 0 or self.delivery.suspect

    @property
    def place(self) -> tuple[str, int] | None:
        """(topic, partition)"""
        if self.delivery is None or self.delivery.partition is None:
            return None
        return self.delivery.topic, self.delivery.partition


def from_delivery(delivery: Delivery, *, identify: Identify | None, keep_order: bool) -> Incoming:
    """What the broker delivered. Never raises: what is wrong with it is its ``trouble``.

    Its id: the header ``outbox-id`` or Debezium's ``id``; else what ``identify`` says; else, where deliveries have
    offsets, UUID version 5 of "topic id or topic/partition/offset".
    """
    headers = wire.text_headers(delivery.headers)
    trouble: Exception | None = None
    id = wire.message_id(headers)
    try:
        if id is None and identify is not None:
            id = message_id(identify(delivery))
        elif id is None and delivery.partition is not None and delivery.offset is not None:
            id = message_id(f"{delivery.topic_id or delivery.topic}/{delivery.partition}/{delivery.offset}")
        elif id is None:
            raise ConfigurationError(
                "the message has no header outbox-id (nor Debezium's id), and this broker numbers nothing: give "
                "Consumer(message_id=…), a function from the delivery to an id that a redelivery repeats"
            )
    except Exception as error:
        # of any id, so that it can be a dead letter
        id, trouble = new_id(), error
    raw = delivery.key
    if raw is None and wire.KEY in headers:
        raw = headers[wire.KEY].encode()
    key = None if raw is None else encoding.header_text(raw)
    if key is not None:
        key = _column(key, KEY_LENGTH)
    message = Message(
        id=id,
        topic=delivery.topic,
        payload=delivery.payload,
        key=key,
        type=_column(headers.get(wire.TYPE), TYPE_LENGTH),
        content_type=_column(headers.get(wire.CONTENT_TYPE), CONTENT_TYPE_LENGTH),
        headers=_others(headers),
        created_at=delivery.timestamp,
    )
    return Incoming(
        message=message,
        cycle=wire.cycle(headers),
        delivery=delivery,
        raw_key=raw if key is None else None,
        order=(delivery.topic, raw) if keep_order and raw is not None else None,
        trouble=trouble,
    )


def from_attempt(row: sa.RowMapping, *, keep_order: bool) -> Incoming:
    """A replay, as it waits in the table ``attempt``."""
    trouble: DecodingError | None = None
    headers: Mapping[str, str] = {}
    try:
        headers = encoding.load_headers(row["headers"])
    except DecodingError as error:
        trouble = error
    message = Message(
        id=row["message_id"],
        topic=row["topic"],
        payload=row["payload"],
        key=row["key"],
        type=row["type"],
        content_type=row["content_type"],
        headers=headers,
        created_at=row["created_at"],
    )
    key = row["key"]
    return Incoming(
        message=message,
        cycle=row["cycle"],
        order=(row["topic"], key.encode()) if keep_order and key is not None else None,
        trouble=trouble,
        failures=row["attempts"],
    )


def _others(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers without those that have become fields of the message; one that did not fit its column stays."""
    fits = {
        wire.TYPE: _column(headers.get(wire.TYPE), TYPE_LENGTH),
        wire.CONTENT_TYPE: _column(headers.get(wire.CONTENT_TYPE), CONTENT_TYPE_LENGTH),
    }
    return {name: value for name, value in headers.items() if name not in _OURS or fits.get(name, value) is None}


def _column(text: str | None, length: int) -> str | None:
    """Text, if a column of that length can hold it. A foreign producer's may have any."""
    return text if text and len(text) <= length and "\x00" not in text else None
