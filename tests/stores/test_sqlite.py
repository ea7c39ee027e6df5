"""SQLite: one writer at a time, files that cannot be written, rows that were written by hand."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import uuid

import pytest
import sqlalchemy as sa

from outbox._outgoing import Outgoing
from outbox.errors import StoreUnavailable
from outbox.stores.sqlite import SqliteStore
from tests.relay.database import Database, at


def impatient(database: Database, wait: float = 0.05) -> SqliteStore:
    return SqliteStore(database.tables, sa.create_engine(database.url, connect_args={"timeout": wait}), ours=True)


async def test_a_settle_that_finds_the_file_locked_is_tried_again(on_sqlite: Database) -> None:
    """It has certainly not happened; forgetting the rows instead would send them again."""
    on_sqlite.add("a", "b")
    store = impatient(on_sqlite, wait=0.1)
    rows = await store.read(None, (), (), 10)
    writer = on_sqlite.engine.connect()
    writer.exec_driver_sql("begin immediate")
    settling = asyncio.create_task(store.settle(rows))
    await asyncio.sleep(0.25)
    assert not settling.done()
    writer.rollback()
    writer.close()
    assert await settling == 2
    assert on_sqlite.count() == 0
    await store.close()


async def test_a_file_that_stays_locked_is_unavailable(on_sqlite: Database) -> None:
    store = impatient(on_sqlite)
    with on_sqlite.open_transaction() as writer:
        writer.exec_driver_sql("begin immediate")
        with pytest.raises(StoreUnavailable, match="write lock past the busy timeout"):
            await store.settle([at(1)])
        assert await store.read(None, (), (), 10) == []
    await store.close()


async def test_a_file_that_cannot_be_written_is_said(on_sqlite: Database) -> None:
    path = sa.make_url(on_sqlite.url).database
    engine = sa.create_engine(f"sqlite:///file:{path}?mode=ro&uri=true")
    store = SqliteStore(on_sqlite.tables, engine, ours=True)
    with pytest.raises(StoreUnavailable, match="not writable for this user"):
        await store.settle([at(1)])
    await store.close()


async def test_an_id_written_by_hand_with_dashes_comes_as_it_is(on_sqlite: Database) -> None:
    id = str(uuid.uuid4())
    with sqlite3.connect(sa.make_url(on_sqlite.url).database or "") as connection:
        statement = "insert into outbox_message (id, bucket, topic) values (?, 0, 't')"
        connection.execute(statement, (id,))
        connection.execute(statement, (id.replace("-", ""),))
        connection.execute(statement, ("order 7",))
    connection.close()
    store = impatient(on_sqlite)
    assert [row.id for row in await store.read(None, (), (), 10)] == [id, id, "order 7"]
    await store.close()


async def test_a_row_that_is_settled_while_it_is_read_is_not_taken_for_a_new_one(on_sqlite: Database) -> None:
    on_sqlite.add("a", "b")
    store = impatient(on_sqlite)
    in_flight = {row.position: row.bucket for row in await store.read(None, (), (), 10)}
    store.rewind()
    run = store.run

    async def run_and_settle(work: object) -> object:
        rows = await run(work)  # type: ignore[arg-type]
        in_flight.clear()
        return rows

    store.run = run_and_settle  # type: ignore[method-assign, assignment]
    assert await store.read(None, in_flight, (), 10) == []
    await store.close()


async def test_readers_and_writers_at_once_lose_nothing(on_sqlite: Database) -> None:
    store = impatient(on_sqlite, wait=5)
    added: list[str] = []
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            added.extend(on_sqlite.add("a", "b"))

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    found: list[Outgoing] = []
    while len(found) < 300:
        rows = await store.read(None, (), (), 50)
        await store.settle(rows)
        found += rows
    over.set()
    await asyncio.to_thread(lambda: [writer.join() for writer in writers])
    while rows := await store.read(None, (), (), 50):
        await store.settle(rows)
        found += rows
    assert sorted(row.id for row in found) == sorted(added)
    assert [row.position for row in found] == sorted(row.position for row in found)
    await store.close()
