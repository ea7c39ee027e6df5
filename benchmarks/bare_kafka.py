"""aiokafka as well as one can use it: batches built by hand and sent whole; records taken by the hundred."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

PARTITIONS = 6
BATCH = 2000


async def publish(broker: str, topic: str, keys: int, rows: int) -> float:
    """Messages a second: the client as well as one can use it, from memory, four batches in flight."""
    producer = AIOKafkaProducer(
        bootstrap_servers=broker.removeprefix("kafka://"), enable_idempotence=True, acks="all", max_batch_size=1 << 18
    )
    await producer.start()
    try:
        await producer.partitions_for(topic)
        headers = [
            ("outbox-id", str(uuid.uuid4()).encode()),
            ("outbox-type", b"order.placed"),
            ("content-type", b"application/json"),
        ]
        value, names = b"x" * 300, [f"k{n}".encode() for n in range(keys)]
        start = time.perf_counter()
        in_flight: list[Sequence[asyncio.Future[object]]] = []
        for at in range(0, rows, BATCH):
            futures = []
            builders = {p: producer.create_batch() for p in range(PARTITIONS)}
            for n in range(at, min(rows, at + BATCH)):
                place = n % keys % PARTITIONS
                if builders[place].append(key=names[n % keys], value=value, timestamp=None, headers=headers) is None:
                    builders[place].close()
                    futures.append(await producer.send_batch(builders[place], topic, partition=place))
                    builders[place] = producer.create_batch()
                    builders[place].append(key=names[n % keys], value=value, timestamp=None, headers=headers)
            for place, builder in builders.items():
                builder.close()
                futures.append(await producer.send_batch(builder, topic, partition=place))
            in_flight.append(futures)
            if len(in_flight) >= 4:
                await asyncio.gather(*in_flight.pop(0))
        for futures in in_flight:
            await asyncio.gather(*futures)
        return rows / (time.perf_counter() - start)
    finally:
        await producer.stop()


async def consume(broker: str, topic: str, rows: int) -> float:
    """Messages a second, from the first record to the commit of the last."""
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=broker.removeprefix("kafka://"),
        group_id=f"bare-{uuid.uuid4().hex[:8]}",
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    await consumer.start()
    try:
        await consumer.getone()
        await consumer.seek_to_beginning()
        start, count = time.perf_counter(), 0
        while count < rows:
            for records in (await consumer.getmany(timeout_ms=5000, max_records=500)).values():
                count += len(records)
            await consumer.commit()
        return count / (time.perf_counter() - start)
    finally:
        await consumer.stop()
