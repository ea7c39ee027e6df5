"""Dead letters handed back to the consumer that gave them up: once, in order, whatever is killed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outbox import Consumer, Message
from outbox.consumer import Retries
from outbox.dead_letters.record import now
from outbox.dialects import clock
from outbox.transports import open_transport
from tests.consumer.billing import QUICKLY, Billing, Charge, OrderPlaced, charge, placed, running, until, until_finished
from tests.consumer.conftest import ON_EACH
from tests.consumer.wrapped import WrappedTransport


def broken(billing: Billing, **options: Any) -> Consumer:
    consumer = billing.consumer(retries=1, **options)

    @consumer.on(OrderPlaced)
    def fail(event: OrderPlaced, session: Session) -> None:
        raise ValueError("not mended yet")

    return consumer


def mended(billing: Billing, **options: Any) -> Consumer:
    consumer = billing.consumer(**options)
    consumer.on(OrderPlaced)(charge)
    return consumer


async def give_up(billing: Billing, count: int, key: str | None = None) -> None:
    consumer = broken(billing)
    async with running(consumer):
        await billing.publish(*(placed(number, key=key or str(number)) for number in range(count)))
        await until_finished(consumer, count)
    assert len(billing.dead()) == count


async def test_a_replayed_dead_letter_has_its_effect_once(billing: Billing) -> None:
    await give_up(billing, 1)
    (letter,) = billing.dead()
    assert billing.letters.replay(letter.id, why="mended").count == 1
    (waiting,) = billing.rows("attempt")
    assert (waiting["state"], waiting["cycle"], waiting["payload"]) == ("replay", 1, letter.payload)
    assert [(row["outcome"], row["cycle"]) for row in billing.rows("inbox")] == [("dead", 1)]

    consumer = mended(billing)
    async with running(consumer):
        await until_finished(consumer, 1)
    assert billing.charges() == [0]
    assert billing.rows("attempt") == []
    assert [(row["outcome"], row["cycle"]) for row in billing.rows("inbox")] == [("done", 1)]
    assert [letter.state for letter in billing.dead()] == ["replayed"]
    assert (consumer.state.counts.replays, consumer.state.counts.handled) == (1, 1)


async def test_a_running_consumer_takes_a_replay_while_the_broker_is_away(billing: Billing) -> None:
    from outbox.errors import Unavailable

    await give_up(billing, 1)
    transport = WrappedTransport(open_transport(billing.transport_url))

    def away(step: str) -> None:
        raise Unavailable("no broker")

    transport.before = away
    consumer = mended(billing, transport=transport)
    async with consumer:
        await until(lambda: consumer.state.broker)
        billing.letters.replay(consumer="billing")
        await until(billing.charges)
    assert not consumer.state.subscribed.is_set()
    assert billing.charges() == [0]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_the_inbox_says_when_a_replay_was_handled(billing: Billing, kind: str) -> None:
    """Not when it was given up: its time counts for how long the inbox remembers it, and `trace` shows it."""
    await give_up(billing, 1)
    with billing.engine.begin() as connection:  # long ago
        connection.execute(sa.update(billing.tables.inbox).values(processed_at=clock(-3600)))
        began = now(connection)
    billing.letters.replay(consumer="billing")
    assert billing.rows("inbox")[0]["processed_at"] < began
    consumer = billing.consumer()

    @consumer.on(OrderPlaced)
    async def charge_async(event: OrderPlaced, session: AsyncSession) -> None:
        charge(event, session.sync_session)

    if kind == "sync":
        consumer = mended(billing)
    async with running(consumer):
        await until_finished(consumer, 1)
    (row,) = billing.rows("inbox")
    assert row["outcome"] == "done"
    with billing.engine.connect() as connection:
        assert began <= row["processed_at"] <= now(connection)


async def test_an_async_handler_takes_replays_too(billing: Billing) -> None:
    await give_up(billing, 2)
    billing.letters.replay(consumer="billing")
    consumer = billing.consumer()

    @consumer.on(OrderPlaced)
    async def charge_async(event: OrderPlaced, session: AsyncSession, message: Message) -> None:
        assert message.key == str(event.order_id)
        session.add(Charge(order_id=event.order_id))

    async with running(consumer):
        await until_finished(consumer, 2)
    assert sorted(billing.charges()) == [0, 1]


@ON_EACH
async def test_a_replay_that_fails_again_is_a_dead_letter_of_the_next_cycle(billing: Billing) -> None:
    await give_up(billing, 1)
    for cycle in (1, 2):
        billing.letters.replay(consumer="billing")
        consumer = broken(billing)
        async with running(consumer):
            await until_finished(consumer, 1)
        newest = max(billing.dead(), key=lambda letter: letter.cycle)
        assert (newest.cycle, newest.state, newest.attempts) == (cycle, "open", 1)
        assert newest.offset == 0
        assert billing.rows("attempt") == []
    assert [(letter.cycle, letter.state) for letter in sorted(billing.dead(), key=lambda letter: letter.cycle)] == [
        (0, "replayed"),
        (1, "replayed"),
        (2, "open"),
    ]
    billing.letters.replay(consumer="billing")
    consumer = mended(billing)
    async with running(consumer):
        await until_finished(consumer, 1)
    assert billing.charges() == [0]
    assert [(row["outcome"], row["cycle"]) for row in billing.rows("inbox")] == [("done", 3)]


async def test_a_replay_has_retries_of_its_own(billing: Billing) -> None:
    await give_up(billing, 1)
    billing.letters.replay(consumer="billing")
    consumer = billing.consumer(retries=Retries(attempts=3, backoff=QUICKLY))
    tries = 0

    @consumer.on(OrderPlaced)
    def fail_twice(event: OrderPlaced, session: Session) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise ValueError("not yet")
        charge(event, session)

    async with running(consumer):
        await until_finished(consumer, 1)
    assert (tries, billing.charges(), billing.rows("attempt")) == (3, [0], [])


@ON_EACH
async def test_replays_of_one_key_come_in_their_old_order(billing: Billing) -> None:
    await give_up(billing, 20, key="one")
    # of the first one the second life failed too, so its dead letter is the youngest
    first = min(billing.dead(), key=lambda letter: letter.offset or 0)
    billing.letters.replay(first.id)
    consumer = broken(billing)
    async with running(consumer):
        await until_finished(consumer, 1)

    assert billing.letters.replay(consumer="billing").count == 20
    consumer = mended(billing)
    async with running(consumer):
        await until_finished(consumer, 20)
    assert billing.charges() == list(range(20))


async def test_a_failing_replay_holds_up_the_replays_of_its_key_and_no_new_message(billing: Billing) -> None:
    await give_up(billing, 3, key="one")
    billing.letters.replay(consumer="billing")
    consumer = billing.consumer(retries=Retries(attempts=1000, backoff=QUICKLY))
    repaired = threading.Event()

    @consumer.on(OrderPlaced)
    def fail_at_first(event: OrderPlaced, session: Session) -> None:
        if event.order_id == 0 and not repaired.is_set():
            raise ValueError
        charge(event, session)

    async with running(consumer):
        await until(lambda: consumer.state.counts.failed >= 1)
        await billing.publish(placed(100, key="one"))
        await until(lambda: billing.charges() == [100])
        repaired.set()
        await until_finished(consumer, 4)
    assert billing.charges() == [100, 0, 1, 2]


@ON_EACH
async def test_two_processes_that_poll_do_not_handle_a_replay_twice(billing: Billing) -> None:
    await give_up(billing, 40)
    calls: list[int] = []
    consumers = []
    for _ in range(2):
        consumer = billing.consumer()

        @consumer.on(OrderPlaced)
        def count(event: OrderPlaced, session: Session) -> None:
            calls.append(event.order_id)
            charge(event, session)

        consumers.append(consumer)
    async with running(*consumers):
        billing.letters.replay(consumer="billing")
        await until(lambda: not billing.rows("attempt"))
    assert sorted(billing.charges()) == list(range(40))
    assert sorted(calls) == list(range(40))


async def test_a_message_that_is_done_meanwhile_is_not_replayed(billing: Billing) -> None:
    await give_up(billing, 1)
    billing.letters.replay(consumer="billing")
    inbox = billing.tables.inbox
    with billing.engine.begin() as connection:
        connection.execute(sa.update(inbox).values(outcome="done"))
    consumer = mended(billing)
    async with running(consumer):
        await until_finished(consumer, 1)
    assert (billing.charges(), billing.rows("attempt"), consumer.state.counts.skipped) == ([], [], 1)


async def test_a_dead_letter_that_outlived_the_inbox_is_replayed(billing: Billing) -> None:
    await give_up(billing, 1)
    with billing.engine.begin() as connection:
        connection.execute(sa.delete(billing.tables.inbox))
    billing.letters.replay(consumer="billing")
    consumer = mended(billing)
    async with running(consumer):
        await until_finished(consumer, 1)
    assert billing.charges() == [0]


@ON_EACH
async def test_a_late_redelivery_does_not_touch_a_replay_that_waits(billing: Billing) -> None:
    consumer = broken(billing)
    message = placed(0)
    async with running(consumer):
        await billing.publish(message)
        await until_finished(consumer, 1)
    billing.letters.replay(consumer="billing")
    with billing.engine.begin() as connection:
        future = sa.text("update outbox_attempt set next_attempt_at = '2999-01-01 00:00:00.000000'")
        connection.execute(future)
    consumer = mended(billing)
    async with running(consumer):
        await billing.publish(message)
        await until_finished(consumer, 1)
    assert (billing.charges(), consumer.state.counts.skipped) == ([], 1)
    assert [row["state"] for row in billing.rows("attempt")] == ["replay"]


@pytest.mark.parametrize("payload", [b"{", None])
async def test_undecodable_dead_letters_can_be_replayed_too(billing: Billing, payload: bytes | None) -> None:
    consumer = mended(billing)
    async with running(consumer):
        await billing.publish(placed(1, payload=payload))
        await until_finished(consumer, 1)
    billing.letters.replay(consumer="billing")
    consumer = billing.consumer()
    seen: list[Message] = []

    @consumer.on("orders")
    def take_anything(message: Message) -> None:
        seen.append(message)

    async with running(consumer):
        await until_finished(consumer, 1)
    assert [message.payload for message in seen] == [payload]
