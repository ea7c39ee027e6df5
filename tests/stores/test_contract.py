"""What every store promises (`outbox/store.py`), over each database and each way in."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from importlib.util import find_spec
from typing import Any

import pytest
import sqlalchemy as sa
from msgspec.structs import replace
from sqlalchemy.ext.asyncio import create_async_engine

from outbox._outgoing import Outgoing
from outbox.errors import StoreUnavailable
from outbox.store import Store
from outbox.stores import open_store, postgresql, sqlite
from tests.relay.database import Database, key_in_bucket
from tests.services import MARIADB

POOLED = " through pgbouncer"
DRIVERS = [
    *("sqlite", "sqlite+aiosqlite"),
    *("postgresql+psycopg", "postgresql+psycopg async", "postgresql+asyncpg"),
    *("postgresql+psycopg" + POOLED, "postgresql+asyncpg" + POOLED),
    *("mysql", "mysql+pymysql"),
    *(["mariadb+asyncmy"] if MARIADB.name == "mariadb" else []),  # SQLAlchemy refuses that name for MySQL
    *(["mysql+mysqldb"] if find_spec("MySQLdb") else []),  # it has to be compiled
]
SERVERS = {"sqlite": "sqlite", "postgresql": "postgresql", "mysql": "mariadb", "mariadb": "mariadb"}


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def database(request: pytest.FixtureRequest, driver: str) -> Database:
    found: Database = request.getfixturevalue(f"on_{SERVERS[driver.split('+')[0]]}")
    return found


@pytest.fixture
async def store(request: pytest.FixtureRequest, database: Database, driver: str) -> AsyncIterator[Store]:
    pooled = driver.endswith(POOLED)
    found = request.getfixturevalue("pgbouncer").through(database.url) if pooled else database.url
    url = sa.make_url(found).set(drivername=driver.split()[0])
    if pooled and url.drivername.endswith("asyncpg"):
        url = url.set(query={"prepared_statement_cache_size": "0"})
    engine: Any = None
    if "async" in driver:
        engine = create_async_engine(url)
        found = open_store(engine, database.tables)
    else:
        found = open_store(url, database.tables)
    yield found
    await found.close()
    if engine is not None:
        await engine.dispose()


async def read(
    store: Store, limit: int = 100, *, buckets: Any = None, in_flight: Any = (), topics: Any = ()
) -> list[str | None]:
    return [row.key for row in await store.read(buckets, in_flight, topics, limit)]


async def test_rows_come_in_the_order_of_their_positions_up_to_the_limit(store: Store, database: Database) -> None:
    database.add("a", "b", "c", "d")
    rows = await store.read(None, (), (), 3)
    assert [row.key for row in rows] == ["a", "b", "c"]
    assert [row.position for row in rows] == sorted(row.position for row in rows)
    assert await read(store, in_flight=[row.position for row in rows]) == ["d"]


async def test_a_row_comes_as_it_was_written(store: Store, database: Database) -> None:
    headers = json.dumps({"traceparent": "00-é"})
    (id,) = database.add("k", topic="t", type="T", payload=b"\x00\xff", content_type="x/y", headers=headers)
    (tombstone,) = database.add(None, topic="t", type=None, payload=None, content_type=None)
    first, second = await store.read(None, (), (), 10)
    assert first == Outgoing(first.position, id, "t", "k", "T", b"\x00\xff", "x/y", headers, first.bucket)
    assert isinstance(first.payload, bytes)
    assert second == Outgoing(second.position, tombstone, "t", None, None, None, None, None, second.bucket)


async def test_what_is_in_flight_does_not_come_again(store: Store, database: Database) -> None:
    database.add("a", "b", "c")
    rows = await store.read(None, (), (), 10)
    in_flight = {row.position: row.bucket for row in rows}
    assert await read(store, in_flight=in_flight) == []
    database.add("d")
    assert await read(store, in_flight=in_flight) == ["d"]
    store.rewind()
    assert await read(store, in_flight=in_flight) == ["d"]


async def test_what_is_dropped_comes_again_after_a_rewind(store: Store, database: Database) -> None:
    database.add("a", "b")
    assert await read(store) == ["a", "b"]
    store.rewind()
    assert await read(store) == ["a", "b"]


async def test_only_the_buckets_asked_for_come(store: Store, database: Database) -> None:
    one, two = key_in_bucket(1), key_in_bucket(2)
    database.add(one, two, one)
    assert await read(store, buckets=[1]) == [one, one]
    assert await read(store, buckets=[1, 2], in_flight=()) == [one, two, one]


async def test_buckets_that_are_new_are_read_from_their_beginning(store: Store, database: Database) -> None:
    one, two = key_in_bucket(1), key_in_bucket(2)
    database.add(two, one)
    rows = await store.read([1], (), (), 10)
    await store.settle(rows)
    assert await read(store, buckets=[1]) == []
    assert await read(store, buckets=None) == [two]


async def test_topics_that_are_left_out_are_read_from_their_beginning_later(store: Store, database: Database) -> None:
    database.add("a", topic="down")
    database.add("b", topic="up")
    rows = await store.read(None, (), ["down"], 10)
    assert [row.key for row in rows] == ["b"]
    await store.settle(rows)
    database.add("c", topic="down")
    assert await read(store) == ["a", "c"]


async def test_settling_removes_what_was_named_and_tells_how_many(store: Store, database: Database) -> None:
    database.add(*["k"] * 1300)
    rows = await store.read(None, (), (), 2000)
    assert await store.settle(rows[:1200]) == 1200
    nowhere = replace(rows[1], position=10**9)
    assert await store.settle([rows[0], rows[1200], nowhere]) == 1
    assert database.count() == 99
    assert await store.settle([]) == 0


@pytest.mark.parametrize("gaps", [1, 40])
async def test_a_row_that_comes_late_between_those_that_are_settled_stays(
    store: Store, database: Database, gaps: int
) -> None:
    for position in range(0, 3 * gaps, 3):  # two of three
        database.add("soon", position=100 + position)
        database.add("soon", position=102 + position)
    rows = await store.read(None, (), (), 1000)
    for position in range(0, 3 * gaps, 3):
        database.add("late", position=101 + position)
    assert await store.settle(rows) == 2 * gaps
    store.rewind()
    assert await read(store) == ["late"] * gaps


async def test_rows_with_positions_of_someone_elses_choice_are_read(
    store: Store, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "LOOK", 0.0)
    database.add("a", position=500)
    rows = await store.read(None, (), (), 10)
    for _ in range(5):
        assert await read(store, in_flight=[row.position for row in rows]) == []
    database.add("b", position=-7)
    for module in (postgresql, sqlite):
        monkeypatch.setattr(module, "SWEEP", 0.0)
    assert await read(store, in_flight=[row.position for row in rows]) == ["b"]


async def test_work_is_committed_or_rolled_back_as_a_whole(store: Store, database: Database) -> None:
    relay = database.tables.relay

    def insert(connection: sa.Connection, fail: bool) -> str:
        connection.execute(sa.insert(relay).values(owner=f"o-{fail}", host="h", version="1"))
        if fail:
            raise KeyError("no")
        return "done"

    assert await store.run(lambda c: insert(c, False)) == "done"
    with pytest.raises(KeyError):
        await store.run(lambda c: insert(c, True))
    assert [row.owner for row in database.rows("relay")] == ["o-False"]


async def test_an_error_of_the_database_is_said_in_one_line_without_what_it_quotes(
    store: Store, database: Database
) -> None:
    with pytest.raises(StoreUnavailable) as told:
        await store.run(lambda c: c.exec_driver_sql("select * from nothing_of_that_name"))
    assert "nothing_of_that_name" in str(told.value)
    assert "\n" not in str(told.value)
    assert told.value.__cause__ is not None
    row = {"bucket": 1, "epoch": 0}
    with pytest.raises(StoreUnavailable) as told:
        await store.run(lambda c: c.execute(sa.insert(database.tables.lease), row))
    assert "parameters" not in str(told.value)
    assert "\n" not in str(told.value)
    assert isinstance(told.value.__cause__, sa.exc.IntegrityError)


async def test_a_table_that_is_gone_is_the_databases_error_for_reads_and_settles(
    store: Store, database: Database
) -> None:
    database.add("a")
    rows = await store.read(None, (), (), 10)
    database.tables.message.drop(database.engine)
    with pytest.raises(StoreUnavailable, match="outbox_message"):
        await store.read(None, (), (), 10)
    with pytest.raises(StoreUnavailable, match="outbox_message"):
        await store.settle(rows)
