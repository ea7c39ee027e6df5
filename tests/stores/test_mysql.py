"""MySQL and MariaDB: what is told apart, what a server's or a client's settings must not change."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pymysql
import pytest
import sqlalchemy as sa
from msgspec.structs import replace

from outbox import SchemaMismatch, StoreUnavailable
from outbox._message import bucket_of
from outbox.dialects import clock, insert_if_absent
from outbox.observe.schema import check_schema
from outbox.stores import open_store
from outbox.stores.engine import sync_engine_for
from outbox.transport import Outcome
from tests.relay.database import Database, row
from tests.relay.running import eventually, relay, running
from tests.relay.scripted import Scripted
from tests.services import MARIADB, MariadbServer
from tests.stores.users import users_engine

# ---------------------------------------------------------------- whose rows are whose


async def test_a_row_whose_position_is_anothers_after_a_fail_over_is_not_settled(on_mariadb: Database) -> None:
    store = open_store(on_mariadb.url, on_mariadb.tables)
    on_mariadb.add("a")
    (found,) = await store.read(None, (), (), 10)
    assert await store.settle([replace(found, id=str(uuid.uuid4()))]) == 0
    assert await store.settle([replace(found, id="it's \\")]) == 0
    assert await store.settle([found]) == 1
    await store.close()


async def test_keys_that_look_alike_are_different_keys(on_mariadb: Database) -> None:
    """MySQL's usual collations take some of these for others, and padded ones all that differ in spaces at the end."""
    keys = ["a", "A", "a ", "ä", "a\u0308", "ß", "ss", "\U0001f600", "\U0001f601"]
    failing = Scripted(lambda row, tries: Outcome.retry("no") if row.key == "a" else None)
    on_mariadb.add(*keys)
    on_mariadb.add("a", "a ", "A", bucket=bucket_of("a", uuid.UUID(int=0)))
    message = on_mariadb.tables.message
    with on_mariadb.engine.connect() as connection:
        for key in keys:
            (found,) = connection.scalars(sa.select(message.c.key).where(message.c.key == key).distinct())
            assert found == key
    async with running(relay(on_mariadb, failing)):
        await eventually(lambda: on_mariadb.count() == on_mariadb.count("parked") == 0)
    assert [letter.key for letter in on_mariadb.rows("dead_letter")] == ["a", "a"]
    assert sorted(map(str, failing.keys())) == sorted([*keys[1:], "a ", "A"])


@pytest.mark.parametrize("driver", ["mysql+pymysql", *(["mariadb+pymysql"] if MARIADB.name == "mariadb" else [])])
def test_one_table_serves_urls_that_begin_with_mysql_and_with_mariadb(on_mariadb: Database, driver: str) -> None:
    engine = sa.create_engine(sa.make_url(on_mariadb.url).set(drivername=driver))
    (id,) = on_mariadb.add("a")
    message = on_mariadb.tables.message
    with engine.begin() as connection:
        assert connection.scalar(sa.select(message.c.id).where(message.c.id == uuid.UUID(id))) == uuid.UUID(id)
        assert connection.exec_driver_sql("select id from outbox_message").scalar() == id
        assert (
            connection.exec_driver_sql(f"select count(*) from outbox_message where id = '{id.upper()}'").scalar() == 1
        )
    engine.dispose()


# ---------------------------------------------------------------- claims


def without_found_rows(database: Database) -> Callable[[], Any]:
    """Connections as a user's ``creator`` may make them: SQLAlchemy's own count an UPDATE that changes nothing."""
    url = sa.make_url(database.url)
    return lambda: pymysql.connect(
        host=url.host, port=url.port or 3306, user=url.username or "", database=url.database, charset="utf8mb4"
    )


@pytest.mark.parametrize("found_rows", [True, False])
def test_a_claim_is_true_once_however_the_client_counts(on_mariadb: Database, found_rows: bool) -> None:
    engine = sync_engine_for(on_mariadb.url)
    if not found_rows:
        engine = sa.create_engine("mysql+pymysql://", creator=without_found_rows(on_mariadb))
    id = uuid.uuid4()
    for expected in (True, False, False):
        with engine.begin() as connection:
            on_mariadb.add("a", connection=connection)  # gives an insert id out, on the same connection
            assert on_mariadb.outbox.claim(connection, "billing", id) is expected
    engine.dispose()


async def test_a_relay_works_however_the_client_counts(on_mariadb: Database) -> None:
    engine = sa.create_engine("mysql+pymysql://", creator=without_found_rows(on_mariadb))
    on_mariadb.add("a", "a", "b")
    broker = Scripted(lambda row, tries: Outcome.retry("once") if row.key == "a" and tries == 0 else None)
    async with running(relay(on_mariadb, broker, database=engine)):
        await eventually(lambda: on_mariadb.count() == on_mariadb.count("parked") == 0)
    assert sorted(map(str, broker.keys())) == ["a", "a", "b"]
    engine.dispose()


def test_an_insert_if_absent_refuses_what_does_not_fit(on_mariadb: Database) -> None:
    """INSERT IGNORE would cut it, or make '' of NULL, and say nothing."""
    inbox = on_mariadb.tables.inbox
    insert = insert_if_absent(inbox, "mysql")
    for wrong in ({"consumer": "x" * 129}, {"outcome": None}):
        given = {"consumer": "billing", "message_id": uuid.uuid4(), "outcome": "done"} | wrong
        with pytest.raises(sa.exc.DBAPIError), on_mariadb.engine.begin() as connection:
            connection.execute(insert, given)
    assert on_mariadb.count("inbox") == 0


# ---------------------------------------------------------------- servers and sessions as they are set

MODES = ["ANSI_QUOTES", "NO_BACKSLASH_ESCAPES", "ANSI", "", "TRADITIONAL", "NO_BACKSLASH_ESCAPES,ANSI_QUOTES"]


@pytest.mark.parametrize("mode", MODES)
async def test_whatever_the_sql_mode_is(on_mariadb: Database, mode: str) -> None:
    engine = users_engine(on_mariadb, f"set sql_mode = '{mode}'")
    message = on_mariadb.tables.message
    topics = ["it's", 'a "b"', "back\\slash", "\\'", "100 %", "\U0001f600"]
    payload = bytes(range(256)) + b"\\' \\0 %s"
    with engine.begin() as connection:
        rows = [row("k", topic=topic, payload=payload, headers='{"a": "\'\\\\"}') for topic in topics]
        connection.execute(sa.insert(message), rows)
    store = open_store(engine, on_mariadb.tables)
    found = await store.read(None, (), topics[:-1], 10)
    assert [(row.topic, row.payload, row.headers) for row in found] == [(topics[-1], payload, '{"a": "\'\\\\"}')]
    broker = Scripted(lambda row, tries: Outcome.reject("no") if row.topic == topics[0] else None)
    await store.close()
    await relay(on_mariadb, broker, database=engine).adrain()
    (letter,) = on_mariadb.rows("dead_letter")
    assert (letter.topic, letter.payload) == (topics[0], payload)
    assert on_mariadb.count() == 0
    engine.dispose()


@pytest.mark.parametrize("zone", ["+05:30", "-11:00"])
def test_times_are_utc_whatever_the_sessions_time_zone_is(on_mariadb: Database, zone: str) -> None:
    engine = users_engine(on_mariadb, f"set time_zone = '{zone}'")
    message = on_mariadb.tables.message
    with engine.begin() as connection:
        on_mariadb.add("a", connection=connection)
        now, created, seconds = connection.execute(
            sa.select(clock(), message.c.created_at, sa.text("unix_timestamp()"))
        ).one()
    assert abs(now.timestamp() - float(seconds)) < 2
    assert abs(created.timestamp() - float(seconds)) < 2
    engine.dispose()


def test_a_payload_beyond_what_the_server_takes_is_refused_in_the_apps_transaction(on_mariadb: Database) -> None:
    with on_mariadb.engine.connect() as connection:
        most = connection.exec_driver_sql("select @@max_allowed_packet").scalar_one()
    with on_mariadb.engine.connect() as connection:
        transaction = connection.begin()
        on_mariadb.add("a", connection=connection)
        # the server answers by closing the connection: gone away, or a packet bigger than max_allowed_packet
        with pytest.raises(sa.exc.OperationalError, match=r"1153|2006|2013"):
            on_mariadb.outbox.add(connection, "orders", b"x" * (most + 1))
        transaction.rollback()
    assert on_mariadb.count() == 0
    on_mariadb.add("b")
    assert on_mariadb.count() == 1


def test_tables_that_know_no_transactions_are_refused(on_mariadb: Database) -> None:
    with on_mariadb.engine.begin() as connection:
        connection.exec_driver_sql("alter table outbox_inbox engine=MyISAM")
    said = r"outbox_inbox is of MyISAM, expected InnoDB.*ALTER TABLE outbox_inbox ENGINE=InnoDB"
    with pytest.raises(SchemaMismatch, match=said), on_mariadb.engine.begin() as connection:
        check_schema(connection, on_mariadb.tables)


@pytest.mark.parametrize("driver", ["mysql", "mysql+pymysql", "mysql+asyncmy"])
async def test_what_a_server_refuses_is_said_in_a_line(
    on_mariadb: Database, mariadb: MariadbServer, driver: str
) -> None:
    url = sa.make_url(on_mariadb.url).set(drivername=driver)
    with on_mariadb.engine.begin() as connection:
        connection.exec_driver_sql("create user if not exists reader@'127.0.0.1' identified by 's3cret'")
        connection.exec_driver_sql("grant select on *.* to reader@'127.0.0.1'")
    reader = url.set(username="reader", password="s3cret")
    for wrong, said in (
        (reader.set(password="wr0ng"), r"Access denied for user 'reader'.* \(error 1045\)"),
        (reader.set(database="nowhere"), r"Unknown database 'nowhere' \(error 1049\)"),
        (reader.set(port=1), r"(?i)connect.*"),
        (reader, r"DELETE command denied.* \(error 1142\)"),
    ):
        store = open_store(wrong, on_mariadb.tables)
        with pytest.raises(StoreUnavailable, match=said) as told:
            await store.settle([(await store.read(None, (), (), 1) or [a_row()])[0]])
        assert "s3cret" not in str(told.value)
        assert "wr0ng" not in str(told.value)
        assert "\n" not in str(told.value)
        await store.close()


async def test_a_read_only_server_is_said(on_mariadb: Database, killable_mariadb: MariadbServer) -> None:
    """A replica, or a primary that became one."""
    database = Database(killable_mariadb.create_database()).create()
    with database.engine.begin() as connection:
        connection.exec_driver_sql("create user if not exists writer@'127.0.0.1'")
        connection.exec_driver_sql("grant select, delete on *.* to writer@'127.0.0.1'")
        connection.exec_driver_sql("set global read_only = 1")
    store = open_store(sa.make_url(database.url).set(username="writer"), database.tables)
    try:
        with pytest.raises(StoreUnavailable, match=r"--read-only.* \(error 1290\)"):
            await store.settle([a_row()])
    finally:
        with database.engine.begin() as connection:
            connection.exec_driver_sql("set global read_only = 0")
        await store.close()
        database.close()
        killable_mariadb.drop_database(database.url)


async def test_connections_that_the_server_kills_are_made_anew(on_mariadb: Database) -> None:
    store = open_store(on_mariadb.url, on_mariadb.tables)
    on_mariadb.add("a")
    rows = await store.read(None, (), (), 10)
    await store.settle([])
    with on_mariadb.engine.connect() as connection:
        others = "select id from information_schema.processlist where db = database() and id <> connection_id()"
        for (id,) in connection.exec_driver_sql(others).all():
            connection.exec_driver_sql(f"kill {id}")
    with pytest.raises(StoreUnavailable):
        await store.read(None, (), (), 10)
    assert [row.key for row in await store.read(None, (), (), 10)] == ["a"]
    assert await store.settle(rows) == 1
    await store.close()


def a_row() -> Any:
    from outbox._outgoing import Outgoing

    return Outgoing(1, str(uuid.uuid4()), "t", None, None, None, None, None, 0)


# ---------------------------------------------------------------- positions


def test_positions_are_not_given_out_again_after_a_crash_of_the_server(killable_mariadb: MariadbServer) -> None:
    """MySQL 5.7 began again above the highest row that was left."""
    database = Database(killable_mariadb.create_database()).create()
    database.add("a", "b", "c")
    highest = max(row.position for row in database.rows("message"))
    database.execute(sa.delete(database.tables.message))
    killable_mariadb.kill()
    killable_mariadb.restart()
    database.engine.dispose()
    database.add("d")
    assert [row.position for row in database.rows("message")] > [highest]
    database.close()
    killable_mariadb.drop_database(database.url)


async def test_many_gaps_between_what_is_in_flight(on_mariadb: Database) -> None:
    store = open_store(on_mariadb.url, on_mariadb.tables)
    on_mariadb.add(*[f"k{n}" for n in range(200)])
    rows = await store.read(None, (), (), 1000)
    for step in (1, 2, 3, 7, 50):
        in_flight = [row.position for row in rows[::step]]
        others = [row.key for row in rows if row.position not in set(in_flight)]
        assert [row.key for row in await store.read(None, in_flight, (), 1000)] == others
    await store.close()
