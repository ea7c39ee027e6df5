"""Reading and administration for the tests against a real RabbitMQ."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pika

from outbox.transport import Delivery, Transport
from outbox.transports.rabbitmq import RabbitmqTransport

Open = Callable[..., RabbitmqTransport]
T = TypeVar("T")


async def know(transport: Transport, topic: str, group: str) -> None:
    """Have the group get what is sent to the topic from now on."""
    await transport.declare([topic])
    await (await transport.subscribe([topic], group, window=1)).close()


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
