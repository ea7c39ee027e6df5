"""Messages of its topics that a consumer has no handler for: dead letters, or, where it is told so, ignored."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from sqlalchemy.orm import Session

from outbox import ConfigurationError, Consumer, Message
from outbox._message import new_id
from outbox.backoff import Backoff
from outbox.consumer import Retries
from outbox.transports import open_transport
from tests.consumer.billing import Billing, OrderPlaced, charge, outbox, placed, running, until, until_finished
from tests.consumer.wrapped import WrappedTransport, without_offsets

REMEDIES = [
    "@billing.on('orders', type='order.cancelled')",
    "@billing.on('orders')",
    "Consumer('billing', …, unknown='ignore')",
]


async def test_the_dead_letter_and_the_log_say_what_can_be_done(
    billing: Billing, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = billing.consumer()
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        await billing.publish(placed(1, type="order.cancelled"), placed(2, type=None), placed(3))
        await until_finished(consumer, 3)
    assert billing.charges() == [3]
    cancelled, untyped = billing.dead()
    assert (cancelled.reason, untyped.reason) == ("no-handler", "no-handler")
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    for text in (cancelled.exception_message or "", logged[0]):
        assert "consumer 'billing' has no handler for type 'order.cancelled' of topic 'orders'" in text
        for remedy in REMEDIES:
            assert remedy in text
    # a message without a type can have a handler of its topic only
    assert "for messages of topic 'orders' without a type" in str(untyped.exception_message)
    assert "type=" not in str(untyped.exception_message)
    assert "@billing.on('orders')" in str(untyped.exception_message)


async def test_ignored_messages_are_acknowledged_and_counted_and_leave_nothing_behind(billing: Billing) -> None:
    transport = WrappedTransport(open_transport(billing.transport_url))
    consumer = billing.consumer(unknown="ignore", transport=transport)
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        await billing.publish(
            placed(1, type="order.cancelled"), placed(2), placed(3, type=None), placed(4, type="order.cancelled")
        )
        await until_finished(consumer, 4)
        await until(lambda: len(transport.acked) == 4)
    assert billing.charges() == [2]
    counts = consumer.state.counts
    assert (counts.received, counts.handled, counts.ignored, counts.dead, counts.skipped) == (4, 1, 3, 0, 0)
    assert (len(billing.rows("inbox")), billing.dead(), billing.rows("attempt")) == (1, [], [])

    consumer = billing.consumer(unknown="ignore")
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):  # the offset has moved
        await billing.publish(placed(5))
        await until_finished(consumer, 1)
    assert consumer.state.counts.received == 1


async def test_it_is_logged_once_for_each_topic_and_type(
    sqlite_billing: Billing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "outbox.consumer")
    consumer = sqlite_billing.consumer(unknown="ignore")
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        types = ("order.cancelled", None, "order.cancelled", "order.paid", None)
        await sqlite_billing.publish(*(placed(number, type=type) for number, type in enumerate(types)))
        await until_finished(consumer, 5)
    said = [record.getMessage() for record in caplog.records if "ignore" in record.getMessage()]
    assert len(said) == 3
    assert "consumer 'billing' ignores messages of type 'order.cancelled' of topic 'orders'" in said[0]
    assert "unknown='ignore'" in said[0]
    assert {record.levelname for record in caplog.records if "ignore" in record.getMessage()} == {"INFO"}


async def test_what_nothing_could_be_done_with_is_ignored_too(sqlite_billing: Billing) -> None:
    """From a broker that numbers nothing, without an id of its own: a dead letter, had it a handler."""
    transport = WrappedTransport(open_transport(sqlite_billing.transport_url), change=without_offsets)
    consumer = sqlite_billing.consumer(unknown="ignore", transport=transport)
    consumer.on("orders", type="order.placed")(charge)
    async with running(consumer):
        await sqlite_billing.publish(placed(1))  # has lost its type on the way too
        await until_finished(consumer, 1)
    assert (consumer.state.counts.ignored, sqlite_billing.dead()) == (1, [])


async def test_a_message_whose_handler_is_gone_leaves_no_attempt_row(billing: Billing) -> None:
    before = billing.consumer(retries=Retries(attempts=3, backoff=Backoff(first=600, most=600)))

    @before.on("orders", type="order.cancelled")
    def fail(event: dict[str, Any]) -> None:
        raise ValueError

    async with running(before):
        await billing.publish(placed(1, type="order.cancelled"))
        await until(lambda: billing.rows("attempt"))
    consumer = billing.consumer(unknown="ignore")
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        await billing.publish(placed(2, key="another"))
        await until(lambda: billing.charges() == [2])
        # it still waits for its time, which is not shortened
        assert len(billing.rows("attempt")) == 1
    with billing.engine.begin() as connection:
        connection.exec_driver_sql("update outbox_attempt set next_attempt_at = null")
    consumer = billing.consumer(unknown="ignore")
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        await until_finished(consumer, 1)
    assert (consumer.state.counts.ignored, billing.rows("attempt"), billing.dead()) == (1, [], [])


async def test_a_replay_is_never_ignored(billing: Billing) -> None:
    """Somebody asked for it: to ignore it would lose a message that was safe."""
    consumer = billing.consumer()
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        await billing.publish(placed(1, type="order.cancelled"))
        await until_finished(consumer, 1)
    billing.letters.replay(consumer="billing")
    consumer = billing.consumer(unknown="ignore")
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        await until_finished(consumer, 1)
    states = [(letter.cycle, letter.state, letter.reason) for letter in billing.dead()]
    assert sorted(states) == [(0, "replayed", "no-handler"), (1, "open", "no-handler")]
    assert (consumer.state.counts.ignored, consumer.state.counts.dead) == (0, 1)


def test_by_hand_it_is_the_same(sqlite_billing: Billing) -> None:
    message = Message(id=new_id(), topic="orders", type="order.cancelled", payload=b"{}")
    strict, lenient = (Consumer("billing", outbox, unknown=unknown) for unknown in ("dead", "ignore"))  # type: ignore[arg-type]
    for consumer in (strict, lenient):
        consumer.on(OrderPlaced)(charge)
    with Session(sqlite_billing.engine) as session, session.begin():
        with pytest.raises(ConfigurationError, match=r"has no handler for type 'order.cancelled'.*unknown='ignore'"):
            strict.handle(message, session)
        assert lenient.handle(message, session) is False
    assert sqlite_billing.rows("inbox") == []


@pytest.mark.parametrize("unknown", ["drop", None, True, ["dead"]])
def test_another_policy_is_refused(unknown: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"unknown=.*\('dead'\).*\('ignore'\)"):
        Consumer("billing", outbox, unknown=unknown)
