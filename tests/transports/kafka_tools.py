"""Reading and administration for the tests against a real Kafka."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.structs import TopicPartition

from outbox.transport import Delivery, Transport
from outbox.transports.kafka import KafkaTransport
from tests.transports.tools import read

Open = Callable[..., KafkaTransport]


async def read_all(transport: Transport, topic: str) -> list[Delivery]:
    """Everything that is in the topic now. Not for topics with transactions, whose marks take offsets as well."""
    ends = await offsets(transport, topic)
    subscription = await transport.subscribe([topic], f"all-{uuid.uuid4().hex[:8]}", window=1_000_000)
    found = await read(subscription, lambda found: len(found) >= sum(ends.values()))
    await subscription.close()
    return found


async def offsets(transport: Transport, topic: str) -> dict[int, int]:
    """Where each partition ends."""
    from aiokafka import AIOKafkaConsumer

    assert isinstance(transport, KafkaTransport)
    consumer = AIOKafkaConsumer(**transport._settings.connection())
    await consumer.start()
    try:
        partitions = await consumer._client._wait_on_metadata(topic)
        ends = await consumer.end_offsets([TopicPartition(topic, partition) for partition in partitions])
        return {place.partition: end for place, end in ends.items()}
    finally:
        await consumer.stop()


async def with_admin(url: str, work: Callable[[AIOKafkaAdminClient], object]) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=url.removeprefix("kafka://"))
    await admin.start()
    try:
        await work(admin)  # type: ignore[misc]
    finally:
        await admin.close()


async def set_limit(url: str, topic: str, limit: int) -> None:
    resource = ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": str(limit)})
    await with_admin(url, lambda admin: admin.alter_configs([resource]))


async def gone(transport: KafkaTransport, topic: str) -> None:
    """Wait until the topic has been deleted."""
    for _ in range(400):
        if await transport.check([topic]):
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"{topic} is still there")
