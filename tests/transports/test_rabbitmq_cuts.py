"""The RabbitMQ transport while its connection is cut, at random bytes and at the broker's word on its way back: what goes in
and what comes out is counted. 15 cuts a test, 200 with OUTBOX_TEST_LONG=1."""

from __future__ import annotations

import os
import random

import pytest

from outbox.errors import Unavailable
from outbox.testing.conformance import ids
from outbox.transport import Delivery
from tests.transports.cuts import Direction, Plan, cutting
from tests.transports.rabbitmq_tools import Open, know, read_all
from tests.transports.relaying import Rounds, first_deliveries, in_order

CUTS = 200 if os.environ.get("OUTBOX_TEST_LONG") else 15
KEYS = 50
ANY_ACK = bytes.fromhex("003c0050")


def anywhere(source: random.Random) -> tuple[Direction, int | bytes]:
    """Now and then within the handshake, mostly among messages."""
    most = source.choice([600, 20_000, 150_000])
    return source.choice(["up", "down"]), source.randint(1, most if most < 100_000 else 60_000)


def among_deliveries(source: random.Random) -> tuple[Direction, int | bytes]:
    """The same for a consumer, which says less and hears more."""
    direction: Direction = source.choice(["up", "down"])
    most = source.choice([600, 2500] if direction == "up" else [600, 60_000])
    return direction, source.randint(1, most)


def at_a_confirm(_: random.Random) -> tuple[Direction, int | bytes]:
    return "down", ANY_ACK


def at_an_acknowledgement(_: random.Random) -> tuple[Direction, int | bytes]:
    return "up", ANY_ACK


@pytest.mark.timeout(900)
@pytest.mark.parametrize("plan", [anywhere, at_a_confirm], ids=lambda plan: plan.__name__)
async def test_publishing_through_cuts_loses_nothing_and_turns_no_key_around(
    rabbits: Open, rabbitmq_url: str, name: str, plan: Plan
) -> None:
    direct = rabbits(rabbitmq_url)
    await know(direct, name, "billing")
    async with cutting(rabbitmq_url, plan, seed=7, cuts=CUTS) as cuts:
        rounds = Rounds(rabbits(cuts.url, delivery_timeout_ms=5000), name, keys=KEYS)
        while cuts.done < CUTS or rounds.count < 2000:
            await rounds.send(500)
    found = await read_all(direct, name, "billing")
    print(f"{cuts.done} cuts, {rounds.count} in, {len(found)} out, {rounds.unavailable} unavailable")
    assert rounds.unavailable
    rounds.came(found)
    assert first_deliveries(found) == in_order(rounds.count, KEYS)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("plan", [among_deliveries, at_an_acknowledgement], ids=lambda plan: plan.__name__)
async def test_consuming_through_cuts_skips_nothing_and_turns_no_key_around(
    rabbits: Open, rabbitmq_url: str, name: str, plan: Plan, partitions: int
) -> None:
    direct = rabbits(rabbitmq_url, partitions=partitions)
    await know(direct, name, "billing")
    cuts_wanted = CUTS if plan is among_deliveries else CUTS // 3
    rounds, lost = Rounds(direct, name, keys=KEYS), 0
    found: list[Delivery] = []
    async with cutting(rabbitmq_url, plan, seed=11, cuts=cuts_wanted) as cuts:
        transport = rabbits(cuts.url, partitions=partitions, delivery_timeout_ms=5000)
        subscription = None
        while cuts.done < cuts_wanted or len(set(ids(found))) < rounds.count or not rounds.count:
            if len(set(ids(found))) == rounds.count:
                await rounds.send(1000)
            try:
                if subscription is None:
                    subscription = await transport.subscribe([name], "billing", window=60)
                batch = await subscription.fetch(40, 1)
                found += batch
                await subscription.ack(batch)
            except Unavailable:
                lost += 1
        assert subscription is not None
        await subscription.close()
    assert await read_all(direct, name, "billing") == []
    print(f"{cuts.done} cuts, {rounds.count} in, {len(found)} out, {lost} times unavailable")
    assert lost
    again = rounds.came(found)
    assert first_deliveries(found) == in_order(rounds.count, KEYS)
    redelivered = {id for id, times in again.items() if times > 1}
    last = {id: d for d, id in zip(found, ids(found), strict=True)}
    assert all(last[id].suspect for id in redelivered)
