"""A relay beside a test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from outbox.backoff import Backoff
from outbox.relay import Limits, Relay
from tests.relay.database import Database

QUICK = Limits(poll=0.01, attempts=3, backoff=Backoff(first=0.02, factor=1.5, most=0.1))


def relay(database: Database, transport: Any, /, **options: Any) -> Relay:
    options = {"limits": QUICK, "drain_timeout": 5.0} | options
    return Relay(database.outbox, database=options.pop("database", database.url), transport=transport, **options)


@asynccontextmanager
async def running(found: Relay) -> AsyncIterator[Relay]:
    """Run it until the end of the block, then stop it as SIGTERM does. Its errors are raised here."""
    stop = asyncio.Event()
    task = asyncio.create_task(found.arun(stop))
    try:
        yield found
    finally:
        stop.set()
        await asyncio.wait_for(task, 30)


async def eventually(condition: Callable[[], Any], timeout: float = 20.0) -> None:
    """Return once ``condition`` holds; fail after ``timeout`` seconds without."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.005)
