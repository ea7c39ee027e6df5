"""Exchanges and queues: what topics and groups are in RabbitMQ, declared or looked for.

A topic is an exchange. A group has a queue for each topic it reads (with ``partitions``: several, behind a consistent-hash
exchange of its own), bound to the topic's exchange, and a queue for its dead letters. With ``queue = orders.billing``:

    orders ──#──▶ orders.billing ──reject──▶ orders.billing.dlq
    orders ──#──▶ orders.billing (x-consistent-hash by outbox-key) ──▶ orders.billing.0, orders.billing.1, …
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pika import exceptions

from outbox import wire
from outbox.errors import ConfigurationError, OutboxError, Unavailable
from outbox.transports import _rabbitmq_link as link_
from outbox.transports._rabbitmq_link import ERRORS, Link
from outbox.transports._rabbitmq_settings import Settings

NAME_BYTES = 255
"""The longest name and the longest routing key of AMQP 0-9-1."""
MEMBERS_EXPIRE = 600_000
"""Milliseconds after which a queue that nobody counts members with is gone."""


@dataclass(frozen=True, slots=True)
class GroupQueues:
    """A group's queues for one topic."""

    topic: str
    base: str
    queues: tuple[str, ...]
    dead_letters: str
    members: str
    """Holds nothing; its consumers are the group's members."""
    hungry: str
    """Holds nothing; its consumers are the members that no queue delivers to."""


def group_queues(settings: Settings, topic: str, group: str) -> GroupQueues:
    base = settings.queue_of(topic, group)
    parts = settings.partitions
    queues = (base,) if parts == 1 else tuple(f"{base}.{part}" for part in range(parts))
    found = GroupQueues(topic, base, queues, f"{base}.dlq", f"{base}.members", f"{base}.hungry")
    for name in (*found.queues, found.dead_letters, found.members, found.hungry):
        wrong = wrong_name(name)
        if wrong is not None:
            raise ConfigurationError(f"rabbitmq: group {group!r} of topic {topic!r}: the queue's name {wrong}")
    return found


def wrong_name(name: str) -> str | None:
    """Why no exchange or queue can be called so."""
    if not name:
        return "is empty"
    if len(name.encode()) > NAME_BYTES:
        return f"is longer than {NAME_BYTES} bytes"
    return None


async def exchange_exists(link: Link, exchange: str) -> bool:
    """Raises pika's errors where the broker cannot be asked or refuses to say."""
    return await _passively(link, lambda channel: channel.pika.exchange_declare, exchange)


async def queue_exists(link: Link, queue: str) -> bool:
    return await _passively(link, lambda channel: channel.pika.queue_declare, queue)


async def consumers(link: Link, queue: str) -> int:
    """How many consumers a queue has."""
    channel = await link.channel()
    found = await channel.call(channel.pika.queue_declare, queue, passive=True)
    await channel.close()
    return int(found.method.consumer_count)


async def _passively(link: Link, method: Any, name: str) -> bool:
    channel = await link.channel()
    try:
        await channel.call(method(channel), name, passive=True)
    except exceptions.ChannelClosedByBroker as error:
        if error.reply_code == link_.NOT_FOUND:
            return False
        raise
    await channel.close()
    return True


def missing(settings: Settings, topic: str) -> Unavailable:
    return Unavailable(
        f"rabbitmq: topic {topic!r}: there is no exchange {settings.exchange_of(topic)!r} in virtual host "
        f"{settings.vhost!r}; declare it (a durable exchange of type {settings.exchange_type}), or leave out auto_create=no "
        "and declare=no"
    )


async def require_exchange(link: Link, topic: str) -> None:
    """Make sure of the topic's exchange. Raises `Unavailable` where there is none and none may be made, and pika's errors."""
    settings = link.settings
    exchange = settings.exchange_of(topic)
    if await exchange_exists(link, exchange):
        return
    if not (settings.auto_create and settings.declare):
        raise missing(settings, topic)
    await _make_exchange(link, exchange)


async def _make_exchange(link: Link, exchange: str) -> None:
    channel = await link.channel()
    await channel.call(channel.pika.exchange_declare, exchange, link.settings.exchange_type, durable=True)
    await channel.close()


async def declare_exchange(link: Link, topic: str) -> None:
    """Make the topic's exchange if there is none. Raises `OutboxError`."""
    settings = link.settings
    exchange = settings.exchange_of(topic)
    wrong = wrong_name(exchange)
    if wrong is not None:
        raise ConfigurationError(f"rabbitmq: topic {topic!r}: the exchange's name {wrong}")
    try:
        if await exchange_exists(link, exchange):
            return
        if not settings.declare:
            raise missing(settings, topic)
        await _make_exchange(link, exchange)
    except ERRORS as error:
        raise refusal(error, f"topic {topic!r}: exchange {exchange!r} cannot be declared") from error


async def declare_group(link: Link, topic: str, group: str) -> GroupQueues:
    """Make the group's queues of a topic, and bind them, so far as they are missing. Raises `Unavailable`, also where there
    is no exchange and none may be made, and `ConfigurationError` where a queue exists and is another one than asked for."""
    settings = link.settings
    found = group_queues(settings, topic, group)
    exchange = settings.exchange_of(topic)
    try:
        await require_exchange(link, topic)
        await _same_partitions(link, found, group)
        if not settings.declare:
            for queue in found.queues:
                if not await queue_exists(link, queue):
                    raise Unavailable(f"rabbitmq: there is no queue {queue!r}, and declare=no forbids making it")
            return found
        await _declare_queue(link, found.dead_letters, {"x-queue-type": settings.queue_type})
        source = exchange
        if len(found.queues) > 1:
            source = found.base
            hashing = {"hash-header": wire.KEY}
            channel = await link.channel()
            await channel.call(
                channel.pika.exchange_declare, source, "x-consistent-hash", durable=True, arguments=hashing
            )
            await channel.close()
        # The last one first: where the first exists, all do.
        for queue in reversed(found.queues):
            await _declare_queue(link, queue, _arguments(settings, found))
            await _bind(link, queue, source, "1" if source != exchange else settings.binding)
        if source != exchange:
            channel = await link.channel()
            await channel.call(channel.pika.exchange_bind, source, exchange, settings.binding)
            await channel.close()
            if settings.single_active_consumer:
                for name in (found.members, found.hungry):
                    await _declare_queue(link, name, {"x-queue-type": "classic", "x-expires": MEMBERS_EXPIRE})
    except ERRORS as error:
        raise refusal(error, f"group {group!r} of topic {topic!r}: its queue {found.base!r} cannot be used") from error
    return found


def _arguments(settings: Settings, found: GroupQueues) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "x-queue-type": settings.queue_type,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": found.dead_letters,
    }
    if settings.single_active_consumer:
        arguments["x-single-active-consumer"] = True
    return arguments | _safe_dead_letters(settings)


async def declare_retry(link: Link, queue: str, after: float) -> str:
    """The queue in which messages of ``queue`` wait for at least ``after`` seconds. One for each of 1, 2, 4, … seconds,
    because a queue looks at the time of its first message only. Raises pika's errors."""
    seconds = 1
    while seconds < after:
        seconds *= 2
    name = f"{queue}.retry.{seconds * 1000}"
    arguments: dict[str, Any] = {
        "x-queue-type": link.settings.queue_type,
        "x-message-ttl": seconds * 1000,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": queue,
    }
    await _declare_queue(link, name, arguments | _safe_dead_letters(link.settings))
    return name


def _safe_dead_letters(settings: Settings) -> dict[str, Any]:
    """Without these two a queue sends its dead letters on without waiting for a confirm, and a crash may lose one."""
    if settings.queue_type != "quorum":
        return {}
    return {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}


async def _same_partitions(link: Link, found: GroupQueues, group: str) -> None:
    """A group that was made with another number of partitions has queues that nobody would read."""
    count = len(found.queues)
    other = (
        f"rabbitmq: group {group!r} of topic {found.topic!r} was made with another number of partitions than {count}: "
    )
    if await queue_exists(link, f"{found.base}.{count if count > 1 else 0}"):
        raise ConfigurationError(f"{other}there is a queue {found.base}.{count if count > 1 else 0}")
    if count > 1:
        if await queue_exists(link, found.base):
            raise ConfigurationError(f"{other}there is a queue {found.base}")
        if await queue_exists(link, found.queues[0]) and not await queue_exists(link, found.queues[-1]):
            raise ConfigurationError(f"{other}there is a queue {found.queues[0]}, and none {found.queues[-1]}")


async def _declare_queue(link: Link, queue: str, arguments: dict[str, Any]) -> None:
    channel = await link.channel()
    try:
        await channel.call(channel.pika.queue_declare, queue, durable=True, arguments=arguments)
    except exceptions.ChannelClosedByBroker as error:
        # Who may only read can use what others have made.
        if error.reply_code != link_.ACCESS_REFUSED or not await queue_exists(link, queue):
            raise
        return
    await channel.close()


async def _bind(link: Link, queue: str, source: str, binding: str) -> None:
    channel = await link.channel()
    try:
        await channel.call(channel.pika.queue_bind, queue, source, binding)
    except exceptions.ChannelClosedByBroker as error:
        if error.reply_code != link_.ACCESS_REFUSED:
            raise
        return  # the queue is there: so, whoever made it has bound it
    await channel.close()


def refusal(error: BaseException, what: str) -> OutboxError:
    """406 is a mistake that stays; all else may pass, a missing permission included."""
    said = link_.text(error)
    if link_.code(error) == link_.PRECONDITION_FAILED:
        mapped: OutboxError = ConfigurationError(
            f"rabbitmq: {what}: it exists and is another one ({said}); delete it, or make the URL's parameters fit it"
        )
    elif link_.code(error) == link_.COMMAND_INVALID and "x-consistent-hash" in said:
        mapped = ConfigurationError(
            f"rabbitmq: {what}: partitions= needs the broker's plugin rabbitmq_consistent_hash_exchange, which is not enabled"
        )
    elif link_.code(error) == link_.ACCESS_REFUSED:
        mapped = Unavailable(f"rabbitmq: {what}: this user lacks a permission ({said})")
    else:
        mapped = link_.unavailable(error, what)
    mapped.__cause__ = error
    return mapped
