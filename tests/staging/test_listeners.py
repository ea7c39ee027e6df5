"""Messages that other people's session listeners add, at whatever moment they are called."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from outbox import TransactionError
from tests.staging.shop import Order, Shop, outbox, place, tell


def test_a_later_before_commit_listener_adds_a_message(shop: Shop) -> None:
    with Session(shop.engine) as session:

        @event.listens_for(session, "before_commit")
        def announce(session: Session) -> None:
            tell(session, "a")

        session.add(Order(name="a"))
        session.commit()
    assert shop.holds("a")


def test_a_later_before_commit_listener_adds_the_only_message_of_a_session_without_connection(shop: Shop) -> None:
    with Session(shop.engine) as session:

        @event.listens_for(session, "before_commit")
        def announce(session: Session) -> None:
            tell(session, "a")

        session.commit()
    assert shop.messages() == ["a"]


def test_a_later_listener_adds_data_and_a_flush_listener_its_message(shop: Shop) -> None:
    with Session(shop.engine) as session:

        @event.listens_for(session, "before_commit")
        def add_more(session: Session) -> None:
            session.add(Order(name="b"))

        announce_every_new_order(session)
        session.add(Order(name="a"))
        session.commit()
    assert shop.holds("a", "b")


def test_a_flush_listener_announces_every_new_order(shop: Shop) -> None:
    with Session(shop.engine) as session:
        announce_every_new_order(session)
        session.add(Order(name="a"))
        session.commit()
        session.add(Order(name="b"))
        session.flush()
        session.rollback()
    assert shop.holds("a")


def test_a_flush_listener_announces_what_is_committed_through_the_connection(shop: Shop) -> None:
    with Session(shop.engine) as session:
        announce_every_new_order(session)
        session.add(Order(name="a"))
        session.flush()
        session.connection().commit()
    assert shop.holds("a")


def test_a_before_flush_listener_announces_every_new_order(shop: Shop) -> None:
    with Session(shop.engine) as session:

        @event.listens_for(session, "before_flush")
        def announce(session: Session, *_: Any) -> None:
            for order in session.new:
                tell(session, order.name)

        session.add(Order(name="a"))
        session.commit()
    assert shop.holds("a")


def test_add_in_an_after_commit_listener_raises(shop: Shop) -> None:
    with Session(shop.engine) as session:
        session.add(Order(name="a"))

        @event.listens_for(session, "after_commit")
        def announce(session: Session) -> None:
            with pytest.raises(TransactionError, match="committed"):
                tell(session, "a")

        session.commit()
    assert (shop.orders(), shop.messages()) == (["a"], [])


def test_add_in_an_after_rollback_listener_raises(shop: Shop) -> None:
    with Session(shop.engine) as session:

        @event.listens_for(session, "after_rollback")
        def announce(session: Session) -> None:
            with pytest.raises(TransactionError, match="not active"):
                tell(session, "a")

        place(session, "a")
        session.flush()
        session.rollback()
    assert shop.holds()


def test_a_listener_that_stops_the_commit_leaves_the_message_to_the_next_one(shop: Shop) -> None:
    with Session(shop.engine) as session:

        @event.listens_for(session, "before_commit", once=True)
        def stop(session: Session) -> None:
            raise ZeroDivisionError

        place(session, "a")
        with pytest.raises(ZeroDivisionError):
            session.commit()
        place(session, "b")
        session.commit()
    assert shop.holds("a", "b")


def announce_every_new_order(session: Session) -> None:
    @event.listens_for(session, "after_flush")
    def announce(session: Session, context: Any) -> None:
        for order in session.new:
            if isinstance(order, Order):
                outbox.add(session, "orders", order.name.encode())


LATE = """
import sys, sqlalchemy as sa
from sqlalchemy.orm import Session

engine = sa.create_engine(sys.argv[1])
with Session(engine) as session, session.begin():
    session.execute(sa.text("INSERT INTO shop_order (name) VALUES ('a')"))
    from outbox import Outbox
    Outbox().add(session, "orders", b"a")
engine.dispose()
"""


def test_a_session_that_began_before_the_first_outbox_of_the_process(shop: Shop) -> None:
    url = shop.engine.url.render_as_string(hide_password=False)
    subprocess.run([sys.executable, "-c", LATE, url], check=True)
    assert shop.holds("a")
