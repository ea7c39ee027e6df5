"""The RabbitMQ transport on three nodes, of which the one that leads the queue is killed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest

from outbox.testing.conformance import ids, numbered
from tests.services import RABBITMQ
from tests.services.fixtures import or_skip
from tests.transports.rabbitmq_cluster import Cluster, cluster
from tests.transports.rabbitmq_tools import Open, know, read_all
from tests.transports.relaying import Sending, first_deliveries, in_order
from tests.transports.tools import read, until

KEYS = 100


@pytest.fixture(scope="module")
def three(pytestconfig: pytest.Config) -> Iterator[Cluster]:
    running = cluster()
    found: list[Cluster] = []

    def obtain() -> object:
        found.append(running.__enter__())
        return found[0].nodes[0]

    try:
        or_skip(pytestconfig, RABBITMQ, obtain)  # type: ignore[arg-type]
        yield found[0]
    finally:
        if found:
            running.__exit__(None, None, None)


@pytest.mark.timeout(300)
async def test_a_leader_that_is_killed_loses_nothing_and_turns_no_key_around(
    rabbits: Open, three: Cluster, name: str
) -> None:
    transport, reader = rabbits(three.url, delivery_timeout_ms=5000), rabbits(three.url, delivery_timeout_ms=5000)
    await know(transport, name, "billing")
    leader = await asyncio.to_thread(three.leader, f"{name}.billing")
    subscription = await reader.subscribe([name], "billing", window=100)
    count = 10_000
    sending = Sending(transport, numbered(name, count, keys=KEYS), batch=KEYS, calls=1)
    running = asyncio.create_task(sending.run(within=120))
    reading = asyncio.create_task(read(subscription, lambda found: len(set(ids(found))) >= count, within=150))
    await until(lambda: len(sending.sent) >= count // 4)
    await asyncio.to_thread(leader.kill)
    await running
    found = await reading
    await asyncio.to_thread(leader.restart)
    found += await read_all(rabbits(three.url), name, "billing")
    assert sending.unavailable, "it was killed when all was sent"
    assert Counter(ids(found)).keys() == {m.id for m in sending.sent}
    assert first_deliveries(found) == in_order(count, KEYS)
    twice = len(found) - count
    print(f"{count} in, {count} out, {twice} twice, {len(sending.unavailable)} unavailable, {max(sending.waves):.1f} s")
