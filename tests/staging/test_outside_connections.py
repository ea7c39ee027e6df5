"""Connections that the session does not own, and connections without a session."""

from __future__ import annotations

from typing import Literal, get_args

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import TransactionError
from tests.staging.shop import Order, Shop, place, tell

JoinMode = Literal["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]
every_mode = pytest.mark.parametrize("mode", get_args(JoinMode))


@every_mode
def test_a_session_and_its_outside_transaction_that_are_committed(shop: Shop, mode: JoinMode) -> None:
    with shop.engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode=mode) as session:
            place(session, "a")
            session.commit()
        if transaction.is_active:
            transaction.commit()
    assert shop.holds("a")


@every_mode
def test_an_outside_transaction_that_is_rolled_back_after_the_session_was_committed(shop: Shop, mode: JoinMode) -> None:
    """The fixture of a test suite that rolls everything back."""
    with shop.engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode=mode) as session:
            place(session, "a")
            session.commit()
        if transaction.is_active:
            transaction.rollback()
    committed = mode == "control_fully" or (mode == "create_savepoint" and shop.releases_commit)
    assert shop.holds(*["a"] if committed else [])


@every_mode
def test_a_session_that_is_rolled_back_within_an_outside_transaction(shop: Shop, mode: JoinMode) -> None:
    with shop.engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode=mode) as session:
            place(session, "a")
            session.flush()
            session.rollback()
        if transaction.is_active:
            transaction.commit()
    assert shop.holds()


@every_mode
def test_a_session_that_is_flushed_and_whose_outside_transaction_is_committed(shop: Shop, mode: JoinMode) -> None:
    with shop.engine.connect() as connection:
        transaction = connection.begin()
        session = Session(connection, join_transaction_mode=mode)
        place(session, "a")
        session.flush()
        transaction.commit()
        session.close()
    assert shop.holds("a")


@every_mode
def test_a_session_that_is_flushed_and_closed_before_its_outside_transaction_is_committed(
    shop: Shop, mode: JoinMode
) -> None:
    with shop.engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode=mode) as session:
            place(session, "a")
            session.flush()
        if transaction.is_active:
            transaction.commit()
    kept = mode in ("conditional_savepoint", "rollback_only")  # the others roll back what they own
    assert shop.holds(*["a"] if kept else [])


@every_mode
def test_a_session_that_is_closed_before_its_changes_were_flushed(shop: Shop, mode: JoinMode) -> None:
    with shop.engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode=mode) as session:
            session.scalars(sa.select(Order)).all()
            place(session, "a")
        if transaction.is_active:
            transaction.commit()
    assert shop.holds()


@every_mode
def test_a_session_in_an_outside_savepoint_that_is_rolled_back(shop: Shop, mode: JoinMode) -> None:
    with shop.engine.connect() as connection, connection.begin():
        with Session(connection) as session:
            place(session, "root")
            session.commit()
        savepoint = connection.begin_nested()
        with Session(connection, join_transaction_mode=mode) as session:
            place(session, "a")
            session.flush()
            session.rollback()
        if savepoint.is_active:
            savepoint.rollback()
    assert shop.holds("root")


@every_mode
def test_a_session_in_an_outside_savepoint_that_is_released(shop: Shop, mode: JoinMode) -> None:
    with shop.engine.connect() as connection, connection.begin():
        savepoint = connection.begin_nested()
        with Session(connection, join_transaction_mode=mode) as session:
            place(session, "a")
            session.commit()
        if savepoint.is_active:
            savepoint.commit()
    assert shop.holds("a")


@every_mode
def test_two_sessions_share_an_outside_connection_and_one_is_rolled_back(shop: Shop, mode: JoinMode) -> None:
    with shop.engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode="rollback_only") as first:
            place(first, "a")
            first.flush()
            with Session(connection, join_transaction_mode=mode) as second:
                place(second, "b")
                second.flush()
                second.rollback()
        if transaction.is_active:
            transaction.commit()
    assert shop.holds(*["a"] if mode == "create_savepoint" else [])


def test_a_session_that_begins_the_outside_connections_transaction_owns_it(shop: Shop) -> None:
    with shop.engine.connect() as connection:
        session = Session(connection)
        place(session, "a")
        session.commit()
        place(session, "b")
        session.rollback()
        place(session, "c")
        session.flush()
        session.close()
    assert shop.holds("a")


def test_an_outside_commit_leaves_unflushed_changes_and_their_message_for_the_next(shop: Shop) -> None:
    with shop.engine.connect() as connection:
        connection.begin()
        session = Session(connection, join_transaction_mode="rollback_only")
        session.scalars(sa.select(Order)).all()
        place(session, "a")
        connection.commit()
        assert shop.holds()
        session.flush()
        connection.commit()
        assert shop.holds("a")
        place(session, "b")
        connection.commit()
        session.close()
        connection.commit()
    assert shop.holds("a")


def test_a_commit_through_the_sessions_own_connection_takes_the_message_along(shop: Shop) -> None:
    with Session(shop.engine) as session:
        place(session, "a")
        session.flush()
        session.connection().commit()
    assert shop.holds("a")


def test_a_commit_through_the_sessions_own_connection_leaves_unflushed_changes_and_their_message(shop: Shop) -> None:
    with Session(shop.engine) as session:
        session.connection()
        place(session, "a")
        session.connection().commit()
    assert shop.holds()


def test_a_commit_through_the_connection_and_then_through_the_session(shop: Shop) -> None:
    with Session(shop.engine) as session:
        place(session, "a")
        session.flush()
        session.connection().commit()
        place(session, "b")
        with pytest.raises(sa.exc.InvalidRequestError, match="inactive"):
            session.commit()
    assert shop.holds("a")


def test_a_message_after_a_commit_through_the_connection_is_refused_with_the_commit_of_the_session(shop: Shop) -> None:
    with Session(shop.engine) as session:
        place(session, "a")
        session.flush()
        session.connection().commit()
        tell(session, "b")
        with pytest.raises(TransactionError, match="no open transaction"):
            session.commit()
    assert shop.holds("a")


def test_a_core_connection_inserts_at_once_in_its_transaction(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        connection.execute(sa.insert(Order).values(name="a"))
        tell(connection, "a")
        assert connection.scalar(sa.text("SELECT count(*) FROM outbox_message")) == 1
    with shop.engine.connect() as connection:
        tell(connection, "b")
        connection.execute(sa.insert(Order).values(name="b"))
        connection.commit()
        tell(connection, "c")
        connection.rollback()
    assert shop.holds("a", "b")


def test_a_core_savepoint_that_is_rolled_back_takes_its_message(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        tell(connection, "a")
        connection.execute(sa.insert(Order).values(name="a"))
        savepoint = connection.begin_nested()
        tell(connection, "b")
        savepoint.rollback()
    assert shop.holds("a")


def test_a_closed_or_failed_connection_refuses_messages(shop: Shop) -> None:
    with shop.engine.connect() as connection:
        transaction = connection.begin()
        connection.begin_nested()
        with pytest.raises(sa.exc.DBAPIError):
            connection.exec_driver_sql("no such statement")
        transaction.rollback()
    with pytest.raises(TransactionError, match="closed"):
        tell(connection, "a")
    with shop.engine.connect() as connection:
        connection.begin()
        connection.invalidate()
        with pytest.raises(TransactionError, match="lost"):
            tell(connection, "b")
        connection.rollback()
    assert shop.holds()


@pytest.mark.parametrize("end", ["close", "rollback"])
def test_a_commit_through_the_connection_whose_insert_fails_leaves_nothing_open_behind_it(shop: Shop, end: str) -> None:
    """SQLAlchemy takes the transaction for ended then, and rolls nothing back: whoever has the connection next, from the
    pool or the same, would commit the order without its message."""
    _fails_once(shop.engine)
    with shop.engine.connect() as connection:
        session = Session(connection, join_transaction_mode="rollback_only")
        connection.begin()
        place(session, "a")
        session.flush()
        with pytest.raises(RuntimeError, match="once"):
            connection.commit()
        session.close()
        if end == "rollback":
            connection.rollback()
            tell(connection, "b")
            connection.execute(sa.insert(Order).values(name="b"))
            connection.commit()
    with shop.engine.connect() as connection:
        tell(connection, "c")
        connection.execute(sa.insert(Order).values(name="c"))
        connection.commit()
    assert shop.holds(*["b"] if end == "rollback" else [], "c")


def test_so_does_one_in_two_phases(server_shop: Shop) -> None:
    _fails_once(server_shop.engine)
    with server_shop.engine.connect() as connection:
        transaction = connection.begin_twophase()
        session = Session(connection, join_transaction_mode="rollback_only")
        place(session, "a")
        session.flush()
        with pytest.raises(RuntimeError, match="once"):
            transaction.commit()
        session.close()
    with Session(server_shop.engine) as session, session.begin():
        place(session, "b")
    assert server_shop.holds("b")


def _fails_once(engine: sa.Engine) -> None:
    failures = [1]

    @sa.event.listens_for(engine, "before_cursor_execute")
    def fail_once(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if "INTO outbox_message" in statement and failures:
            failures.pop()
            raise RuntimeError("once")
