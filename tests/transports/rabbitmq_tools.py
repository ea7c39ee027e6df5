"""Reading, waiting and administration for the tests against a real RabbitMQ."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pika

from outbox.errors import Unavailable
from outbox.transport import Delivery, Subscription, Transport
from outbox.transports.rabbitmq import RabbitmqTransport

Open = Callable[..., RabbitmqTransport]
T = TypeVar("T")


async def until(condition: Callable[[], bool], within: float = 30) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "what should have happened has not"
        await asyncio.sleep(0.005)


async def know(transport: Transport, topic: str, group: str) -> None:
    """Have the group get what is sent to the topic from now on."""
    await transport.declare([topic])
    await (await transport.subscribe([topic], group, window=1)).close()


async def read(
    subscription: Subscription, enough: Callable[[list[Delivery]], bool], within: float = 40
) -> list[Delivery]:
    """Fetch and acknowledge until there is enough, whatever happens to the connection."""
    found: list[Delivery] = []
    deadline = time.monotonic() + within
    while not enough(found):
        assert time.monotonic() < deadline, f"{len(found)} messages came in {within} s"
        try:
            batch = await subscription.fetch(500, 0.5)
        except Unavailable:
            await asyncio.sleep(0.05)
            continue
        found += batch
        await subscription.ack(batch)
    return found


async def read_for_ever(subscription: Subscription, found: list[Delivery]) -> None:
    while True:
        batch = await subscription.fetch(500, 0.5)
        await subscription.ack(batch)
        found += batch


async def read_all(transport: Transport, topic: str, group: str, quiet: float = 1.0) -> list[Delivery]:
    """Everything that waits for the group."""
    subscription = await transport.subscribe([topic], group, window=1000)
    found: list[Delivery] = []
    last = time.monotonic()
    while time.monotonic() - last < quiet:
        batch = await subscription.fetch(500, 0.2)
        await subscription.ack(batch)
        found += batch
        if batch:
            last = time.monotonic()
    await subscription.close()
    return found


async def raw(url: str, work: Callable[[Any], T]) -> T:
    """Something that pika's blocking channel does, in a thread."""

    def run() -> T:
        connection = pika.BlockingConnection(pika.URLParameters(url))
        try:
            return work(connection.channel())
        finally:
            if connection.is_open:
                connection.close()

    return await asyncio.to_thread(run)


async def get(url: str, queue: str) -> tuple[Any, Any, bytes]:
    """The next message of a queue, as soon as there is one: method, properties, body."""
    deadline = time.monotonic() + 20
    while True:
        found = await raw(url, lambda channel: channel.basic_get(queue, auto_ack=True))
        if found[0] is not None:
            return found
        assert time.monotonic() < deadline, f"nothing came to {queue}"
        await asyncio.sleep(0.05)


@asynccontextmanager
async def peer(behave: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncIterator[str]:
    """The URL of something that is no broker."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await behave(reader, writer)
        except (OSError, asyncio.CancelledError, asyncio.IncompleteReadError):
            pass
        finally:
            tasks.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
