"""Partitions come and go: what is in flight is finished or dropped before they are given up."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outbox.backoff import Backoff
from outbox.consumer import Retries, runtime
from outbox.transports import open_transport
from tests.consumer.billing import Billing, OrderPlaced, charge, placed, running, until
from tests.consumer.wrapped import WrappedTransport


async def revoke_everything(transport: WrappedTransport) -> None:
    assert transport.revoked is not None
    await transport.revoked(frozenset(("orders", partition) for partition in range(4)))


async def test_members_that_come_and_go_lose_nothing_and_double_nothing(billing: Billing) -> None:
    consumers = []
    for _ in range(3):
        consumer = billing.consumer()
        consumer.on(OrderPlaced)(charge)
        consumers.append(consumer)
    first, second, third = consumers
    async with running(first):
        await billing.publish(*(placed(number, key=str(number % 20)) for number in range(100)))
        async with running(second):
            await billing.publish(*(placed(number, key=str(number % 20)) for number in range(100, 200)))
            async with running(third):
                await billing.publish(*(placed(number, key=str(number % 20)) for number in range(200, 300)))
                await until(lambda: len(billing.charges()) >= 150)
            await until(lambda: len(billing.charges()) >= 250)
        await until(lambda: len(billing.charges()) >= 300)
    charges = billing.charges()
    assert sorted(charges) == list(range(300))
    for key in range(20):
        of_key = [number for number in charges if number % 20 == key]
        assert of_key == sorted(of_key)
    assert sum(consumer.state.counts.handled for consumer in consumers) == 300


async def test_a_handler_at_work_is_finished_and_acknowledged_before_its_partition_goes(
    sqlite_billing: Billing,
) -> None:
    billing = sqlite_billing
    transport = WrappedTransport(open_transport(billing.transport_url))
    consumer = billing.consumer(transport=transport, concurrency=1)
    begun, go_on = threading.Event(), threading.Event()

    @consumer.on(OrderPlaced)
    def slowly(event: OrderPlaced, session: Session) -> None:
        begun.set()
        assert go_on.wait(20)
        charge(event, session)

    async with running(consumer):
        await billing.publish(*(placed(number) for number in range(10)))
        await until(begun.is_set)
        revoking = asyncio.create_task(revoke_everything(transport))
        await until(lambda: consumer.state.in_memory == 1)  # the nine that had not begun are dropped
        assert not revoking.done()
        go_on.set()
        await asyncio.wait_for(revoking, 20)
        assert billing.charges() == [0]
        assert [delivery.offset for delivery in transport.acked] == [0]


async def test_a_message_that_waits_for_its_next_attempt_does_not_hold_up_a_rebalance(sqlite_billing: Billing) -> None:
    billing = sqlite_billing
    transport = WrappedTransport(open_transport(billing.transport_url))
    consumer = billing.consumer(transport=transport, retries=Retries(backoff=Backoff(first=600, most=600)))

    @consumer.on(OrderPlaced)
    def fail(event: OrderPlaced) -> None:
        raise ValueError

    async with running(consumer):
        await billing.publish(placed(1))
        await until(lambda: consumer.state.counts.failed == 1)
        await asyncio.wait_for(revoke_everything(transport), 5)
        assert (consumer.state.in_memory, transport.acked) == (0, [])


async def test_an_async_handler_that_does_not_end_is_cancelled_and_rolled_back(
    sqlite_billing: Billing, monkeypatch: Any
) -> None:
    monkeypatch.setattr(runtime, "LET_GO", 0.1)
    billing = sqlite_billing
    transport = WrappedTransport(open_transport(billing.transport_url))
    consumer = billing.consumer(transport=transport)
    begun = asyncio.Event()

    @consumer.on(OrderPlaced)
    async def never_ends(event: OrderPlaced, session: AsyncSession) -> None:
        charge(event, session.sync_session)
        begun.set()
        await asyncio.Event().wait()

    async with running(consumer):
        await billing.publish(placed(1))
        await asyncio.wait_for(begun.wait(), 20)
        await asyncio.wait_for(revoke_everything(transport), 5)
        assert (consumer.state.in_memory, transport.acked, billing.charges()) == (0, [], [])
        assert billing.rows("attempt") == []  # it was interrupted, it did not fail
