"""The broker or the database is away: nobody's fault among the messages, and nothing stops for good."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import uuid
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outbox.consumer import Retries
from outbox.errors import Unavailable
from outbox.transports import open_transport
from tests.consumer.billing import QUICKLY, Billing, OrderPlaced, charge, placed, running, until, until_finished
from tests.consumer.wrapped import WrappedTransport
from tests.services import PostgresqlServer
from tests.services.fixtures import INSTALL_TIMEOUT


@pytest.mark.parametrize("step", ["connect", "subscribe", "fetch", "ack"])
async def test_a_broker_that_is_away_is_waited_for(sqlite_billing: Billing, step: str) -> None:
    billing = sqlite_billing
    transport = WrappedTransport(open_transport(billing.transport_url))
    consumer = billing.consumer(transport=transport)
    consumer.on(OrderPlaced)(charge)
    refused = 0

    def away(at: str) -> None:
        nonlocal refused
        if at == step and refused < 2:
            refused += 1
            raise Unavailable("the broker is away")

    transport.before = away
    await billing.publish(placed(1), placed(2))
    async with running(consumer):
        await until(lambda: refused == 2)
        await until_finished(consumer, 2)
        await until(lambda: len(transport.acked) == 2)
        await until(lambda: consumer.state.broker is None)
    assert billing.charges() == [1, 2]


async def test_entering_does_not_fail_because_the_broker_is_away(sqlite_billing: Billing) -> None:
    transport = WrappedTransport(open_transport(sqlite_billing.transport_url))

    def away(step: str) -> None:
        raise Unavailable("nobody answers")

    transport.before = away
    consumer = sqlite_billing.consumer(transport=transport)
    consumer.on(OrderPlaced)(charge)
    async with consumer:
        await until(lambda: consumer.state.broker == "nobody answers" and consumer.state.running)
    assert not consumer.state.running
    assert consumer.state.error is None


@pytest.mark.timeout(INSTALL_TIMEOUT)
@pytest.mark.parametrize("parameter", ["", "&auto_create=true"])
async def test_a_topic_that_does_not_exist_is_waited_for_and_the_log_says_what_to_do(
    sqlite_billing: Billing, kafka_url: str, caplog: pytest.LogCaptureFixture, parameter: str
) -> None:
    """Kafka makes none by itself: neither should a consumer seem to hang, nor should somebody have to ask why."""
    billing, topic = sqlite_billing, f"orders-{uuid.uuid4().hex[:12]}"
    url = f"{kafka_url}?session_timeout_ms=6000{parameter}"
    consumer = billing.consumer(f"billing-{topic}", transport=url)
    consumer.on(topic)(charge)
    transport = open_transport(url)
    async with consumer:
        if parameter:
            # what the broker does then is a setting of its own, and said
            await until(
                lambda: (
                    consumer.state.subscribed.is_set() or "auto.create.topics.enable" in (consumer.state.broker or "")
                )
            )
            assert "add auto_create" not in caplog.text
        else:
            await until(lambda: consumer.state.broker)
            said = [record.getMessage() for record in caplog.records if topic in record.getMessage()]
            assert len(said) == 1
            for words in (
                f"consumer billing-{topic} cannot read from the broker, and tries again: ",
                f"topic {topic!r} does not exist",
                "not made by itself",
                "create it, or add auto_create=true to the transport's URL",
            ):
                assert words in said[0]
        await transport.declare([topic])
        await billing.publish(placed(1, topic=topic), transport=transport)
        await until_finished(consumer, 1)
    await transport.close()
    assert billing.charges() == [1]


async def test_another_reason_is_another_line_in_the_log(
    sqlite_billing: Billing, caplog: pytest.LogCaptureFixture
) -> None:
    transport = WrappedTransport(open_transport(sqlite_billing.transport_url))
    consumer = sqlite_billing.consumer(transport=transport)
    consumer.on(OrderPlaced)(charge)
    reasons = ["topic 'orders' does not exist"] * 2 + ["topic 'invoices' does not exist"] * 2

    def away(step: str) -> None:
        if reasons:
            raise Unavailable(reasons.pop(0))

    transport.before = away
    async with running(consumer):
        await until(lambda: consumer.state.broker is None)
    assert [record.getMessage().partition("again: ")[2] for record in caplog.records] == [
        "topic 'orders' does not exist",
        "topic 'invoices' does not exist",
    ]


@pytest.mark.timeout(INSTALL_TIMEOUT)
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_while_the_database_is_away_no_attempt_is_spent(
    killable_postgresql: PostgresqlServer, broker: str, kind: str
) -> None:
    url = await asyncio.to_thread(killable_postgresql.create_database)
    billing = Billing(url, broker)
    consumer = billing.consumer(retries=1)  # a single attempt: one that is spent wrongly is seen
    if kind == "sync":
        consumer.on(OrderPlaced)(charge)
    else:

        @consumer.on(OrderPlaced)
        async def charge_async(event: OrderPlaced, session: AsyncSession) -> None:
            charge(event, session.sync_session)

    async with running(consumer):
        await billing.publish(*(placed(number, key=str(number)) for number in range(50)))
        await until(lambda: len(billing.charges()) >= 10)
        await asyncio.to_thread(killable_postgresql.kill)
        await billing.publish(*(placed(number, key=str(number)) for number in range(50, 100)))
        await until(lambda: consumer.state.database)
        await asyncio.to_thread(killable_postgresql.restart)
        billing.engine.dispose()
        await until(lambda: len(billing.charges()) == 100)
        await until(lambda: consumer.state.database is None)
    assert sorted(billing.charges()) == list(range(100))
    assert billing.dead() == []
    assert billing.rows("attempt") == []
    billing.close()


@pytest.mark.timeout(INSTALL_TIMEOUT)
async def test_a_database_that_is_away_at_the_start_is_waited_for(
    killable_postgresql: PostgresqlServer, broker: str
) -> None:
    url = await asyncio.to_thread(killable_postgresql.create_database)
    billing = Billing(url, broker)
    billing.engine.dispose()
    await asyncio.to_thread(killable_postgresql.kill)
    consumer = billing.consumer()
    consumer.on(OrderPlaced)(charge)
    async with consumer:
        await until(lambda: consumer.state.database)
        await asyncio.to_thread(killable_postgresql.restart)
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert billing.charges() == [1]
    billing.close()


async def test_a_connection_that_is_lost_in_a_handler_spends_no_attempt(postgresql_billing: Billing) -> None:
    billing = postgresql_billing
    consumer = billing.consumer(retries=1)
    tries = 0

    @consumer.on(OrderPlaced)
    def lose_it_once(event: OrderPlaced, session: Session) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            session.execute(sa.text("select pg_terminate_backend(pg_backend_pid())"))
        charge(event, session)

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert (tries, billing.charges(), billing.dead()) == (2, [1], [])


async def test_a_handler_that_always_loses_its_connection_is_dead_lettered_in_the_end(
    postgresql_billing: Billing, monkeypatch: Any
) -> None:
    from outbox.consumer import processing

    monkeypatch.setattr(processing.Database, "PROBE", QUICKLY)
    billing = postgresql_billing
    consumer = billing.consumer(retries=2)
    tries = 0

    @consumer.on(OrderPlaced)
    def lose_it(event: OrderPlaced, session: Session) -> None:
        nonlocal tries
        if event.order_id == 1:
            tries += 1
            session.execute(sa.text("select pg_terminate_backend(pg_backend_pid())"))
        charge(event, session)

    async with running(consumer):
        await billing.publish(placed(1), placed(2))
        await until_finished(consumer, 2)
    assert tries == processing.SPARED + 2
    assert billing.charges() == [2]
    assert [letter.attempts for letter in billing.dead()] == [2]


async def test_another_database_that_a_handler_cannot_reach_is_the_messages_own_trouble(
    sqlite_billing: Billing,
) -> None:
    """Only *our* connection's loss is put down to the database, else such a message would be tried for ever."""
    billing = sqlite_billing
    consumer = billing.consumer(retries=2)
    elsewhere = sa.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")

    @consumer.on(OrderPlaced)
    def ask_elsewhere(event: OrderPlaced, session: Session) -> None:
        with elsewhere.connect():
            pass

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    (letter,) = billing.dead()
    assert (letter.reason, letter.exception_type) == ("retries-exhausted", "sqlalchemy.exc.OperationalError")
    assert letter.attempts == 2


async def test_tables_that_are_gone_for_a_while_are_no_messages_fault(postgresql_billing: Billing) -> None:
    billing = postgresql_billing
    consumer = billing.consumer(retries=1)
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        with billing.engine.begin() as connection:
            connection.execute(sa.text("alter table outbox_inbox rename to hidden"))
        await billing.publish(placed(1))
        await until(lambda: consumer.state.database)
        with billing.engine.begin() as connection:
            connection.execute(sa.text("alter table hidden rename to outbox_inbox"))
        await until_finished(consumer, 1)
    assert (billing.charges(), billing.dead()) == ([1], [])


async def test_a_busy_sqlite_spends_no_attempt(sqlite_billing: Billing) -> None:
    billing = sqlite_billing
    engine = sa.create_engine(billing.url, connect_args={"timeout": 0.05})
    consumer = billing.consumer(database=engine, retries=Retries(attempts=1))
    consumer.on(OrderPlaced)(charge)
    other = sqlite3.connect(billing.url.removeprefix("sqlite:///"), isolation_level=None)
    async with running(consumer):
        other.execute("begin immediate")
        await billing.publish(placed(1))
        await until(lambda: consumer.state.database)
        other.execute("rollback")
        await until_finished(consumer, 1)
    other.close()
    engine.dispose()
    assert (billing.charges(), billing.dead()) == ([1], [])


async def test_an_app_context_that_cannot_be_made_is_no_messages_fault(sqlite_billing: Billing) -> None:
    from contextlib import nullcontext

    billing = sqlite_billing
    broken = threading.Event()

    def around() -> Any:
        if broken.is_set():
            raise RuntimeError("no application")
        return nullcontext()

    consumer = billing.consumer(around=around, retries=1)
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        broken.set()
        await billing.publish(placed(1))
        await until(lambda: consumer.state.database == "RuntimeError: no application")
        broken.clear()
        await until_finished(consumer, 1)
    assert (billing.charges(), billing.dead()) == ([1], [])
