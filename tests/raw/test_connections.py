"""`add` and its like with a sync driver's own connection: what SQLAlchemy's connections promise."""

from __future__ import annotations

import datetime as dt
import sqlite3
import threading
import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
import wrapt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from outbox import EncodingError, Message, Outbox, TransactionError
from outbox.testing import capture
from tests.raw.shops import SYNC, RawShop
from tests.services.waiting import wait_until
from tests.staging.shop import outbox
from tests.staging.test_many import odd

INSERT = "INSERT INTO shop_order (name) VALUES ('{}')"

refused = pytest.raises(TransactionError, match="autocommit mode and in no transaction")
closed = pytest.raises(TransactionError, match="closed or lost")


def execute(connection: Any, statement: str) -> None:
    cursor = connection.cursor()
    cursor.execute(statement)
    cursor.close()


def place(connection: Any, name: str) -> Message:
    """An order and its message."""
    execute(connection, INSERT.format(name))
    return outbox.add(connection, "orders", name.encode(), key=name)


def set_autocommit(driver: str, connection: Any) -> None:
    if driver in ("pymysql", "mysqlclient"):
        connection.autocommit(True)
    elif driver == "sqlite3":
        connection.isolation_level = None
    else:
        connection.autocommit = True


def rows(shop: RawShop, table: sa.Table) -> list[dict[str, Any]]:
    with shop.engine.connect() as connection:
        found = connection.execute(sa.select(table).order_by(*table.primary_key.columns)).mappings()
        return [{name: value for name, value in row.items() if name not in ("position", "created_at")} for row in found]


def test_an_order_and_its_message_commit_together(shop: RawShop, connection: Any) -> None:
    message = place(connection, "a")
    assert shop.holds()
    connection.commit()
    place(connection, "b")
    connection.commit()
    assert shop.holds("a", "b")
    assert rows(shop, outbox.tables.message)[0]["id"] == message.id


def test_a_rollback_takes_both(shop: RawShop, connection: Any) -> None:
    place(connection, "a")
    connection.rollback()
    place(connection, "b")
    connection.commit()
    assert shop.holds("b")


def test_a_savepoint_that_is_rolled_back_takes_exactly_its_own(shop: RawShop, connection: Any) -> None:
    place(connection, "a")
    execute(connection, "SAVEPOINT one")
    place(connection, "b")
    execute(connection, "ROLLBACK TO SAVEPOINT one")
    place(connection, "c")
    execute(connection, "SAVEPOINT two")
    place(connection, "d")
    execute(connection, "RELEASE SAVEPOINT two")
    connection.commit()
    assert shop.holds("a", "c", "d")


def test_a_message_alone_begins_the_transaction_that_the_driver_would_begin(shop: RawShop, connection: Any) -> None:
    outbox.add(connection, "orders", b"a")
    connection.rollback()
    outbox.add(connection, "orders", b"b")
    connection.commit()
    assert shop.messages() == ["b"]


def test_autocommit_is_refused(driver: str, shop: RawShop, connection: Any) -> None:
    set_autocommit(driver, connection)
    with refused:
        outbox.add(connection, "orders", b"a")
    with refused:
        outbox.add_all(connection, [{"topic": "orders", "payload": b"a"}])
    with refused:
        outbox.claim(connection, "billing", "id")
    with refused:
        outbox.cancel(connection, uuid.uuid4())
    assert shop.messages() == []


def test_autocommit_is_not_refused_within_a_transaction_begun_by_hand(
    driver: str, shop: RawShop, connection: Any
) -> None:
    set_autocommit(driver, connection)
    if driver == "mysqlclient":
        execute(connection, "BEGIN")
        with pytest.raises(TransactionError, match="of a BEGIN this driver does not tell"):
            outbox.add(connection, "orders", b"a")
        return
    for name, end in (("a", "ROLLBACK"), ("b", "COMMIT")):
        execute(connection, "BEGIN")
        place(connection, name)
        execute(connection, end)
    with refused:
        outbox.add(connection, "orders", b"c")
    assert shop.holds("b")


def test_a_closed_connection_is_refused(shop: RawShop, connection: Any) -> None:
    connection.close()
    with closed:
        outbox.add(connection, "orders", b"a")


def test_what_cannot_be_encoded_raises_and_leaves_the_transaction_as_it_was(shop: RawShop, connection: Any) -> None:
    place(connection, "a")
    with pytest.raises(EncodingError, match="key is None"):
        outbox.add(connection, "orders", b"", key=None)  # type: ignore[call-overload]
    with pytest.raises(EncodingError, match="header 'a' is a int"):
        outbox.add_all(
            connection, [{"topic": "orders", "payload": b""}, {"topic": "orders", "payload": b"", "headers": {"a": 1}}]
        )
    connection.commit()
    assert shop.holds("a")


def test_rows_are_those_that_a_session_writes(shop: RawShop, connection: Any) -> None:
    """One by one and many at once, whatever is in them, due and scheduled."""
    due = dt.datetime(2040, 1, 2, 3, 4, 5, 678901, dt.UTC)
    messages = [odd(number, id=uuid.uuid4()) for number in range(130)]
    messages += [odd(number, id=uuid.uuid4(), deliver_at=due) for number in range(12)]
    with Session(shop.engine) as session:
        outbox.add_all(session, messages)
        session.commit()
    tables = (outbox.tables.message, outbox.tables.scheduled)
    expected = [rows(shop, table) for table in tables]
    assert [len(found) for found in expected] == [130, 12]
    for one_by_one in (False, True):
        with shop.engine.begin() as engine_connection:
            for table in tables:
                engine_connection.execute(sa.delete(table))
        if one_by_one:
            for message in messages:
                outbox.add(connection, **message)
        else:
            outbox.add_all(connection, messages)
        connection.commit()
        assert [rows(shop, table) for table in tables] == expected


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=255)
MESSAGE = st.fixed_dictionaries(
    {"topic": TEXT, "payload": st.none() | st.binary(max_size=300)},
    optional={
        "key": TEXT,
        "type": TEXT,
        "content_type": TEXT,
        "deliver_at": st.timedeltas(dt.timedelta(), dt.timedelta(9)),
    },
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(MESSAGE, min_size=1, max_size=12))
def test_whatever_is_in_a_message_is_what_comes_out(
    shop: RawShop, connection: Any, messages: list[dict[str, Any]]
) -> None:
    added = outbox.add_all(connection, messages)
    connection.commit()
    for table in (outbox.tables.message, outbox.tables.scheduled):
        expected = [message for message in added if (message.deliver_at is None) == (table is outbox.tables.message)]
        found = {row["id"]: row for row in rows(shop, table)}
        for message in expected:
            row = found[message.id]
            for name in ("topic", "payload", "key", "type", "content_type", "deliver_at"):
                assert row.get(name) == getattr(message, name)


def test_messages_beyond_one_statement_keep_their_order(shop: RawShop, connection: Any) -> None:
    added = outbox.add_all(connection, [{"topic": "orders", "payload": str(n).encode()} for n in range(1500)])
    connection.commit()
    assert shop.messages() == [str(n) for n in range(1500)]
    assert [row["id"] for row in rows(shop, outbox.tables.message)] == [message.id for message in added]


def test_nothing_staged_and_nothing_added_is_nothing(shop: RawShop, connection: Any) -> None:
    assert outbox.add_all(connection, []) == []
    place(connection, "a")
    assert outbox.staged(connection) == []


def test_a_scheduled_message_can_be_cancelled_once(shop: RawShop, connection: Any) -> None:
    message = outbox.add(connection, "orders", b"a", deliver_at=dt.timedelta(hours=1))
    connection.commit()
    assert outbox.cancel(connection, message.id)
    connection.rollback()
    assert outbox.cancel(connection, message.id)
    assert not outbox.cancel(connection, message.id)
    connection.commit()
    assert rows(shop, outbox.tables.scheduled) == []


def test_a_message_is_claimed_once(shop: RawShop, connection: Any) -> None:
    id = uuid.uuid4()
    assert outbox.claim(connection, "billing", id)
    connection.rollback()
    assert outbox.claim(connection, "billing", id)
    assert not outbox.claim(connection, "billing", str(id))
    connection.commit()
    assert not outbox.claim(connection, "billing", id)
    assert outbox.claim(connection, "mailer", id)


def test_the_replay_of_a_dead_letter_is_claimed_once(shop: RawShop, connection: Any) -> None:
    id = uuid.uuid4()
    inbox = outbox.tables.inbox
    with shop.engine.begin() as engine_connection:
        engine_connection.execute(
            inbox.insert(), {"consumer": "billing", "message_id": id, "outcome": "dead", "cycle": 2}
        )
    assert not outbox.claim(connection, "billing", id)
    assert not outbox.claim(connection, "billing", id, cycle=1)
    assert outbox.claim(connection, "billing", id, cycle=2)
    assert not outbox.claim(connection, "billing", id, cycle=2)
    connection.commit()
    with shop.engine.connect() as engine_connection:
        outcome, at = engine_connection.execute(sa.select(inbox.c.outcome, inbox.c.processed_at)).one()
    assert outcome == "done"
    assert abs(dt.datetime.now(dt.UTC) - at) < dt.timedelta(minutes=5)


def test_a_connection_from_an_engine_s_pool_is_one_too(shop: RawShop) -> None:
    connection = shop.engine.raw_connection()
    place(connection, "a")
    connection.commit()
    connection.close()
    with pytest.raises(TransactionError, match="given back to its pool"):
        outbox.add(connection, "orders", b"b")
    assert shop.holds("a")


def test_captured_messages_are_those_that_were_inserted(shop: RawShop, connection: Any) -> None:
    with capture(outbox) as sent:
        place(connection, "a")
        outbox.add_all(connection, [{"topic": "orders", "payload": b"b"}, {"topic": "other", "payload": b"c"}])
    assert [message.payload for message in sent] == [b"a", b"b", b"c"]


@pytest.mark.parametrize("driver", [name for name in SYNC if name != "sqlite3"], indirect=True)
def test_messages_of_an_entity_are_in_the_order_of_its_lock(shop: RawShop, connect: Callable[[], Any]) -> None:
    with shop.engine.begin() as engine_connection:
        engine_connection.exec_driver_sql(INSERT.format("entity"))
    first, second = connect(), connect()
    execute(second, "SELECT 1")  # its transaction is the older one
    lock = "UPDATE shop_order SET name = 'entity' WHERE name = 'entity'"
    execute(first, lock)
    got = threading.Event()

    def wait_for_it() -> None:
        execute(second, lock)
        got.set()
        outbox.add(second, "orders", b"second", key="entity")
        second.commit()

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    assert not got.wait(0.2)
    outbox.add(first, "orders", b"first", key="entity")
    first.commit()
    thread.join(10)
    assert shop.messages() == ["first", "second"]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"], indirect=True)
def test_a_transaction_that_failed_is_refused(shop: RawShop, connection: Any) -> None:
    place(connection, "a")
    with pytest.raises((psycopg.errors.DivisionByZero, Exception), match="division by zero"):
        execute(connection, "SELECT 1/0")
    with pytest.raises(TransactionError, match="has failed and can only be rolled back"):
        outbox.add(connection, "orders", b"b")
    connection.rollback()
    place(connection, "b")
    connection.commit()
    assert shop.holds("b")


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_psycopg_s_transaction_blocks_and_cursors_of_another_kind(
    shop: RawShop, connection: psycopg.Connection
) -> None:
    connection.autocommit = True
    connection.cursor_factory = psycopg.RawCursor  # $1, not %s
    connection.row_factory = psycopg.rows.scalar_row  # type: ignore[assignment]
    with connection.transaction():
        place(connection, "a")
        with connection.transaction():
            place(connection, "b")
            raise psycopg.Rollback
        place(connection, "c")
    assert shop.holds("a", "c")


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_a_claim_in_a_pipeline_waits_for_its_answer(shop: RawShop, connection: psycopg.Connection) -> None:
    with connection.pipeline():
        place(connection, "a")
        assert outbox.claim(connection, "billing", "id")
        assert not outbox.claim(connection, "billing", "id")
        message = outbox.add(connection, "orders", b"", deliver_at=dt.timedelta(hours=1))
        assert outbox.cancel(connection, message.id)
        outbox.add_all(connection, [{"topic": "other", "payload": b"x"}] * 3)
        connection.commit()
    connection.autocommit = True
    with connection.transaction(), connection.pipeline() as pipeline:
        execute(connection, INSERT.format("b"))
        with pytest.raises(TransactionError, match=r"does not know whether .* call pipeline.sync\(\) first"):
            outbox.add(connection, "orders", b"b")
        pipeline.sync()
        outbox.add(connection, "orders", b"b")
    assert shop.orders() == ["a", "b"]
    assert shop.messages() == ["a", "x", "x", "x", "b"]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pymysql"], indirect=True)
def test_a_connection_whose_session_was_ended_is_refused_or_fails(shop: RawShop, connection: Any) -> None:
    place(connection, "a")
    with shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
        if shop.engine.dialect.name == "postgresql":
            others = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            other.exec_driver_sql(f"SELECT pg_terminate_backend(pid) FROM ({others}) AS others")
        else:
            others = "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()"
            for id in other.exec_driver_sql(others).scalars().all():
                other.exec_driver_sql(f"KILL {id}")
    with pytest.raises(Exception):  # noqa: B017  # each driver's own
        outbox.add(connection, "orders", b"b")
    with closed:
        outbox.add(connection, "orders", b"b")
    assert shop.holds()


def test_a_read_only_connection_says_so(driver: str, shop: RawShop, connection: Any, connect: Any) -> None:
    place(connection, "a")
    connection.commit()
    if driver == "sqlite3":
        connection = sqlite3.connect(f"file:{shop.url.database}?mode=ro", uri=True)
    else:
        execute(connection, "START TRANSACTION READ ONLY" if "mysql" in driver else "SET TRANSACTION READ ONLY")
    with pytest.raises(Exception, match=r"(?i)read.?only"):
        outbox.add(connection, "orders", b"b")
    connection.rollback()
    connection.close()
    assert shop.holds("a")


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"], indirect=True)
def test_a_schema_and_a_prefix_that_need_quotes(shop: RawShop, connection: Any) -> None:
    other = Outbox(schema="select", prefix="shop_")
    with shop.engine.begin() as engine_connection:
        engine_connection.execute(sa.schema.CreateSchema("select"))
        other.metadata.create_all(engine_connection)
    message = other.add(connection, "orders", b"a", deliver_at=dt.timedelta(hours=1))
    other.add_all(connection, [{"topic": "orders", "payload": b"a"}] * 20)
    assert other.claim(connection, "billing", "id")
    assert other.cancel(connection, message.id)
    connection.commit()
    assert len(rows(shop, other.tables.message)) == 20
    assert shop.holds()
    with shop.engine.begin() as engine_connection:
        engine_connection.execute(sa.schema.DropSchema("select", cascade=True))


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_of_two_claims_at_once_the_second_waits_and_is_false(shop: RawShop, connect: Callable[[], Any]) -> None:
    first, second = connect(), connect()
    claims: list[bool] = []

    def claim() -> None:
        claims.append(outbox.claim(second, "billing", "id"))
        second.commit()

    assert outbox.claim(first, "billing", "id")
    thread = threading.Thread(target=claim)
    thread.start()
    waiting = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'transactionid'"
    )
    with shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
        assert wait_until(lambda: other.exec_driver_sql(waiting).scalar() == 1, 10)
    assert claims == []
    place(first, "a")
    first.commit()
    thread.join(10)
    assert claims == [False]
    assert shop.holds("a")


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"], indirect=True)
def test_a_prepared_transaction_takes_its_messages_with_it(shop: RawShop, connect: Callable[[], Any]) -> None:
    for name, ends in (("a", "tpc_commit"), ("b", "tpc_rollback")):
        connection = connect()
        connection.tpc_begin(connection.xid(1, name, shop.url.database))
        place(connection, name)
        connection.tpc_prepare()
        assert "b" not in shop.orders()
        getattr(connection, ends)()
    assert shop.holds("a")


def test_a_proxy_of_a_tracer_is_taken_for_what_it_wraps(shop: RawShop, connection: Any) -> None:
    """As OpenTelemetry's and Datadog's are."""
    proxy = wrapt.ObjectProxy(connection)
    place(proxy, "a")
    outbox.add_all(proxy, [])
    assert outbox.claim(proxy, "billing", "id")
    proxy.commit()
    assert shop.holds("a")


@pytest.mark.parametrize("driver", ["sqlite3"], indirect=True)
@pytest.mark.parametrize(("mode", "level"), [(True, ""), (True, None), (-1, None)])
def test_sqlite_s_three_ways_to_autocommit(mode: bool | int, level: str | None, shop: RawShop) -> None:
    """``autocommit`` is an attribute since Python 3.12; -1 is the old way, where isolation_level counts."""

    class Connection(sqlite3.Connection):
        autocommit = mode

    connection = sqlite3.connect(str(shop.url.database), isolation_level=level, factory=Connection)
    with refused:
        outbox.add(connection, "orders", b"a")
    execute(connection, "BEGIN")
    place(connection, "a")
    execute(connection, "COMMIT")
    connection.close()
    assert shop.holds("a")


@pytest.mark.parametrize("driver", ["sqlite3"], indirect=True)
@pytest.mark.parametrize(("mode", "level"), [(False, ""), (-1, ""), (-1, "IMMEDIATE")])
def test_sqlite_s_ways_not_to(mode: bool | int, level: str | None, shop: RawShop) -> None:
    class Connection(sqlite3.Connection):
        autocommit = mode

    connection = sqlite3.connect(str(shop.url.database), isolation_level=level, factory=Connection)
    outbox.add(connection, "orders", b"a")
    connection.rollback()
    connection.close()
    assert shop.messages() == []
