"""Publishing with confirmation and consuming with acknowledgement through each transport, beside the bare client used as
well as one can, in the same run: 300-byte payloads, 1,000 keys, of which no two messages are under way together.

A transport joins with one more `Subject`: its server, and the two rates of its bare client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from benchmarks import bare_kafka, bare_rabbitmq, bare_sqs
from benchmarks.figures import Report
from benchmarks.servers import kafka, local, memory, rabbitmq, sqs
from outbox._message import bucket_of, new_id
from outbox._outgoing import Outgoing
from outbox.transport import SENT, Transport
from outbox.transports import open_transport

KEYS = 1000
PAYLOAD = b"x" * 300
GROUP = "benchmark"

Rate = Callable[[str, str, int], Awaitable[float]]
"""Messages a second, of the broker's URL, a topic and a number of messages."""


@dataclass(frozen=True)
class Subject:
    name: str
    serve: Callable[[], AbstractContextManager[str]]
    """Starts the server for as long as the context is open; gives the transport's URL."""
    rows: int
    reference: str | None = None
    """The bare client's name; None where there is none beside ours."""
    bare_publish: Rate | None = None
    """To a topic that is declared, and whose group is known."""
    bare_consume: Rate | None = None
    batch: int = 500
    calls: int = 2
    """Of `publish`, under way together."""
    window: int = 2000


SUBJECTS = (
    Subject(
        "kafka",
        kafka,
        200_000,
        "aiokafka",
        lambda url, topic, rows: bare_kafka.publish(url, topic, KEYS, rows),
        bare_kafka.consume,
        batch=2000,
        calls=4,
    ),
    Subject("rabbitmq", rabbitmq, 60_000, "pika", bare_rabbitmq.publish, bare_rabbitmq.consume),
    Subject("sqs", sqs, 10_000, "aiobotocore", bare_sqs.publish, bare_sqs.consume),
    Subject("local", local, 100_000),
    Subject("memory", memory, 300_000, batch=2000),
)


def messages(topic: str, rows: int) -> list[Outgoing]:
    found = []
    for number in range(rows):
        id, key = new_id(), f"k{number % KEYS}"
        found.append(
            Outgoing(number, str(id), topic, key, "order.placed", PAYLOAD, "application/json", None, bucket_of(key, id))
        )
    return found


async def publish(transport: Transport, rows: Sequence[Outgoing], *, batch: int, calls: int) -> float:
    """Messages a second, until the last is confirmed."""
    batches = iter([rows[at : at + batch] for at in range(0, len(rows), batch)])

    async def work() -> None:
        for part in batches:
            outcomes = await transport.publish(part)
            if outcomes.count(SENT) != len(part):
                raise RuntimeError(next(outcome for outcome in outcomes if outcome is not SENT).reason)

    await transport.publish(rows[:1])  # connected
    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(calls)))
    return len(rows) / (time.perf_counter() - start)


async def consume(transport: Transport, topic: str, rows: int, *, window: int) -> float:
    """Messages a second, from the first fetch to the last acknowledgement; a close may wait for polls."""
    subscription = await transport.subscribe([topic], GROUP, window=window)
    count, start = 0, time.perf_counter()
    while count < rows:
        found = await subscription.fetch(500, 5.0)
        if not found:
            raise RuntimeError(f"only {count} of {rows} messages came")
        count += len(found)
        await subscription.ack(found)
    took = time.perf_counter() - start
    await subscription.close()
    return count / took


async def measure(subject: Subject, url: str, topic: str, rows: int) -> tuple[float, float, float, float]:
    """Publish and consume, bare (0 where there is nothing bare) and ours."""
    transport = open_transport(url)
    try:
        await transport.declare([topic], partitions=bare_kafka.PARTITIONS)
        await (await transport.subscribe([topic], GROUP, window=1)).close()
        stored = messages(topic, rows)
        bare_out = await subject.bare_publish(url, topic, rows) if subject.bare_publish is not None else 0.0
        bare_in = await subject.bare_consume(url, topic, rows) if subject.bare_consume is not None else 0.0
        out = await publish(transport, stored, batch=subject.batch, calls=subject.calls)
        into = await consume(transport, topic, rows, window=subject.window)
        return bare_out, bare_in, out, into
    finally:
        await transport.close()


def run(report: Report, *, repeat: int, scale: float) -> None:
    for subject in SUBJECTS:
        with subject.serve() as url:
            found = [
                asyncio.run(measure(subject, url, f"benchmark-{number}", int(subject.rows * scale)))
                for number in range(repeat)
            ]
        name = f"transports.{subject.name}"
        for at, what in enumerate(("publish", "consume")):
            bare, ours = [figures[at] for figures in found], [figures[at + 2] for figures in found]
            if subject.reference is None:
                report.figure(f"{name}.{what}", ours, "msg/s")
                continue
            report.figure(f"{name}.bare.{what}", bare, "msg/s")
            ratios = [our / other for our, other in zip(ours, bare, strict=True)]
            report.figure(f"{name}.{what}", ours, "msg/s", reference=subject.reference, ratios=ratios)
