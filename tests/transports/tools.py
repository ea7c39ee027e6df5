"""Reading and waiting, for the tests of every transport; and something else in a broker's place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from outbox.errors import Unavailable
from outbox.transport import Delivery, Subscription


async def until(condition: Callable[[], bool], within: float = 30) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "what should have happened has not"
        await asyncio.sleep(0.001)


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


@asynccontextmanager
async def peer(behave: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncIterator[str]:
    """``host:port`` of something that is no broker."""
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
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
