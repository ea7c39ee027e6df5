"""pika's asyncio connection as well as one can use it: confirms and acknowledgements in a rolling window."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import pika
from pika.adapters.asyncio_connection import AsyncioConnection

WINDOW = 1000
ACK_EVERY = 250


async def _channel(url: str) -> tuple[Any, Any]:
    opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    connection = AsyncioConnection(
        pika.URLParameters(url),
        on_open_callback=lambda it: it.channel(on_open_callback=opened.set_result),
        on_open_error_callback=lambda _, error: opened.set_exception(error),
    )
    return connection, await opened


async def _closed(connection: Any) -> None:
    closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    connection.add_on_close_callback(lambda *_: closed.set_result(None))
    connection.close()
    await closed


async def publish(url: str, topic: str, rows: int) -> float:
    connection, channel = await _channel(url)
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    confirmed = published = 0
    body, id = b"x" * 300, str(uuid.uuid4())

    def pump() -> None:
        nonlocal published
        while published < rows and published - confirmed < WINDOW:
            headers = {
                "outbox-id": id,
                "outbox-type": "order.placed",
                "outbox-key": f"k{published % 1000}",
                "content-type": "application/json",
            }
            properties = pika.BasicProperties(
                content_type="application/json", headers=headers, delivery_mode=2, message_id=id, type="order.placed"
            )
            channel.basic_publish(topic, "order.placed", body, properties, mandatory=True)
            published += 1

    waiting: set[int] = set()
    lowest = 1

    def on_confirm(found: Any) -> None:
        nonlocal confirmed, lowest
        if not isinstance(found.method, pika.spec.Basic.Ack):
            done.set_exception(RuntimeError("a message was not confirmed"))
            return
        tag = found.method.delivery_tag
        if found.method.multiple:
            confirmed += tag + 1 - lowest - sum(lowest <= single <= tag for single in waiting)
            waiting.difference_update(range(lowest, tag + 1))
            lowest = tag + 1
        else:
            confirmed += 1
            waiting.add(tag)
        if confirmed >= rows:
            done.set_result(None)
        elif published - confirmed <= WINDOW // 2:
            pump()

    ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    channel.confirm_delivery(on_confirm, callback=ready.set_result)
    await ready
    start = time.perf_counter()
    pump()
    await done
    took = time.perf_counter() - start
    await _closed(connection)
    return rows / took


async def consume(url: str, topic: str, rows: int) -> float:
    connection, channel = await _channel(url)
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    count = 0

    def on_message(_: Any, method: Any, __: Any, ___: bytes) -> None:
        nonlocal count
        count += 1
        if count % ACK_EVERY == 0 or count == rows:
            channel.basic_ack(method.delivery_tag, multiple=True)
        if count == rows:
            done.set_result(None)

    channel.basic_qos(prefetch_count=2 * WINDOW)
    start = time.perf_counter()
    channel.basic_consume(f"{topic}.benchmark", on_message)
    await done
    took = time.perf_counter() - start
    await _closed(connection)
    return rows / took
