"""Publishing with pipelined confirms: every message is `sent` by the broker's own word, or it is not sent.

Each topic has a channel of its own, because what the broker holds against one message (a missing exchange, a permission)
ends its channel and with it all that was under way there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, Final

from pika import exceptions

from outbox import wire
from outbox._outgoing import Outgoing
from outbox.errors import EncodingError, MessageTooLarge, OutboxError, Refused, Unavailable
from outbox.transport import Outcome
from outbox.transports import _rabbitmq_link as link_
from outbox.transports._rabbitmq_confirms import Call, Confirmed, scope, too_large
from outbox.transports._rabbitmq_link import ERRORS, FRAME_MAX, Link, Properties, connect
from outbox.transports._rabbitmq_settings import Settings
from outbox.transports._rabbitmq_topology import NAME_BYTES, refusal, require_exchange, wrong_name

PERSISTENT: Final = 2
GRACE: Final = 1.0
"""Seconds that a message may still be confirmed after the broker has said that it takes no more."""
CHANNELS: Final = 200
"""Of topics, open at the same time; idle ones make room."""
HEADERS_BYTES: Final = FRAME_MAX - 4096
"""Of all headers of a message, which have to fit into one frame beside the properties."""


class Publisher:
    """All publishing of one transport. Belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._link: Link | None = None
        self._connecting = asyncio.Lock()
        self._opening: dict[str, asyncio.Lock] = {}
        self._channels: dict[str, Confirmed] = {}
        self._retired: list[Confirmed] = []
        """Not used any more, open for what is under way on them."""
        self._limit = settings.max_message_bytes
        self._under_way: set[Call] = set()
        self._to_connect: asyncio.Task[Link] | None = None
        self._closed = False
        self._aborted = False

    async def publish(self, batch: Sequence[Outgoing]) -> list[Outcome]:
        call = Call.of(batch)
        ready = self._encode(call)
        if ready:
            self._under_way.add(call)
            try:
                async with asyncio.timeout(self._settings.delivery_timeout):
                    await self._send(call, ready)
                    if call.left:
                        await call.done.wait()
            except TimeoutError:
                await self._give_up(call)
            finally:
                self._under_way.discard(call)
        return [outcome if outcome is not None else _unknown() for outcome in call.outcomes]

    # ---- what is sent

    def _encode(self, call: Call) -> dict[str, list[tuple[int, str, bytes, Any]]]:
        """By topic, in order: what can be refused is refused before anything is sent."""
        ready: dict[str, list[tuple[int, str, bytes, Any]]] = {}
        limit, routing_key_of = self._limit, self._settings.routing_key_of
        for at, message in enumerate(call.messages):
            topic, type, content_type = message.topic, message.type, message.content_type
            body = message.payload or b""
            try:
                table = wire.as_text(message)
                routing_key = routing_key_of(topic, message.key, type)
                if len(body) > limit:
                    call.settle(at, too_large(message, limit))
                    continue
                if message.headers or len(routing_key) > 60:
                    _check(message, table, routing_key)
            except (EncodingError, OutboxError, UnicodeError, ValueError) as error:
                call.settle(at, _rejected(message, error))
                continue
            properties = Properties(
                content_type=content_type if content_type is None or len(content_type) < 60 else None,
                headers=table,
                delivery_mode=PERSISTENT,
                message_id=message.id,
                type=type if type is None or len(type) < 60 else None,
            )
            entry = (at, routing_key, body, properties)
            if topic in ready:
                ready[topic].append(entry)
            else:
                ready[topic] = [entry]
        return ready

    async def _send(self, call: Call, ready: dict[str, list[tuple[int, str, bytes, Any]]]) -> None:
        try:
            link = await self._connected()
            if link.blocked is not None:
                raise _blocked(link)
        except OutboxError as error:
            outcome = Outcome.unavailable(str(error), error)
            for entries in ready.values():
                _settle(call, entries, outcome)
            return
        for topic, entries in ready.items():
            try:
                confirmed = await self._channel(topic)
            except Refused as error:
                _settle(call, entries, Outcome.reject(str(error), error))
            except OutboxError as error:
                _settle(call, entries, Outcome.unavailable(str(error), error, scope(link.is_open)))
            else:
                self._write(call, topic, entries, confirmed)

    def _write(self, call: Call, topic: str, entries: list[tuple[int, str, bytes, Any]], confirmed: Confirmed) -> None:
        exchange = self._settings.exchange_of(topic)
        publish = confirmed.publish
        for number, (at, routing_key, body, properties) in enumerate(entries):
            try:
                publish(exchange, routing_key, body, properties, (call, at))
            except (exceptions.ShortStringTooLong, exceptions.UnsupportedAMQPFieldException) as error:
                call.settle(at, _rejected(call.messages[at], error))
            except exceptions.AMQPError as error:
                mapped = link_.unavailable(error, "the connection was lost")
                _settle(call, entries[number:], Outcome.unavailable(str(mapped), mapped))
                return

    # ---- through what

    async def _connected(self) -> Link:
        """Raises `OutboxError`."""
        async with self._connecting:
            if self._closed:
                raise Unavailable("rabbitmq: this transport is closed")
            if self._link is None or not self._link.is_open:
                self._channels.clear()
                self._retired.clear()
                connecting = self._to_connect = asyncio.create_task(connect(self._settings, "publishing"))
                try:
                    self._link = await connecting
                except asyncio.CancelledError:
                    if connecting.cancelled() and self._aborted:
                        raise Unavailable("rabbitmq: this transport is closed") from None
                    connecting.cancel()
                    raise
                self._link.on_blocked = self._on_blocked
            return self._link

    async def _channel(self, topic: str) -> Confirmed:
        """The topic's channel. Raises `OutboxError`, `Refused` where no topic can be called so."""
        found = self._channels.get(topic)
        if found is not None and found.usable:
            return found
        async with self._opening.setdefault(topic, asyncio.Lock()):
            try:
                found = self._channels.get(topic)
                if found is None or not found.usable:
                    found = await self._open_channel(topic)
                return found
            finally:
                self._opening.pop(topic, None)

    async def _open_channel(self, topic: str) -> Confirmed:
        exchange = self._settings.exchange_of(topic)
        wrong = wrong_name(exchange)
        if wrong is not None:
            raise Refused(f"rabbitmq: {topic!r} can be no topic: the exchange's name {wrong}")
        link = await self._connected()
        try:
            await require_exchange(link, topic)
            await self._make_room(topic)
            found = self._channels[topic] = await Confirmed.open(link)
            found.on_limit = self._learn_limit
        except ERRORS as error:
            raise refusal(error, f"topic {topic!r} cannot be written to") from error
        return found

    def _learn_limit(self, limit: int) -> None:
        self._limit = min(self._limit, limit)

    async def _make_room(self, topic: str) -> None:
        """Close what the topic's new channel takes the place of, and one that is idle where there are many."""
        old = self._channels.pop(topic, None)
        if old is not None and old.channel.is_open:
            self._retired.append(old)
        if len(self._channels) >= CHANNELS:
            idle = next((name for name, confirmed in self._channels.items() if not confirmed.waiting), None)
            if idle is not None:
                self._retired.append(self._channels.pop(idle))
        done = [confirmed for confirmed in self._retired if not confirmed.waiting]
        self._retired = [confirmed for confirmed in self._retired if confirmed.waiting]
        for confirmed in done:
            await confirmed.channel.close()

    # ---- when there is no answer

    def _on_blocked(self) -> None:
        asyncio.get_running_loop().call_later(GRACE, self._still_blocked)

    def _still_blocked(self) -> None:
        link = self._link
        if link is None or link.blocked is None:
            return
        error = _blocked(link)
        outcome = Outcome.unavailable(str(error), error)
        for call in list(self._under_way):
            _settle(call, ((at,) for at, known in enumerate(call.outcomes) if known is None), outcome)

    async def _give_up(self, call: Call) -> None:
        """Time is up. If the broker answers otherwise, it is the topics; else it is the connection."""
        seconds = f"within {self._settings.delivery_timeout:g} s"
        topics = {call.messages[at].topic for at, known in enumerate(call.outcomes) if known is None}
        link = self._link
        answers = link is not None and link.is_open and link.blocked is None
        for topic in topics:
            confirmed = self._channels.get(topic)
            if answers and confirmed is not None:
                del self._channels[topic]
                answers = await confirmed.channel.close()
        if not answers and link is not None and link.blocked is None:
            link.hang_up()
        said = " (have its queues lost their quorum?)" if answers else ""
        for at, known in enumerate(call.outcomes):
            if known is None:
                topic = call.messages[at].topic
                error = Unavailable(f"rabbitmq: topic {topic!r}: not confirmed {seconds}{said}")
                call.settle(at, Outcome.unavailable(str(error), error, scope(answers)))

    async def close(self, *, abort: bool) -> None:
        self._closed = True
        if not abort and self._under_way:
            waiting = [asyncio.create_task(call.done.wait()) for call in self._under_way]
            await asyncio.wait(waiting, timeout=self._settings.delivery_timeout)
            for task in waiting:
                task.cancel()
        self._aborted = True
        if self._to_connect is not None:
            self._to_connect.cancel()
        if self._link is not None:
            await (self._link.abort() if abort else self._link.close())


def _settle(call: Call, entries: Iterable[tuple[Any, ...]], outcome: Outcome) -> None:
    for at, *_ in entries:
        call.settle(at, outcome)


def _check(message: Outgoing, table: dict[str, str], routing_key: str) -> None:
    """What AMQP cannot carry."""
    size = 0
    for name, value in table.items():
        raw = len(name.encode())
        if not 0 < raw <= NAME_BYTES:
            raise Refused(f"a header's name has {raw} bytes; AMQP has room for 1 to {NAME_BYTES}")
        size += raw + len(value.encode()) + 6
    if size > HEADERS_BYTES:
        raise MessageTooLarge(
            f"rabbitmq: message {message.id} for {message.topic!r} has {size} bytes of headers, which have to fit into "
            f"one frame: {HEADERS_BYTES}"
        )
    if len(routing_key.encode()) > NAME_BYTES:
        raise Refused(f"its routing key is longer than {NAME_BYTES} bytes")


def _rejected(message: Outgoing, error: BaseException) -> Outcome:
    if not isinstance(error, MessageTooLarge):
        refused = Refused(f"rabbitmq: message {message.id} for {message.topic!r} cannot be sent: {error}")
        refused.__cause__ = error
        error = refused
    return Outcome.reject(str(error), error)


def _blocked(link: Link) -> Unavailable:
    return Unavailable(
        f"rabbitmq: {link.server} takes no messages at the moment ({link.blocked}); it goes on by itself when it has "
        "memory and disk space again"
    )


def _unknown() -> Outcome:
    error = Unavailable("rabbitmq: not confirmed")
    return Outcome.unavailable(str(error), error)
