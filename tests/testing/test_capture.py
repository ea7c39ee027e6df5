"""What a test's code added to the outbox, without a relay and in the fixture that rolls everything back."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable
from decimal import Decimal

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outbox import ConfigurationError, DecodingError, Outbox
from outbox.testing import Captured, capture
from tests.consumer.billing import Charge, Charged, OrderPlaced, outbox


def test_what_commits_is_captured_in_order(session: Session) -> None:
    with capture(outbox) as sent:
        session.add(Charge(order_id=1))
        outbox.add(session, OrderPlaced(1, Decimal("9.90")))
        outbox.add(session, "plain", {"a": 1}, key="k", headers={"tenant": "x"})
        assert sent.all == []  # staged, not committed
        session.commit()
        outbox.add(session, Charged(1))
        session.commit()
    assert [message.topic for message in sent.all] == ["orders", "plain", "charges"] == [m.topic for m in sent]
    assert sent.one(OrderPlaced) == OrderPlaced(1, Decimal("9.90"))
    assert sent.of(OrderPlaced) == [OrderPlaced(1, Decimal("9.90"))]
    assert sent.one(Charged).order_id == 1
    (plain,) = sent.topic("plain")
    assert (plain.key, plain.payload, plain.headers) == ("k", b'{"a":1}', {"tenant": "x"})
    assert len(sent) == 3


def test_nothing_outside_the_block_is_captured(session: Session) -> None:
    outbox.add(session, OrderPlaced(1))
    session.commit()
    with capture(outbox) as sent:
        pass
    outbox.add(session, OrderPlaced(2))
    session.commit()
    assert sent.all == []
    assert not sent


def test_what_is_rolled_back_is_not_captured(session: Session) -> None:
    with capture(outbox) as sent:
        outbox.add(session, OrderPlaced(1))
        session.rollback()
        outbox.add(session, OrderPlaced(2))
        with session.begin_nested() as savepoint:
            outbox.add(session, OrderPlaced(3))
            savepoint.rollback()
        session.commit()
    assert [event.order_id for event in sent.of(OrderPlaced)] == [2]


def test_messages_on_a_core_connection(engine: sa.Engine) -> None:
    with capture(outbox) as sent, engine.connect() as connection:
        with connection.begin():
            outbox.add(connection, OrderPlaced(1))
        transaction = connection.begin()
        outbox.add(connection, OrderPlaced(2))
        transaction.rollback()
        with connection.begin():
            outbox.add(connection, OrderPlaced(3))
            inner = connection.begin_nested()
            outbox.add(connection, OrderPlaced(4))
            inner.rollback()
            with connection.begin_nested():
                outbox.add(connection, OrderPlaced(5))
    assert [event.order_id for event in sent.of(OrderPlaced)] == [1, 3, 5]


async def test_an_async_session(async_session: AsyncSession) -> None:
    with capture(outbox) as sent:
        outbox.add(async_session, OrderPlaced(1))
        await async_session.commit()
        outbox.add(async_session, OrderPlaced(2))
        await async_session.rollback()
    assert [event.order_id for event in sent.of(OrderPlaced)] == [1]


def test_messages_of_other_threads_are_captured(engine: sa.Engine) -> None:
    """As with a TestClient, which runs the application in a thread of its own."""

    def application() -> None:
        with Session(engine) as session, session.begin():
            outbox.add(session, OrderPlaced(1))

    with capture(outbox) as sent:
        thread = threading.Thread(target=application)
        thread.start()
        thread.join()
    assert sent.one(OrderPlaced).order_id == 1


def test_scheduled_messages_are_captured_with_their_time(session: Session) -> None:
    with capture(outbox) as sent:
        outbox.add(session, OrderPlaced(1), deliver_at=dt.timedelta(hours=1))
        session.commit()
    (message,) = sent.all
    assert message.deliver_at is not None
    assert sent.one(OrderPlaced).order_id == 1


def test_messages_of_another_outbox_are_not_captured(engine: sa.Engine) -> None:
    other = Outbox(prefix="other_")
    other.metadata.create_all(engine)
    with capture(outbox) as sent, capture(other) as others, Session(engine) as session:
        other.add(session, "orders", {})
        outbox.add(session, Charged(1))
        session.commit()
    assert ([m.topic for m in sent.all], [m.topic for m in others.all]) == (["charges"], ["orders"])


def test_one_says_what_there_is_instead(session: Session) -> None:
    with capture(outbox) as sent:
        with pytest.raises(AssertionError, match="0 messages are OrderPlaced, not one; captured: nothing"):
            sent.one(OrderPlaced)
        for number in range(2):
            outbox.add(session, OrderPlaced(number))
        session.commit()
    with pytest.raises(
        AssertionError, match=r"2 messages are OrderPlaced.*orders/order.placed key=0, orders/order.placed"
    ):
        sent.one(OrderPlaced)
    with pytest.raises(AssertionError, match="0 messages are Charged"):
        sent.one(Charged)
    with pytest.raises(ConfigurationError, match="Charge is not declared"):
        sent.of(Charge)
    assert "orders/order.placed" in repr(sent)


def test_a_payload_is_decoded_when_it_is_asked_for(session: Session) -> None:
    with capture(outbox) as sent:
        outbox.add(session, "orders", {"wrong": True}, type="order.placed")
        session.commit()
    assert len(sent.all) == 1
    with pytest.raises(DecodingError, match="order_id"):
        sent.one(OrderPlaced)


def test_the_fixture_captures_to_the_end_of_the_test(
    session: Session, outbox_capture: Callable[[Outbox], Captured]
) -> None:
    sent = outbox_capture(outbox)
    outbox.add(session, OrderPlaced(1))
    session.commit()
    assert sent.one(OrderPlaced).order_id == 1
