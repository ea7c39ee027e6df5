"""What neighbours get wrong at the consumer (docs: what must happen instead), and what else can fail in a handler."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outbox import Drop, Retry
from outbox._message import new_id
from outbox.backoff import Backoff
from outbox.consumer import Retries
from tests.consumer.billing import QUICKLY, Billing, Charge, OrderPlaced, charge, placed, running, until, until_finished
from tests.consumer.conftest import ON_EACH


@pytest.mark.parametrize("payload", [b"\xff not JSON", b'{"order_id": "seven"}', b"", None])
async def test_an_undecodable_record_is_dead_lettered_with_its_raw_bytes_and_the_next_one_flows(
    billing: Billing, payload: bytes | None
) -> None:
    consumer = billing.consumer()
    consumer.on(OrderPlaced)(charge)
    id = new_id()
    async with running(consumer):
        await billing.publish(placed(1, payload=payload, id=id), placed(2))
        await until_finished(consumer, 2)
    assert billing.charges() == [2]
    (letter,) = billing.dead()
    assert (letter.reason, letter.payload, letter.attempts) == ("undeserializable", payload, 0)
    assert (letter.message_id, letter.key, letter.type, letter.topic) == (id, "same", "order.placed", "orders")
    assert letter.partition is not None
    assert letter.offset is not None
    assert billing.rows("attempt") == []

    async with running(consumer):  # the offset has moved
        await billing.publish(placed(3))
        await until_finished(consumer, 1)
    assert consumer.state.counts.received == 1


async def test_a_tombstone_goes_to_a_handler_that_takes_none(billing: Billing) -> None:
    consumer = billing.consumer()
    seen: list[object] = []

    @consumer.on(OrderPlaced)
    def see(event: OrderPlaced | None, session: Session) -> None:
        seen.append(event)

    async with running(consumer):
        await billing.publish(placed(1, payload=None))
        await until_finished(consumer, 1)
    assert seen == [None]


@ON_EACH
async def test_a_handler_that_always_fails_spends_its_attempts_and_is_dead_lettered(billing: Billing) -> None:
    consumer = billing.consumer(retries=Retries(attempts=4, backoff=QUICKLY))
    tries = []

    @consumer.on(OrderPlaced)
    def fail(event: OrderPlaced, session: Session) -> None:
        session.add(Charge(order_id=event.order_id))
        session.flush()
        if event.order_id == 1:
            tries.append([row["attempts"] for row in billing.rows("attempt")])
            raise ValueError(f"order {event.order_id} cannot be charged")

    async with running(consumer):
        await billing.publish(placed(1), placed(2))
        await until_finished(consumer, 2)
    # counted in the table, though each transaction was rolled back
    assert tries == [[], [1], [2], [3]]
    assert billing.charges() == [2]
    assert billing.rows("attempt") == []
    (letter,) = billing.dead()
    assert (letter.reason, letter.attempts, letter.cycle, letter.state) == ("retries-exhausted", 4, 0, "open")
    assert (letter.exception_type, letter.exception_message) == ("ValueError", "order 1 cannot be charged")
    assert "in fail" in str(letter.stack)
    assert letter.first_failed_at is not None
    assert letter.first_failed_at <= letter.dead_at
    outcomes = {row["message_id"]: (row["outcome"], row["cycle"]) for row in billing.rows("inbox")}
    assert outcomes[letter.message_id] == ("dead", 0)


@ON_EACH
async def test_a_dead_letter_that_is_delivered_late_again_is_skipped_and_not_doubled(billing: Billing) -> None:
    consumer = billing.consumer(retries=1)

    @consumer.on(OrderPlaced)
    def fail(event: OrderPlaced) -> None:
        raise ValueError

    id = new_id()
    async with running(consumer):
        await billing.publish(placed(1, id=id), placed(1, id=id))
        await until_finished(consumer, 2)
    assert len(billing.dead()) == 1
    assert (consumer.state.counts.dead, consumer.state.counts.skipped) == (1, 1)


async def test_a_message_that_is_done_never_becomes_a_dead_letter(billing: Billing) -> None:
    consumer = billing.consumer()
    consumer.on(OrderPlaced)(charge)
    id = new_id()
    async with running(consumer):
        await billing.publish(placed(1, id=id), placed(1, id=id, payload=b"garbled on its second way"))
        await until_finished(consumer, 2)
    assert (billing.charges(), billing.dead()) == ([1], [])
    assert consumer.state.counts.skipped == 1


async def test_no_handler_for_a_type_is_a_dead_letter_that_says_so(billing: Billing) -> None:
    consumer = billing.consumer()
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        await billing.publish(placed(1, type="order.cancelled"), placed(2, type=None), placed(3))
        await until_finished(consumer, 3)
    assert billing.charges() == [3]
    assert [(letter.reason, letter.type) for letter in billing.dead()] == [
        ("no-handler", "order.cancelled"),
        ("no-handler", None),
    ]
    assert "order.cancelled" in str(billing.dead(type="order.cancelled")[0].exception_message)


async def test_a_handler_of_a_topic_gets_the_types_that_have_none_of_their_own(billing: Billing) -> None:
    consumer = billing.consumer()
    seen: list[tuple[str, Any]] = []

    @consumer.on("orders", type="order.placed")
    def its_own(event: dict[str, Any]) -> None:
        seen.append(("own", event["order_id"]))

    @consumer.on("orders")
    def others(event: Any) -> None:
        seen.append(("other", event["order_id"]))

    async with running(consumer):
        await billing.publish(placed(1), placed(2, type="order.cancelled"), placed(3, type=None))
        await until_finished(consumer, 3)
    assert seen == [("own", 1), ("other", 2), ("other", 3)]


async def test_drop_is_a_dead_letter_at_once(billing: Billing) -> None:
    consumer = billing.consumer()

    @consumer.on(OrderPlaced)
    def refuse(event: OrderPlaced, session: Session) -> None:
        session.add(Charge(order_id=event.order_id))
        raise Drop("this order was cancelled long ago")

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    (letter,) = billing.dead()
    assert (letter.reason, letter.attempts, letter.exception_message) == (
        "rejected",
        1,
        "this order was cancelled long ago",
    )
    assert billing.charges() == []


async def test_retry_says_when(billing: Billing) -> None:
    consumer = billing.consumer(retries=Retries(attempts=2, backoff=Backoff(first=600, most=600)))
    tries = []

    @consumer.on(OrderPlaced)
    def ask_for_a_retry(event: OrderPlaced, session: Session) -> None:
        tries.append(event.order_id)
        if len(tries) == 1:
            raise Retry(after=0.01)
        session.add(Charge(order_id=event.order_id))

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert (tries, billing.charges()) == ([1, 1], [1])


async def test_a_retry_counts_as_an_attempt(billing: Billing) -> None:
    consumer = billing.consumer(retries=2)

    @consumer.on(OrderPlaced)
    def ask_for_ever(event: OrderPlaced) -> None:
        raise Retry(after=0)

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert [(letter.reason, letter.attempts) for letter in billing.dead()] == [("retries-exhausted", 2)]


async def test_attempts_survive_a_restart(billing: Billing) -> None:
    backoff = Backoff(first=0.3, factor=1.0, most=0.3)
    tries = 0
    for attempts in (1, 2, 3):
        consumer = billing.consumer(retries=Retries(attempts=3, backoff=backoff))

        @consumer.on(OrderPlaced)
        def fail(event: OrderPlaced) -> None:
            nonlocal tries
            tries += 1
            raise ValueError

        async with running(consumer):
            if attempts == 1:
                await billing.publish(placed(1))
            await until(lambda n=attempts: tries >= n)  # type: ignore[misc]
            await until(lambda n=attempts: billing.dead() or [r["attempts"] for r in billing.rows("attempt")] == [n])  # type: ignore[misc]
    assert tries == 3
    assert [letter.attempts for letter in billing.dead()] == [3]


async def test_a_restart_does_not_shorten_the_back_off(billing: Billing) -> None:
    tries = 0

    def consumer_that_fails() -> Any:
        consumer = billing.consumer(retries=Retries(attempts=3, backoff=Backoff(first=600, most=600)))

        @consumer.on("orders")
        def fail(event: dict[str, Any]) -> None:
            nonlocal tries
            if event["order_id"] == 1:
                tries += 1
                raise ValueError

        return consumer

    consumer = consumer_that_fails()
    async with running(consumer):
        await billing.publish(placed(1))
        await until(lambda: billing.rows("attempt"))
    consumer = consumer_that_fails()
    async with running(consumer):
        await billing.publish(placed(2, key="another"))
        await until(lambda: consumer.state.counts.received == 2 and consumer.state.counts.handled == 1)
    assert tries == 1


async def test_a_message_that_failed_before_a_restart_leaves_no_attempt_row_when_it_succeeds(billing: Billing) -> None:
    consumer = billing.consumer(retries=Retries(attempts=3, backoff=Backoff(first=0.3, most=0.3)))

    @consumer.on(OrderPlaced)
    def fail(event: OrderPlaced) -> None:
        raise ValueError

    async with running(consumer):
        await billing.publish(placed(1))
        await until(lambda: billing.rows("attempt"))
    healthy = billing.consumer()
    healthy.on(OrderPlaced)(charge)
    async with running(healthy):
        await until_finished(healthy, 1)
    assert (billing.charges(), billing.rows("attempt")) == ([1], [])


async def test_the_inbox_row_is_not_written_before_the_handler(billing: Billing) -> None:
    """A neighbour committed it first: after a crash in between the message counted as a duplicate and was lost."""
    consumer = billing.consumer()
    seen = []

    @consumer.on(OrderPlaced)
    def look(event: OrderPlaced, session: Session) -> None:
        seen.append(billing.rows("inbox"))  # on another connection
        session.add(Charge(order_id=event.order_id))

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert seen == [[]]
    assert len(billing.rows("inbox")) == len(billing.charges()) == 1


@ON_EACH
async def test_foreign_text_that_a_database_refuses_does_not_hold_up_the_partition(billing: Billing) -> None:
    """Keys, types, headers and exceptions of others can hold NUL characters, wrong UTF-8, or far too much."""
    consumer = billing.consumer(retries=1)

    @consumer.on("orders")
    def fail(event: dict[str, Any]) -> None:
        raise ValueError("\x00 and \udcff and " + "x" * 100_000)

    async with running(consumer):
        await billing.publish(
            placed(1, key="a\x00b", type="t\x00" * 200, content_type="c" * 1000, headers='{"h\\u0000": "v\\u0000"}'),
            placed(2, key="k" * 3000),
            placed(3),
        )
        await until_finished(consumer, 3)
    letters = {bytes(letter.payload or b"")[13:14]: letter for letter in billing.dead()}
    assert len(letters) == 3
    assert (letters[b"1"].key, letters[b"1"].raw_key, letters[b"1"].type) == (None, b"a\x00b", None)
    assert letters[b"1"].headers["outbox-type"] == "t\x00" * 200
    assert letters[b"2"].raw_key == b"k" * 3000
    assert len(str(letters[b"3"].stack).encode()) <= 8 * 1024
    assert len(str(letters[b"3"].exception_message).encode()) <= 8 * 1024


async def test_sys_exit_in_a_handler_is_a_failure_of_its_message(billing: Billing) -> None:
    consumer = billing.consumer(retries=1)

    @consumer.on(OrderPlaced)
    def leave(event: OrderPlaced) -> None:
        raise SystemExit(3)

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert [letter.exception_type for letter in billing.dead()] == ["SystemExit"]


async def test_a_cancellation_from_inside_an_async_handler_is_a_failure_of_its_message(billing: Billing) -> None:
    consumer = billing.consumer(retries=1)

    @consumer.on(OrderPlaced)
    async def cancelled(event: OrderPlaced, session: AsyncSession) -> None:
        raise asyncio.CancelledError

    async with running(consumer):
        await billing.publish(placed(1), placed(2, type="order.none"))
        await until_finished(consumer, 2)
    assert sorted(letter.reason for letter in billing.dead()) == ["no-handler", "retries-exhausted"]
