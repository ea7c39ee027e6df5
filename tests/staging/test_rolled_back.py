"""A transaction that the database or raw text has rolled back, under a session that goes on as if it were there: what was
staged in it is gone, as its data is, and what comes after is committed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.services import MARIADB
from tests.services.waiting import wait_until
from tests.staging.conftest import mariadb_engine
from tests.staging.shop import Order, Shop, outbox, place, tell


@pytest.fixture(autouse=True)
def nothing_is_called_lost(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


# ---------------------------------------------------------------- by raw text


@pytest.mark.parametrize("text", ["ROLLBACK", "rollback;", " ROLLBACK /* why */"])
def test_raw_rollback_text_takes_the_message(shop: Shop, text: str) -> None:
    with Session(shop.engine) as session:
        place(session, "a")
        session.flush()
        session.execute(sa.text(text))
        if shop.engine.dialect.name == "sqlite" and shop.engine.dispatch.begin:
            session.execute(sa.text("BEGIN"))  # nobody sends one for what follows
        place(session, "b")
        session.commit()
    assert shop.holds("b")


def test_raw_rollback_text_leaves_what_was_not_flushed_yet(shop: Shop) -> None:
    with Session(shop.engine) as session:
        session.scalars(sa.select(Order)).all()
        place(session, "a")
        session.connection().exec_driver_sql("SELECT 1")
        if shop.engine.dialect.name == "sqlite" and not shop.engine.dispatch.begin:
            session.connection().exec_driver_sql("BEGIN")
        session.connection().exec_driver_sql("ROLLBACK")
        if shop.engine.dialect.name == "sqlite" and shop.engine.dispatch.begin:
            session.connection().exec_driver_sql("BEGIN")
        session.commit()
    assert shop.holds("a")


@pytest.mark.parametrize("text", ["ROLLBACK TO SAVEPOINT mine", "rollback to mine;"])
def test_a_savepoint_made_and_rolled_back_as_text_takes_its_own_message_and_no_other(shop: Shop, text: str) -> None:
    with Session(shop.engine) as session, session.begin():
        place(session, "a")
        session.flush()
        session.execute(sa.text("SAVEPOINT mine"))
        place(session, "b")
        session.flush()
        session.execute(sa.text(text))
        session.expire_all()
        place(session, "c")
    assert shop.holds("a", "c")


@pytest.mark.parametrize(
    "text",
    ["ROLLBACK TO mine", 'rollback work to savepoint "mine"', "ROLLBACK TRANSACTION TO SAVEPOINT MINE /* why */"],
)
def test_a_savepoint_from_before_anything_was_staged_takes_all_of_it_whatever_its_spelling(
    shop: Shop, text: str
) -> None:
    dialect = shop.engine.dialect.name
    text = text.replace("TRANSACTION", "WORK") if dialect == "mysql" else text
    text = text.replace('"', "`") if dialect == "mysql" else text
    text = text.replace("work ", "transaction ") if dialect == "sqlite" else text
    with Session(shop.engine) as session, session.begin():
        session.add(Order(name="a"))
        session.flush()
        session.execute(sa.text("SAVEPOINT Mine"))
        place(session, "b")
        session.flush()
        session.execute(sa.text(text))
        session.expire_all()
        tell(session, "a")
    assert shop.holds("a")


def test_a_savepoint_made_and_released_as_text_keeps_its_message(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        place(session, "a")
        session.flush()
        session.execute(sa.text("SAVEPOINT mine"))
        place(session, "b")
        session.flush()
        session.execute(sa.text("RELEASE SAVEPOINT mine"))
    assert shop.holds("a", "b")


# ---------------------------------------------------------------- by SQLite


def test_what_sqlite_rolls_back_with_a_failed_statement_takes_the_message(shop: Shop) -> None:
    """A trigger's RAISE(ROLLBACK), INSERT OR ROLLBACK, a full disk: the transaction is gone, and no session hears of it."""
    if shop.engine.dialect.name != "sqlite":
        return
    with Session(shop.engine) as session:
        place(session, "a")
        session.flush()
        with pytest.raises(sa.exc.IntegrityError):
            session.execute(sa.text("INSERT OR ROLLBACK INTO shop_order (name) VALUES ('a')"))
        if shop.engine.dispatch.begin:
            session.execute(sa.text("BEGIN"))
        session.execute(sa.insert(Order).values(name="b"))
        tell(session, "b")
        session.commit()
    assert shop.holds("b")


def test_what_a_failed_statement_leaves_open_keeps_the_message(shop: Shop) -> None:
    if shop.engine.dialect.name == "postgresql":
        return  # there the transaction can only be rolled back
    with Session(shop.engine) as session:
        place(session, "a")
        session.flush()
        with pytest.raises(sa.exc.IntegrityError):
            session.execute(sa.insert(Order).values(name="a"))
        session.commit()
    assert shop.holds("a")


# ---------------------------------------------------------------- by MariaDB and MySQL


@contextmanager
def deadlocked(shop: Shop, session: Session) -> Iterator[None]:
    """Within: a statement of the session's on the order ``second`` fails with a deadlock. It has locked ``first``."""
    ready, over = threading.Event(), threading.Event()

    def other() -> None:
        with shop.engine.connect() as connection:
            # heavier than the session's transaction, so that InnoDB chooses that one
            connection.execute(sa.insert(Order), [{"name": f"heavy-{n}"} for n in range(200)])
            connection.execute(sa.update(Order).where(Order.name == "second").values(name="second"))
            connection.execute(sa.select(Order.id).where(Order.name == "second").with_for_update())
            ready.set()
            connection.execute(sa.select(Order.id).where(Order.name == "first").with_for_update())
            over.wait(10)
            connection.rollback()

    session.execute(sa.select(Order.id).where(Order.name == "first").with_for_update())
    thread = threading.Thread(target=other)
    thread.start()
    assert ready.wait(10)
    waiting = sa.text("SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'")
    with shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as look:
        assert wait_until(lambda: bool(look.scalar(waiting)), 10)
    try:
        yield
    finally:
        over.set()
        thread.join(10)


LOCK_SECOND = sa.update(Order).where(Order.name == "second").values(name="second")


@pytest.fixture
def two_orders(mariadb_shop: Shop) -> Shop:
    with Session(mariadb_shop.engine) as session, session.begin():
        session.add_all([Order(name="first"), Order(name="second")])
        tell(session, "first")
        tell(session, "second")
    return mariadb_shop


def test_a_deadlock_that_the_application_ignores_takes_the_message(two_orders: Shop) -> None:
    """InnoDB rolls back the whole transaction, and a statement that follows begins another one."""
    with Session(two_orders.engine) as session:
        place(session, "a")
        session.flush()
        with deadlocked(two_orders, session), pytest.raises(sa.exc.OperationalError, match="1213"):
            session.execute(LOCK_SECOND)
        session.execute(sa.insert(Order).values(name="b"))
        tell(session, "b")
        session.commit()
    assert two_orders.holds("first", "second", "b")


@pytest.mark.skipif(MARIADB.name == "mysql", reason="MySQL has no such setting")
def test_a_row_that_changed_since_the_snapshot_takes_the_message(two_orders: Shop) -> None:
    """MariaDB rolls the whole transaction back, too, where innodb_snapshot_isolation is on (from 11.8 on by default)."""
    snapshot = {"init_command": "SET innodb_snapshot_isolation = 1"}
    engine = mariadb_engine(two_orders.engine.url, connect_args=snapshot)
    with Session(engine) as session:
        session.scalars(sa.select(Order)).all()
        with Session(two_orders.engine) as other, other.begin():
            other.execute(sa.update(Order).where(Order.name == "second").values(id=1000))
        place(session, "a")
        session.flush()
        with pytest.raises(sa.exc.OperationalError, match="1020"):
            session.execute(LOCK_SECOND)
        session.execute(sa.insert(Order).values(name="b"))
        tell(session, "b")
        session.commit()
    engine.dispose()
    assert two_orders.holds("first", "second", "b")


def test_a_deadlock_in_a_savepoint_takes_the_messages_from_before_it_too(two_orders: Shop) -> None:
    """Rolling back to the savepoint fails then: it does not exist (1305)."""
    with Session(two_orders.engine) as session:
        place(session, "a")
        session.flush()
        with deadlocked(two_orders, session), pytest.raises(sa.exc.OperationalError, match=r"1305|1213"):
            _place_and_lock_second_in_a_savepoint(session)
        with suppress(sa.exc.SQLAlchemyError):
            session.commit()
        session.rollback()
        place(session, "c")
        session.commit()
    assert two_orders.holds("first", "second", "c")


def _place_and_lock_second_in_a_savepoint(session: Session) -> None:
    with session.begin_nested():
        place(session, "b")
        session.execute(LOCK_SECOND)


def test_a_deadlock_in_a_flush_and_another_try_of_it_all(two_orders: Shop) -> None:
    with Session(two_orders.engine) as session:
        place(session, "a")
        session.flush()
        second = session.scalars(sa.select(Order).where(Order.name == "second")).one()
        with deadlocked(two_orders, session):
            second.name = "2nd"
            with pytest.raises(sa.exc.OperationalError, match="1213"):
                session.flush()
        session.rollback()
        place(session, "a")
        session.commit()
    assert two_orders.holds("first", "second", "a")


@pytest.fixture
def impatient(two_orders: Shop) -> Iterator[tuple[Shop, sa.Connection]]:
    """A shop that waits a second for a lock, and a transaction that holds the order ``second``."""
    engine = mariadb_engine(two_orders.engine.url, connect_args={"init_command": "SET innodb_lock_wait_timeout = 1"})
    with two_orders.engine.connect() as holder:
        holder.execute(sa.select(Order.id).where(Order.name == "second").with_for_update())
        yield Shop(engine), holder
    engine.dispose()


def test_a_lock_that_was_not_had_in_time_undoes_its_statement_only(impatient: tuple[Shop, sa.Connection]) -> None:
    """Or the whole transaction, if the server was started with innodb_rollback_on_timeout."""
    shop, holder = impatient
    with Session(shop.engine) as session:
        undone = session.scalar(sa.text("SELECT @@innodb_rollback_on_timeout"))
        place(session, "a")
        session.flush()
        with pytest.raises(sa.exc.OperationalError, match="1205"):
            session.execute(LOCK_SECOND)
        place(session, "b")
        session.commit()
    holder.rollback()
    assert shop.holds("first", "second", *[] if undone else ["a"], "b")


def test_what_waits_in_the_sessions_of_others_is_left_alone(two_orders: Shop) -> None:
    with Session(two_orders.engine) as other:
        place(other, "other")
        other.flush()
        with Session(two_orders.engine) as session:
            place(session, "a")
            session.flush()
            session.execute(sa.text("ROLLBACK"))
        assert [message.payload for message in outbox.staged(other)] == [b"other"]
        other.commit()
    assert two_orders.holds("first", "second", "other")


def test_a_failed_statement_on_a_connection_without_messages_is_nobodys_business(shop: Shop) -> None:
    with shop.engine.connect() as connection, pytest.raises(sa.exc.DBAPIError):
        connection.exec_driver_sql("no such statement")
    assert shop.holds()
