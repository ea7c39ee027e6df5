"""aiobotocore as well as one can use it: batches of ten, sixteen requests at the same time."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import parse_qs, urlsplit

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession

REQUESTS = 16
AT_ONCE = 10


def _client(url: str) -> AbstractAsyncContextManager[Any]:
    parts = urlsplit(url)
    client: AbstractAsyncContextManager[Any] = AioSession().create_client(
        "sqs",
        region_name=parts.hostname,
        endpoint_url=parse_qs(parts.query)["endpoint_url"][0],
        aws_access_key_id=parts.username,
        aws_secret_access_key=parts.password,
        config=AioConfig(max_pool_connections=REQUESTS, tcp_keepalive=True),
    )
    return client


async def _at_once(work: Callable[[], Awaitable[None]]) -> float:
    """Seconds that sixteen of these take together."""
    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(REQUESTS)))
    return time.perf_counter() - start


def _attribute(value: str) -> dict[str, str]:
    return {"DataType": "String", "StringValue": value}


async def publish(url: str, topic: str, rows: int) -> float:
    body, id = "x" * 300, str(uuid.uuid4())
    batches = iter(range(0, rows, AT_ONCE))
    async with _client(url) as client:
        queue = (await client.get_queue_url(QueueName=f"{topic}__benchmark"))["QueueUrl"]

        async def work() -> None:
            for first in batches:
                entries = [
                    {
                        "Id": str(number),
                        "MessageBody": body,
                        "MessageAttributes": {
                            "outbox-id": _attribute(id),
                            "outbox-type": _attribute("order.placed"),
                            "outbox-key": _attribute(f"k{number % 1000}"),
                            "content-type": _attribute("application/json"),
                        },
                    }
                    for number in range(first, min(first + AT_ONCE, rows))
                ]
                answer = await client.send_message_batch(QueueUrl=queue, Entries=entries)
                if len(answer["Successful"]) != len(entries):
                    raise RuntimeError(f"{answer['Failed'][0]}")

        return rows / await _at_once(work)


async def consume(url: str, topic: str, rows: int) -> float:
    count, done = 0, asyncio.Event()
    async with _client(url) as client:
        queue = (await client.get_queue_url(QueueName=f"{topic}__benchmark"))["QueueUrl"]

        async def work() -> None:
            nonlocal count
            while count < rows:
                answer = await client.receive_message(
                    QueueUrl=queue,
                    MaxNumberOfMessages=AT_ONCE,
                    WaitTimeSeconds=1,
                    AttributeNames=["All"],
                    MessageAttributeNames=["All"],
                )
                found = answer.get("Messages", ())
                if found:
                    entries = [{"Id": str(at), "ReceiptHandle": one["ReceiptHandle"]} for at, one in enumerate(found)]
                    answer = await client.delete_message_batch(QueueUrl=queue, Entries=entries)
                    count += len(answer["Successful"])  # read after the await: others count as well
                    if count >= rows:
                        done.set()

        start = time.perf_counter()
        tasks = [asyncio.create_task(work()) for _ in range(REQUESTS)]
        await done.wait()
        took = time.perf_counter() - start  # without the polls that wait for more
        await asyncio.gather(*tasks)
        return rows / took
