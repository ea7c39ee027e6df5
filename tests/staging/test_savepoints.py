"""Savepoints, of the session and of its connection: what is rolled back takes exactly its own messages with it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import TransactionError
from tests.staging.shop import Order, Shop, outbox, place, tell


def test_a_released_savepoint_keeps_its_message(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        place(session, "a")
        with session.begin_nested():
            place(session, "b")
    assert shop.holds("a", "b")


def test_a_rolled_back_savepoint_takes_its_own_message_and_no_other(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        place(session, "a")
        savepoint = session.begin_nested()
        place(session, "b")
        savepoint.rollback()
        place(session, "c")
    assert shop.holds("a", "c")


def test_an_exception_in_a_savepoint_takes_its_own_message_and_no_other(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        with suppress(ZeroDivisionError), session.begin_nested():
            place(session, "a")
            raise ZeroDivisionError
        place(session, "b")
    assert shop.holds("b")


def test_a_savepoint_that_is_closed_takes_its_own_message_and_no_other(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        place(session, "a")
        savepoint = session.begin_nested()
        place(session, "b")
        session.flush()
        savepoint.close()
        place(session, "c")
    assert shop.holds("a", "c")


@pytest.mark.parametrize("end", ["rollback", "close"])
def test_a_message_in_a_savepoint_that_never_reached_the_database_goes_with_it(shop: Shop, end: str) -> None:
    with Session(shop.engine) as session, session.begin():
        tell(session, "root, before there is a connection")
        savepoint = session.begin_nested()
        tell(session, "a")
        getattr(savepoint, end)()
        session.connection()
        savepoint = session.begin_nested()
        tell(session, "b")
        getattr(savepoint, end)()
    assert shop.messages() == ["root, before there is a connection"]


@pytest.mark.parametrize("end", ["rollback", "close"])
def test_a_message_from_before_the_connection_goes_with_its_savepoint(shop: Shop, end: str) -> None:
    with Session(shop.engine) as session, session.begin():
        tell(session, "root")
        savepoint = session.begin_nested()
        tell(session, "a")
        session.connection()
        getattr(savepoint, end)()
    assert shop.messages() == ["root"]


def test_a_message_staged_before_a_savepoint_survives_a_flush_error_in_it(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        place(session, "a")
        session.flush()
        with suppress(sa.exc.IntegrityError), session.begin_nested():
            place(session, "a")
            session.flush()
    assert shop.holds("a")


def test_a_savepoint_after_a_flush_error_refuses_messages_until_it_is_rolled_back(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        place(session, "a")
        savepoint = session.begin_nested()
        place(session, "a")
        with pytest.raises(sa.exc.IntegrityError):
            session.flush()
        with pytest.raises(TransactionError, match="not active"):
            tell(session, "b")
        savepoint.rollback()
        place(session, "c")
    assert shop.holds("a", "c")


def test_a_released_inner_savepoint_goes_with_its_rolled_back_outer_one(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        place(session, "root")
        outer = session.begin_nested()
        with session.begin_nested():
            place(session, "a")
        outer.rollback()
    assert shop.holds("root")


def test_an_outer_savepoint_that_is_released_with_its_inner_one_open_keeps_both(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        outer = session.begin_nested()
        place(session, "a")
        session.begin_nested()
        place(session, "b")
        outer.commit()
    assert shop.holds("a", "b")


def test_an_outer_savepoint_that_is_rolled_back_with_its_inner_one_open_takes_both(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        place(session, "root")
        outer = session.begin_nested()
        place(session, "a")
        session.begin_nested()
        place(session, "b")
        session.flush()
        outer.rollback()
    assert shop.holds("root")


def test_a_savepoint_that_is_left_open_at_the_end_of_a_begin_block_is_committed(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        session.begin_nested()
        place(session, "a")
    assert shop.holds("a")


def test_a_savepoint_that_is_left_open_at_commit_is_committed(shop: Shop) -> None:
    with Session(shop.engine) as session:
        session.begin_nested()
        place(session, "a")
        session.commit()
    assert shop.holds("a")


def test_a_message_alone_in_a_savepoint_that_is_left_open_is_committed(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        session.begin_nested()
        tell(session, "a")
    assert shop.messages() == ["a"]


def test_a_message_alone_in_a_released_savepoint_goes_with_the_root(shop: Shop) -> None:
    with Session(shop.engine) as session:
        with session.begin_nested():
            tell(session, "a")
        session.rollback()
        with session.begin_nested():
            tell(session, "b")
        session.commit()
    assert shop.messages() == ["b"]


def test_a_rolled_back_session_takes_the_messages_of_its_savepoints(shop: Shop) -> None:
    with Session(shop.engine) as session:
        place(session, "a")
        with session.begin_nested():
            place(session, "b")
        session.rollback()
    assert shop.holds()


def test_a_savepoint_as_first_statement_and_then_a_rollback(shop: Shop) -> None:
    """sqlite3 sends no BEGIN before a SAVEPOINT, so by its release the order is committed: then so is its message."""
    with Session(shop.engine) as session:
        with session.begin_nested():
            place(session, "a")
        session.rollback()
    assert shop.holds(*["a"] if shop.releases_commit else [])


def test_a_savepoint_in_a_savepoint_as_first_statement_and_then_a_rollback(shop: Shop) -> None:
    with Session(shop.engine) as session:
        with session.begin_nested():
            place(session, "a")
            with suppress(ZeroDivisionError), session.begin_nested():
                place(session, "b")
                raise ZeroDivisionError
            with session.begin_nested():
                place(session, "c")
        place(session, "d")
        session.rollback()
    assert shop.holds(*["a", "c"] if shop.releases_commit else [])


def test_a_rolled_back_savepoint_of_the_connection_takes_its_own_message_and_no_other(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        place(session, "a")
        session.flush()
        savepoint = session.connection().begin_nested()
        session.execute(sa.insert(Order).values(name="b"))
        tell(session, "b")
        savepoint.rollback()
        place(session, "c")
    assert shop.holds("a", "c")


def test_savepoints_of_the_connection_within_each_other_take_what_was_staged_since(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        connection = session.connection()

        def order(name: str) -> None:
            connection.execute(sa.insert(Order).values(name=name))
            tell(session, name)

        order("a")
        outer = connection.begin_nested()
        order("b")
        with connection.begin_nested():
            order("c")
        inner = connection.begin_nested()
        order("d")
        inner.rollback()
        order("e")
        outer.rollback()
        order("f")
        with connection.begin_nested():
            order("g")
    assert shop.holds("a", "f", "g")


def test_a_savepoint_of_the_connection_from_before_anything_was_staged_takes_all_of_it(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        session.execute(sa.insert(Order).values(name="unannounced"))
        savepoint = session.connection().begin_nested()
        session.execute(sa.insert(Order).values(name="a"))
        tell(session, "a")
        savepoint.rollback()
        session.execute(sa.delete(Order))
        place(session, "b")
    assert shop.holds("b")


def test_savepoints_are_known_though_a_listener_puts_comments_into_every_statement(shop: Shop) -> None:
    @sa.event.listens_for(shop.engine, "before_cursor_execute", retval=True)
    def comment(connection: object, cursor: object, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        return f"/* shop */ {statement} /* end */", parameters

    with Session(shop.engine) as session, session.begin():
        place(session, "a")
        session.flush()
        savepoint = session.connection().begin_nested()
        tell(session, "b")
        savepoint.rollback()
    assert shop.holds("a")


def test_savepoints_from_before_the_first_outbox_of_the_process_do_not_confuse_later_ones(shop: Shop) -> None:
    """The numbers in their names go on; ours begin when the first message is staged."""
    with Session(shop.engine) as session, session.begin():
        connection = session.connection()
        for _ in range(3):
            connection.begin_nested().commit()
        place(session, "a")
        session.flush()
        savepoint = connection.begin_nested()
        tell(session, "b")
        savepoint.rollback()
    assert shop.holds("a")


def test_staged_shows_what_savepoints_left(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        place(session, "a")
        savepoint = session.begin_nested()
        place(session, "b")
        assert [message.payload for message in outbox.staged(session)] == [b"a", b"b"]
        savepoint.rollback()
        assert [message.payload for message in outbox.staged(session)] == [b"a"]
