"""The SQS transport while its connections are cut, at random bytes and at the service's word on its way back: what goes in
and what comes out is counted. 5 cuts a test, 200 with OUTBOX_TEST_LONG=1."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from outbox.errors import Unavailable
from outbox.testing.conformance import ids
from outbox.transport import Delivery, Subscription, Transport
from tests.services import Server
from tests.transports.cuts import Cuts, Direction, Plan, cutting
from tests.transports.relaying import Rounds, first_deliveries, in_order
from tests.transports.sqs_tools import LONG, STANDARD_OR_FIFO, Open, endpoint, read_all
from tests.transports.tools import read

CUTS = 200 if LONG else 5
KEYS = 50


def anywhere(source: random.Random) -> tuple[Direction, int | bytes]:
    return source.choice(["up", "down"]), source.randint(1, source.choice([600, 8000, 40_000]))


def among_deliveries(source: random.Random) -> tuple[Direction, int | bytes]:
    """A consumer says less and hears more."""
    direction: Direction = source.choice(["up", "down"])
    return direction, source.randint(1, source.choice([600, 4000] if direction == "up" else [600, 20_000]))


def at_an_answer(_: random.Random) -> tuple[Direction, int | bytes]:
    """It is stored, or deleted, and nobody hears of it."""
    return "down", b'"Successful"'


@asynccontextmanager
async def through_cuts(server: Server, plan: Plan, *, seed: int, cuts: int) -> AsyncIterator[tuple[Cuts, str]]:
    """The cuts, and the transport's URL through them."""
    where = endpoint(server.url)
    async with cutting(where, plan, seed=seed, cuts=cuts) as found:
        yield found, server.url.replace(where, found.url.replace("@", ""))


@pytest.mark.timeout(900)
@STANDARD_OR_FIFO
@pytest.mark.parametrize("plan", [anywhere, at_an_answer], ids=lambda plan: plan.__name__)
async def test_publishing_through_cuts_loses_nothing_and_a_fifo_queue_has_all_once_in_order(
    queues: Open, elasticmq: Server, topic_name: str, plan: Plan, fifo: str
) -> None:
    subscription = await queues(elasticmq, fifo=fifo).subscribe([topic_name], "billing", window=1000)
    found: list[Delivery] = []
    async with through_cuts(elasticmq, plan, seed=7, cuts=CUTS) as (cuts, url):
        transport = queues(url, fifo=fifo, delivery_timeout_ms=5000)
        rounds = Rounds(transport, topic_name, keys=KEYS)
        while cuts.done < CUTS or rounds.count < 500:
            await rounds.send(250)
            await _read_up_to(subscription, found, rounds.count)
        await transport.close()
    found += await read_all(subscription)
    print(f"{cuts.done} cuts, {rounds.count} in, {len(found)} out, {rounds.unavailable} unavailable")
    assert rounds.unavailable
    rounds.came(found)
    if fifo == "yes":
        assert first_deliveries(found) == in_order(rounds.count, KEYS)
        assert len(found) == rounds.count


@pytest.mark.timeout(900)
@STANDARD_OR_FIFO
@pytest.mark.parametrize("plan", [among_deliveries, at_an_answer], ids=lambda plan: plan.__name__)
async def test_consuming_through_cuts_skips_nothing_and_turns_no_key_of_a_fifo_queue_around(
    queues: Open, elasticmq: Server, topic_name: str, plan: Plan, fifo: str
) -> None:
    direct = queues(elasticmq, fifo=fifo)
    await (await direct.subscribe([topic_name], "billing", window=1)).close()
    rounds, lost = Rounds(direct, topic_name, keys=KEYS), 0
    found: list[Delivery] = []
    async with through_cuts(elasticmq, plan, seed=11, cuts=CUTS) as (cuts, url):
        transport = queues(url, fifo=fifo, requests=4)
        subscription = await _joined(transport, topic_name)
        while cuts.done < CUTS or len(set(ids(found))) < rounds.count or not rounds.count:
            if len(set(ids(found))) == rounds.count:
                await rounds.send(200)
            try:
                batch = await subscription.fetch(40, 1.0)
            except Unavailable:
                lost += 1
                continue
            found += batch
            await subscription.ack(batch)
        await subscription.close()
    last = await direct.subscribe([topic_name], "billing", window=1000)
    found += await read_all(last)
    print(f"{cuts.done} cuts, {rounds.count} in, {len(found)} out, {lost} times unavailable")
    again = rounds.came(found)
    if fifo == "yes":
        assert first_deliveries(found) == in_order(rounds.count, KEYS)
    redelivered = {id for id, times in again.items() if times > 1}
    latest = {id: delivery for delivery, id in zip(found, ids(found), strict=True)}
    assert all(latest[id].suspect for id in redelivered)


async def _joined(transport: Transport, topic: str) -> Subscription:
    while True:
        try:
            return await transport.subscribe([topic], "billing", window=60)
        except Unavailable:
            continue


async def _read_up_to(subscription: Subscription, found: list[Delivery], count: int) -> None:
    """Until ``found`` has that many different messages."""
    known = set(ids(found))
    found += await read(subscription, lambda more: len(known | set(ids(more))) >= count)
