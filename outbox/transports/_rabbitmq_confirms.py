"""A channel in confirm mode: what is under way on it, and what the broker says of each message."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pika import exceptions

from outbox._outgoing import Outgoing
from outbox.errors import MessageTooLarge, Unavailable
from outbox.transport import SENT, Outcome
from outbox.transports import _rabbitmq_link as link_
from outbox.transports._rabbitmq_link import Channel, Link
from outbox.transports._rabbitmq_topology import refusal

_LIMIT: Final = re.compile(r"larger than configured max size (\d+)")


@dataclass(eq=False, slots=True)
class Call:
    """One call of `publish`, or a part of it: what became of each message, and when all is known."""

    messages: Sequence[Outgoing]
    outcomes: list[Outcome | None]
    left: int
    """Messages without an outcome."""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, messages: Sequence[Outgoing]) -> Call:
        return cls(messages, [None] * len(messages), len(messages))

    def settle(self, at: int, outcome: Outcome) -> None:
        """The first word counts: a returned message is confirmed afterwards all the same."""
        if self.outcomes[at] is None:
            self.outcomes[at] = outcome
            self.left -= 1
            if not self.left:
                self.done.set()


Slot = tuple[Call, int]
"""A message that waits for its confirm."""


class Confirmed:
    """A channel in confirm mode, and what is under way on it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.waiting: dict[int, Slot] = {}
        """By delivery tag, in order."""
        self._next = 1
        self._lowest = 1
        """No lower tag is waiting."""
        self._returned = 1
        """Returns come in the order of publishing: no lower tag will be returned."""
        self.refused = False
        """The broker did not take a message. When a queue's leader dies, a channel can go on asking the dead one for ever
        (seen with RabbitMQ 3.10), while a new one finds its successor."""
        self.on_limit: Callable[[int], None] | None = None
        """Told the largest payload in bytes, once the broker has refused a larger one and ended the channel."""

    @classmethod
    async def open(cls, link: Link) -> Confirmed:
        """Raises pika's errors and TimeoutError."""
        channel = await link.channel()
        found = cls(channel)
        channel.on_lost = found._lost
        channel.pika.add_on_return_callback(found._on_return)
        await channel.call(channel.pika.confirm_delivery, found._on_confirm)
        return found

    @property
    def usable(self) -> bool:
        return self.channel.is_open and not self.refused

    def publish(self, exchange: str, routing_key: str, body: bytes, properties: Any, slot: Slot) -> None:
        """Hand one message to the socket. Raises pika's errors where the channel is closed, or the message cannot be
        written; then it is not."""
        self.channel.pika.basic_publish(exchange, routing_key, body, properties, mandatory=True)
        self.waiting[self._next] = slot
        self._next += 1

    def _on_confirm(self, found: Any) -> None:
        method = found.method
        acked = method.INDEX == _ACK
        tag = method.delivery_tag
        waiting = self.waiting
        if not method.multiple:
            slot = waiting.pop(tag, None)
            if slot is not None:
                self._settle(slot, acked)
            return
        for lower in range(self._lowest, tag + 1):
            slot = waiting.pop(lower, None)
            if slot is not None:
                self._settle(slot, acked)
        self._lowest = max(self._lowest, tag + 1)

    def _settle(self, slot: Slot, acked: bool) -> None:
        call, at = slot
        if acked:
            call.settle(at, SENT)
            return
        self.refused = True
        topic = call.messages[at].topic
        error = Unavailable(
            f"rabbitmq: topic {topic!r}: the broker did not take a message: one of its queues is full, or has no leader"
        )
        call.settle(at, Outcome.unavailable(str(error), error, scope="topic"))

    def _on_return(self, _: object, method: Any, properties: Any, __: bytes) -> None:
        """Nobody would get it. Comes before its confirm, and names no tag."""
        for tags in (range(self._returned, self._next), range(self._lowest, self._returned)):
            for tag in tags:
                slot = self.waiting.get(tag)
                if slot is not None and slot[0].messages[slot[1]].id == properties.message_id:
                    self._returned = tag + 1
                    call, at = slot
                    error = unroutable(call.messages[at].topic, method)
                    call.settle(at, Outcome.unavailable(str(error), error, scope="topic"))
                    return

    def _lost(self, reason: BaseException) -> None:
        """What had no confirm is not sent, as far as anybody knows."""
        slots = list(self.waiting.values())
        self.waiting.clear()
        scope_is_topic = isinstance(reason, exceptions.ChannelClosedByBroker)
        said = _LIMIT.search(link_.text(reason)) if scope_is_topic else None
        limit = int(said[1]) if said is not None else None
        if limit is not None and self.on_limit is not None:
            self.on_limit(limit)
        for call, at in slots:
            message = call.messages[at]
            if limit is not None and len(message.payload or b"") > limit:
                call.settle(at, too_large(message, limit))
                continue
            what = f"topic {message.topic!r} cannot be written to" if scope_is_topic else "the connection was lost"
            error = refusal(reason, what)
            if not isinstance(error, Unavailable):
                error = Unavailable(str(error))
            call.settle(at, Outcome.unavailable(str(error), error, scope(scope_is_topic)))


_ACK: Final = 0x003C0050


def unroutable(topic: str, method: Any) -> Unavailable:
    return Unavailable(
        f"rabbitmq: topic {topic!r}: no queue is bound to exchange {method.exchange!r} for routing key "
        f"{method.routing_key!r}, so nobody would get the message; start its consumers (a group's queue is made when it "
        "first subscribes), or bind a queue"
    )


def too_large(message: Outgoing, limit: int) -> Outcome:
    error = MessageTooLarge(
        f"rabbitmq: message {message.id} for {message.topic!r} has {len(message.payload or b'')} bytes, and the broker takes "
        f"at most {limit} (max_message_size there, max_message_bytes in the URL)"
    )
    return Outcome.reject(str(error), error)


def scope(of_the_topic: bool) -> Literal["transport", "topic"]:
    return "topic" if of_the_topic else "transport"
