"""Handlers called in the test's own transaction: one message by hand, or all that the outbox holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from outbox import ConfigurationError, Consumer, DecodingError, Message, TransactionError
from outbox._message import new_id
from outbox.testing import Drained, drain
from tests.consumer.billing import Charge, Charged, OrderPlaced, outbox
from tests.testing.conftest import ON_EACH


@pytest.fixture
def billing() -> Consumer:
    consumer = Consumer("billing", outbox)

    @consumer.on(OrderPlaced)
    def charge(event: OrderPlaced, session: Session) -> Charged | None:
        session.add(Charge(order_id=event.order_id))
        return Charged(event.order_id) if event.order_id < 100 else None

    return consumer


@pytest.fixture
def async_billing() -> Consumer:
    consumer = Consumer("billing", outbox)

    @consumer.on(OrderPlaced)
    async def charge(event: OrderPlaced, session: AsyncSession) -> Charged:
        session.add(Charge(order_id=event.order_id))
        await session.flush()
        return Charged(event.order_id)

    return consumer


def charged(session: Session) -> list[int]:
    return list(session.scalars(sa.select(Charge.order_id).order_by(Charge.id)))


# ---------------------------------------------------------------- drain


@ON_EACH
def test_what_the_transaction_holds_is_delivered_in_order(session: Session, billing: Consumer) -> None:
    for number in (3, 1, 2):
        outbox.add(session, OrderPlaced(number))
    session.commit()
    assert drain(outbox, session, to=billing) == Drained(handled=3, skipped=0, others=3)
    assert charged(session) == [3, 1, 2]


def test_what_is_still_staged_is_delivered_too(session: Session, billing: Consumer) -> None:
    outbox.add(session, OrderPlaced(1))
    assert drain(outbox, session, to=billing).handled == 1


def test_messages_that_handlers_add_are_delivered_too(session: Session) -> None:
    consumer = Consumer("chain", outbox)
    seen = []

    @consumer.on(OrderPlaced)
    def first(event: OrderPlaced) -> Any:
        seen.append(("placed", event.order_id))
        return [Charged(event.order_id), Charged(event.order_id + 1)]

    @consumer.on(Charged)
    def second(event: Charged) -> OrderPlaced | None:
        seen.append(("charged", event.order_id))
        return OrderPlaced(10) if event.order_id == 2 else None

    outbox.add(session, OrderPlaced(1))
    assert drain(outbox, session, to=consumer) == Drained(6, 0, 0)
    assert seen == [
        ("placed", 1),
        ("charged", 1),
        ("charged", 2),
        ("placed", 10),
        ("charged", 10),
        ("charged", 11),
    ]


def test_a_second_drain_delivers_only_what_is_new(session: Session, billing: Consumer) -> None:
    outbox.add(session, OrderPlaced(100))
    assert drain(outbox, session, to=billing) == Drained(1, 0, 0)
    outbox.add(session, OrderPlaced(101))
    assert drain(outbox, session, to=billing) == Drained(1, 1, 0)
    assert charged(session) == [100, 101]


def test_another_consumer_can_be_drained_to_afterwards(session: Session, billing: Consumer) -> None:
    other = Consumer("shipping", outbox)
    seen = []

    @other.on(OrderPlaced)
    def ship(event: OrderPlaced) -> None:
        seen.append(event.order_id)

    outbox.add(session, OrderPlaced(100))
    drain(outbox, session, to=billing)
    drain(outbox, session, to=other)
    assert (charged(session), seen) == ([100], [100])


def test_what_a_handler_raises_comes_through(session: Session) -> None:
    consumer = Consumer("billing", outbox)

    @consumer.on(OrderPlaced)
    def fail(event: OrderPlaced) -> None:
        raise ValueError("no")

    outbox.add(session, OrderPlaced(1))
    with pytest.raises(ValueError, match="no"):
        drain(outbox, session, to=consumer)


def test_nothing_is_left_after_the_roll_back(engine: sa.Engine, billing: Consumer) -> None:
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
            outbox.add(session, OrderPlaced(1))
            session.commit()
            drain(outbox, session, to=billing)
            session.commit()
            assert charged(session) == [1]
        outer.rollback()
        for table in (Charge.__table__, outbox.tables.inbox, outbox.tables.message):
            assert connection.scalar(sa.select(sa.func.count()).select_from(table)) == 0


def test_a_scoped_session(connection: sa.Connection, billing: Consumer) -> None:
    scoped = scoped_session(sessionmaker(bind=connection, join_transaction_mode="create_savepoint"))
    outbox.add(scoped, OrderPlaced(1))
    assert drain(outbox, scoped, to=billing).handled == 1
    scoped.remove()


@ON_EACH
async def test_an_async_session_drains_with_run_sync(
    async_session: AsyncSession, billing: Consumer, async_billing: Consumer
) -> None:
    outbox.add(async_session, OrderPlaced(1))
    assert await async_session.run_sync(drain, outbox, to=async_billing) == Drained(1, 0, 1)
    outbox.add(async_session, OrderPlaced(2))
    assert await async_session.run_sync(drain, outbox, to=billing) == Drained(1, 1, 2)
    assert await async_session.run_sync(charged) == [1, 2]


async def test_an_async_session_given_directly_says_what_to_write(
    async_session: AsyncSession, billing: Consumer
) -> None:
    with pytest.raises(TypeError, match=r"await session\.run_sync\(drain, outbox, to=…\)"):
        drain(outbox, async_session, to=billing)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"await session\.run_sync\(consumer\.handle, message\)"):
        billing.handle(OrderPlaced(1), async_session)  # type: ignore[call-overload]


def test_the_fixture_is_the_same_function(outbox_drain: Callable[..., Drained]) -> None:
    assert outbox_drain is drain


# ---------------------------------------------------------------- handle


def test_one_message_handled_by_hand(session: Session, billing: Consumer) -> None:
    assert billing.handle(OrderPlaced(7), session) is True
    assert billing.handle(OrderPlaced(7), session) is True  # another message, with an id of its own
    assert charged(session) == [7, 7]
    assert [message.topic for message in outbox.staged(session)] == ["charges", "charges"]


def test_a_message_with_an_id_is_handled_once(session: Session, billing: Consumer) -> None:
    message = Message(id=new_id(), topic="orders", type="order.placed", payload=b'{"order_id": 7}')
    assert [billing.handle(message, session) for _ in range(2)] == [True, False]
    assert charged(session) == [7]


def test_handling_needs_a_handler_and_a_message(session: Session, billing: Consumer) -> None:
    with pytest.raises(ConfigurationError, match="has no handler for type 'charged' of topic 'charges'"):
        billing.handle(Charged(1), session)
    with pytest.raises(TypeError, match="declared with @event, or a Message; not a dict"):
        billing.handle({"order_id": 1}, session)
    with pytest.raises(TypeError, match="takes a Session"):
        billing.handle(OrderPlaced(1), None)  # type: ignore[call-overload]
    broken = Message(id=new_id(), topic="orders", type="order.placed", payload=b"{")
    with pytest.raises(DecodingError):
        billing.handle(broken, session)
    assert charged(session) == []


async def test_an_async_handler_by_hand(async_session: AsyncSession, async_billing: Consumer) -> None:
    assert await async_session.run_sync(async_billing.handle, OrderPlaced(7)) is True
    assert await async_session.run_sync(charged) == [7]


def test_an_async_handler_in_sync_code_says_what_to_write(session: Session, async_billing: Consumer) -> None:
    with pytest.raises(TransactionError, match="takes an AsyncSession"):
        async_billing.handle(OrderPlaced(7), session)
    consumer = Consumer("billing", outbox)

    @consumer.on(OrderPlaced)
    async def tell(event: OrderPlaced) -> None: ...

    with pytest.raises(TransactionError, match="this handler is async"):
        consumer.handle(OrderPlaced(7), session)
