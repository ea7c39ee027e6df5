"""MySQL and MariaDB are read around what this relay has removed: faster, and never other than by reading everything."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy as sa

from outbox._outgoing import Outgoing
from outbox.stores import mysql, open_store, runs
from outbox.stores.mysql import MysqlStore
from tests.relay.database import Database, row
from tests.relay.running import eventually

SEED = int(os.environ.get("OUTBOX_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)


@pytest.fixture
async def store(on_mariadb: Database) -> AsyncIterator[MysqlStore]:
    store = open_store(on_mariadb.url, on_mariadb.tables)
    assert isinstance(store, MysqlStore)
    yield store
    await store.close()


async def sent(store: MysqlStore) -> list[Outgoing]:
    """Read and settled, until nothing is left."""
    every: list[Outgoing] = []
    while rows := await store.read(None, (), (), 2000):
        assert await store.settle(rows) == len(rows)
        every += rows
    return every


@pytest.mark.parametrize("gaps", [3, runs.GAPS])
@pytest.mark.parametrize("seed", [SEED, SEED + 1], ids=["first", "second"])
async def test_each_read_is_what_reading_everything_would_be(
    on_mariadb: Database, store: MysqlStore, gaps: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writers that commit late, in any order, or never; some rows settled, some in flight, some removed by another relay;
    now and then a rewind or a connection that dies. After each step the read is compared with the model."""
    print(f"OUTBOX_TEST_SEED={seed}")
    monkeypatch.setattr(runs, "GAPS", gaps)
    chance = random.Random(seed)
    message = on_mariadb.tables.message
    there: set[int] = set()  # committed, and neither settled nor removed
    in_flight: dict[int, Outgoing] = {}
    writers: dict[Any, list[int]] = {}
    reads = 0
    with ExitStack() as stack:
        for _ in range(5):
            writers[stack.enter_context(on_mariadb.engine.connect())] = []
        for _ in range(500):
            connection = chance.choice(list(writers))
            match chance.choice("wwwwwcccrssssfox"):
                case "w":
                    for _ in range(chance.randrange(1, 6)):
                        inserted = connection.execute(sa.insert(message).values(row("k")))
                        writers[connection].append(inserted.inserted_primary_key[0])
                case "c":
                    connection.commit()
                    there.update(writers[connection])
                    writers[connection].clear()
                case "r":
                    connection.rollback()
                    writers[connection].clear()
                case "s" if in_flight:
                    some = chance.sample(sorted(in_flight), chance.randrange(1, len(in_flight) + 1))
                    assert await store.settle([in_flight.pop(position) for position in some]) == len(some)
                    there -= set(some)
                case "f":  # forgotten, to be read again
                    in_flight.clear()
                    store.rewind()
                case "o" if there - in_flight.keys():
                    theirs = chance.choice(sorted(there - in_flight.keys()))
                    on_mariadb.execute(sa.delete(message).where(message.c.position == theirs))
                    there.discard(theirs)
                case "x" if chance.random() < 0.1:
                    await store._reader.close()
                case _:
                    limit = chance.choice([1, 3, 10, 1000])
                    found = await store.read(None, list(in_flight), (), limit)
                    assert [r.position for r in found] == sorted(there - in_flight.keys())[:limit]
                    in_flight.update((r.position, r) for r in found)
                    reads += 1
    assert reads > 20


async def test_under_a_held_snapshot_a_read_does_not_walk_over_what_was_removed(
    on_mariadb: Database, store: MysqlStore
) -> None:
    on_mariadb.add(*["k"] * 20_000)
    with on_mariadb.engine.connect().execution_options(isolation_level="REPEATABLE READ") as reporting:
        reporting.execute(sa.text("select count(*) from outbox_message"))
        late = on_mariadb.engine.connect()
        late.execute(sa.insert(on_mariadb.tables.message).values(row("late")))  # leaves a gap that must be looked at
        on_mariadb.add(*["k"] * 20_000)
        assert len(await sent(store)) == 40_000
        on_mariadb.add("new")
        assert [r.key for r in await store.read(None, (), (), 10)] == ["new"]

        around = await _pages(on_mariadb, store)
        late.commit()
        late.close()
        assert [r.key for r in await store.read(None, (), (), 10)] == ["late", "new"]
        store.rewind()
        assert [r.key for r in await store.read(None, (), (), 10)] == ["late", "new"]
        everything = await _pages(on_mariadb, store)
    assert everything > 500, "the snapshot kept nothing from being purged, so nothing is shown"
    assert around < everything / 10


async def _pages(database: Database, store: MysqlStore) -> int:
    """Pages that the server looked at for three reads: the least of some tries, since it does other things beside."""
    query = "show global status like 'innodb_buffer_pool_read_requests'"
    counted = []
    for _ in range(5):
        with database.engine.connect() as connection:
            before = int(connection.exec_driver_sql(query).one()[1])
            for _ in range(3):
                await store.read(None, (), (), 10)
            counted.append(int(connection.exec_driver_sql(query).one()[1]) - before)
    return min(counted)


async def test_a_position_that_comes_again_is_read_with_the_next_sweep(
    on_mariadb: Database, store: MysqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, or behind a proxy that hides a fail-over to a replica that knew less."""
    on_mariadb.add(*["k"] * 10)
    positions = [r.position for r in await sent(store)]
    for at in (3, 7):
        on_mariadb.add(f"again{at}", position=positions[at])
    assert await store.read(None, (), (), 10) == []
    monkeypatch.setattr(mysql, "SWEEP", 0.0)
    assert [r.key for r in await store.read(None, (), (), 1)] == ["again3"]
    monkeypatch.undo()
    assert [r.key for r in await store.read(None, (), (), 10)] == ["again3", "again7"], "nothing is known any more"


@pytest.mark.parametrize("which", ["_reader", "_settler"])
async def test_what_is_known_ends_with_a_connection(on_mariadb: Database, store: MysqlStore, which: str) -> None:
    """It may be another server that answers next."""
    on_mariadb.add(*["k"] * 3)
    rows = await sent(store)
    on_mariadb.add("again", position=rows[1].position)
    assert await store.read(None, (), (), 10) == []
    line = getattr(store, which)
    (thread,), _ = await line.execute("select connection_id()")
    with on_mariadb.engine.connect() as connection:
        connection.exec_driver_sql(f"kill {thread[0]}")
    with pytest.raises(Exception, match=r"."):
        await (store.read(None, (), (), 10) if which == "_reader" else store.settle(rows))
    assert [r.key for r in await store.read(None, (), (), 10)] == ["again"]


async def test_what_a_settle_removes_is_not_known_where_a_connection_ended_meanwhile(
    on_mariadb: Database, store: MysqlStore
) -> None:
    """It was sent to the server before."""
    on_mariadb.add(*["k"] * 3)
    rows = await store.read(None, (), (), 10)
    message = on_mariadb.tables.message
    settles = sa.text("select count(*) from information_schema.processlist where info like 'delete m from%'")
    (thread,), _ = await store._reader.execute("select connection_id()")

    def settling() -> bool:
        with on_mariadb.engine.connect() as connection:
            return bool(connection.scalar(settles))

    with on_mariadb.engine.connect() as holding:
        holding.execute(sa.select(message).where(message.c.position == rows[1].position).with_for_update())
        task = asyncio.create_task(store.settle(rows))
        await eventually(settling)
        on_mariadb.execute(sa.text(f"kill {thread[0]}"))
        with pytest.raises(Exception, match=r"."):
            await store.read(None, (), (), 10)
    assert await task == 3
    on_mariadb.add("again", position=rows[1].position)
    assert [r.key for r in await store.read(None, (), (), 10)] == ["again"]


async def test_nothing_is_known_of_rows_that_were_not_there(on_mariadb: Database, store: MysqlStore) -> None:
    """Another message has the position of one of them, so ours was another server's."""
    on_mariadb.add("a", "b", "c")
    rows = await store.read(None, (), (), 10)
    message = on_mariadb.tables.message
    on_mariadb.execute(sa.delete(message).where(message.c.position == rows[1].position))
    on_mariadb.add("other", position=rows[1].position)
    assert await store.settle(rows) == 2
    assert [r.key for r in await store.read(None, (), (), 10)] == ["other"]


async def test_the_parts_of_a_read_are_of_one_snapshot(on_mariadb: Database) -> None:
    """What is committed while the first part is read is not in the last: its predecessor may be in a gap that was
    looked at before."""
    url = on_mariadb.url
    engine = sa.create_engine(sa.make_url(url).set(drivername="mysql+pymysql"))

    def read() -> list[int]:
        count = "(select count(*) from outbox_message order by position limit 1)"
        with engine.connect() as connection:
            for statement in mysql.QUIETLY:
                connection.exec_driver_sql(statement)
            parts = f"{count} union all (select sleep(2) from outbox_message limit 1) union all {count}"
            return list(connection.exec_driver_sql(parts).scalars())

    on_mariadb.add("a")
    reading = asyncio.create_task(asyncio.to_thread(read))
    sleeping = sa.text("select count(*) from information_schema.processlist where state = 'User sleep'")

    def asleep() -> bool:
        with on_mariadb.engine.connect() as connection:
            return bool(connection.scalar(sleeping))

    await eventually(asleep)
    on_mariadb.add("b")
    assert not reading.done()
    assert await reading == [1, 0, 1]
    with engine.connect() as connection:
        assert connection.exec_driver_sql("select count(*) from outbox_message").scalar() == 2
    engine.dispose()
