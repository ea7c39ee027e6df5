"""One queue of a group as a member reads it, and its messages as deliveries."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from datetime import UTC, datetime
from typing import Any, Final

from outbox import wire
from outbox.transport import Delivery
from outbox.transports._rabbitmq_link import Channel
from outbox.transports._rabbitmq_topology import GroupQueues

Received = tuple[Any, Any, bytes]
"""pika's Basic.Deliver, the properties and the body."""


class Feed:
    """One queue through one channel, for as long as that lives; the token of its deliveries holds it."""

    def __init__(self, queues: GroupQueues, part: int, channel: Channel, awake: asyncio.Event) -> None:
        self.topic = queues.topic
        self.queues = queues
        self.part = part
        self.queue = queues.queues[part]
        self.channel = channel
        self.waiting: deque[Received] = deque()
        """Received, and not handed out."""
        self.out: dict[int, Received] = {}
        """By tag, what is handed out and not acknowledged, in order."""
        self.active = False
        """Something came: of several members it is this one that the queue delivers to."""
        self.leaving = False
        self.drained = asyncio.Event()
        """Set when the last of what is out is acknowledged."""
        self._awake = awake

    @property
    def place(self) -> tuple[str, int]:
        return self.topic, self.part

    def received(self, _: object, method: Any, properties: Any, body: bytes) -> None:
        self.waiting.append((method, properties, body))
        self.active = True
        self._awake.set()

    def hand_out(self) -> Delivery:
        received = self.waiting.popleft()
        tag: int = received[0].delivery_tag
        self.out[tag] = received
        return delivery(self, received, (self, tag))

    def ack(self, tags: set[int]) -> None:
        """What has no gap before it goes in one frame."""
        channel, out = self.channel.pika, self.out
        last = 0
        for tag in out:
            if tag not in tags:
                break
            last = tag
        if last:
            channel.basic_ack(last, multiple=True)
        for tag in tags:
            if tag in out:
                del out[tag]
                if tag > last:
                    channel.basic_ack(tag)
        if not out:
            self.drained.set()


def delivery(feed: Feed, received: Received, token: object) -> Delivery:
    method, properties, body = received
    found = properties.headers
    headers: list[tuple[str, bytes]] = []
    key: bytes | None = None
    payload: bytes | None = body
    suspect: bool = method.redelivered
    if found:
        for name, value in found.items():
            raw = value.encode() if type(value) is str else _raw(value)
            if name == wire.KEY:
                key = raw
            elif name == wire.TOMBSTONE:
                if not body:
                    payload = None
                    continue
            elif name in _SEEN_BEFORE:
                suspect = True
            headers.append((name, raw))
    if properties.content_type is not None and (not found or wire.CONTENT_TYPE not in found):
        headers.append((wire.CONTENT_TYPE, _raw(properties.content_type)))
    return Delivery(
        topic=feed.topic,
        payload=payload,
        key=key,
        headers=headers,
        partition=feed.part,
        timestamp=_time(properties.timestamp) if properties.timestamp is not None else None,
        suspect=suspect,
        token=token,
    )


_SEEN_BEFORE: Final = frozenset(("x-death", "x-delivery-count"))


def _raw(value: Any) -> bytes:
    """A header of whatever type as bytes; tables and lists as JSON."""
    if isinstance(value, str):
        return value.encode(errors="surrogateescape")
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if value is None:
        return b""
    if isinstance(value, dict | list):
        return json.dumps(value, default=lambda other: _raw(other).decode(errors="replace")).encode()
    if isinstance(value, datetime):
        return value.isoformat().encode()
    return str(value).encode()


def _time(seconds: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):  # a foreign producer's nonsense
        return None


def token_of(delivery: Delivery) -> tuple[Feed, int]:
    token = delivery.token
    if not isinstance(token, tuple) or len(token) != 2 or not isinstance(token[0], Feed):
        raise ValueError("this delivery is of another transport")
    return token
