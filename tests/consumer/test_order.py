"""One key in order, keys side by side, and bounded memory."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outbox import Message
from outbox.backoff import Backoff
from outbox.consumer import Retries
from outbox.transports import open_transport
from tests.consumer.billing import QUICKLY, Billing, Charge, order_of, placed, running, until, until_finished
from tests.consumer.wrapped import WrappedTransport

KEYS = ("a", "b", "c", "d", "e")


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_messages_of_one_key_are_handled_in_order_and_one_at_a_time(billing: Billing, kind: str) -> None:
    consumer = billing.consumer(retries=Retries(attempts=10, backoff=QUICKLY))
    seen: list[tuple[str, int]] = []
    at_work: set[str] = set()
    failed: set[tuple[str, int]] = set()

    def begin(key: str, number: int) -> None:
        assert key not in at_work
        at_work.add(key)
        if number % 7 == 3 and (key, number) not in failed:
            failed.add((key, number))
            at_work.discard(key)
            raise ValueError("every seventh fails once")

    def end(key: str, number: int) -> None:
        seen.append((key, number))
        at_work.discard(key)

    if kind == "sync":

        @consumer.on("orders")
        def handle(event: dict[str, Any], message: Message, session: Session) -> None:
            begin(str(message.key), event["order_id"])
            session.add(Charge(order_id=event["order_id"]))
            end(str(message.key), event["order_id"])

    else:

        @consumer.on("orders")
        async def ahandle(event: dict[str, Any], message: Message, session: AsyncSession) -> None:
            begin(str(message.key), event["order_id"])
            session.add(Charge(order_id=event["order_id"]))
            await asyncio.sleep(0)
            end(str(message.key), event["order_id"])

    async with running(consumer):
        for number in range(30):
            await billing.publish(*(placed(number, key=key) for key in KEYS))
        await until_finished(consumer, 150)
    # what failed at its commit on SQLite (busy) is tried again: its last time counts
    for key in KEYS:
        assert list(dict.fromkeys(order_of(seen, key))) == list(range(30))
    assert len(billing.charges()) == 150
    assert len(failed) == 20


async def test_a_failing_message_holds_up_its_key_and_no_other(billing: Billing) -> None:
    consumer = billing.consumer(retries=Retries(attempts=50, backoff=QUICKLY))
    seen: list[tuple[str, int]] = []
    mended = threading.Event()

    @consumer.on("orders")
    def handle(event: dict[str, Any], message: Message) -> None:
        if message.key == "broken" and event["order_id"] == 0 and not mended.is_set():
            raise ValueError("not yet")
        seen.append((str(message.key), event["order_id"]))

    async with running(consumer):
        await billing.publish(*(placed(number, key=key) for number in range(5) for key in ("broken", "whole")))
        await until(lambda: len(order_of(seen, "whole")) == 5)
        assert order_of(seen, "broken") == []
        mended.set()
        await until_finished(consumer, 10)
    assert order_of(seen, "broken") == list(range(5))


async def test_after_a_dead_letter_its_key_goes_on(billing: Billing) -> None:
    consumer = billing.consumer(retries=2)
    seen: list[int] = []

    @consumer.on("orders")
    def handle(event: dict[str, Any]) -> None:
        if event["order_id"] == 1:
            raise ValueError("never")
        seen.append(event["order_id"])

    async with running(consumer):
        await billing.publish(*(placed(number, key="k") for number in range(4)))
        await until_finished(consumer, 4)
    assert seen == [0, 2, 3]


async def test_without_ordering_a_failing_message_holds_up_nothing(sqlite_billing: Billing) -> None:
    billing = sqlite_billing
    consumer = billing.consumer(ordering="none", retries=Retries(attempts=2, backoff=Backoff(first=600, most=600)))
    seen: list[int] = []

    @consumer.on("orders")
    def handle(event: dict[str, Any]) -> None:
        if event["order_id"] == 0:
            raise ValueError("in ten minutes")
        seen.append(event["order_id"])

    async with running(consumer):
        await billing.publish(*(placed(number, key="k") for number in range(5)))
        await until(lambda: len(seen) == 4)
    assert sorted(seen) == [1, 2, 3, 4]


async def test_no_more_handlers_work_at_once_than_were_asked_for(postgresql_billing: Billing) -> None:
    billing = postgresql_billing
    consumer = billing.consumer(concurrency=3)
    lock = threading.Lock()
    at_work = most = 0
    three = threading.Barrier(3, timeout=20)

    @consumer.on("orders")
    def handle(event: dict[str, Any]) -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        three.wait()  # so three must be there at once
        with lock:
            at_work -= 1

    async with running(consumer):
        await billing.publish(*(placed(number, key=str(number)) for number in range(30)))
        await until_finished(consumer, 30)
    assert most == 3


async def test_no_more_is_in_memory_than_the_window(sqlite_billing: Billing) -> None:
    billing = sqlite_billing
    transport = WrappedTransport(open_transport(billing.transport_url))
    transport.generous = True
    consumer = billing.consumer(window=20, transport=transport)
    go_on = threading.Event()
    in_memory = 0

    @consumer.on("orders")
    def handle(event: dict[str, Any]) -> None:
        nonlocal in_memory
        in_memory = max(in_memory, consumer.state.in_memory)
        assert go_on.wait(20)

    async with running(consumer):
        await billing.publish(*(placed(number, key=str(number % 50)) for number in range(500)))
        await until(lambda: transport.out == 20)
        go_on.set()
        await until_finished(consumer, 500)
    assert transport.most_out <= 20
    assert in_memory <= 20
    assert (transport.out, len(transport.acked)) == (0, 500)


async def test_every_delivery_is_acknowledged_once(billing: Billing) -> None:
    transport = WrappedTransport(open_transport(billing.transport_url))
    consumer = billing.consumer(transport=transport, retries=2)
    failed: set[int] = set()

    @consumer.on("orders")
    def handle(event: dict[str, Any]) -> None:
        if event["order_id"] % 5 == 0:
            failed.add(event["order_id"])
            raise ValueError

    async with running(consumer):
        await billing.publish(*(placed(number, key=str(number % 7)) for number in range(100)))
        await until_finished(consumer, 100)
        await until(lambda: transport.out == 0)
    places = [(d.topic, d.partition, d.offset) for d in transport.acked]
    assert len(places) == len(set(places)) == 100
    counts = consumer.state.counts
    assert (counts.received, counts.handled, counts.dead, counts.skipped) == (100, 80, 20, 0)
