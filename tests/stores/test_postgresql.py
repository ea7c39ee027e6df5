"""Connections to PostgreSQL: lost, cancelled, borrowed from the user's engine, and given back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import warnings

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from outbox.errors import StoreUnavailable
from outbox.stores import open_store
from outbox.stores.postgresql import PostgresqlStore
from tests.relay.database import Database, at
from tests.relay.running import eventually
from tests.services import PostgresqlServer

APPLICATION = "a store under test"


def store_of(database: Database, **query: str) -> PostgresqlStore:
    url = sa.make_url(database.url).update_query_dict({"application_name": APPLICATION, **query})
    found = open_store(url, database.tables)
    assert isinstance(found, PostgresqlStore)
    return found


def sessions(database: Database, of: str = "") -> list[int]:
    query = "select pid from pg_stat_activity where application_name = %s and query like %s and datname = %s"
    with psycopg.connect(database.url) as connection:
        name = sa.make_url(database.url).database
        return [pid for (pid,) in connection.execute(query, (APPLICATION, f"%{of}%", name))]


def end(database: Database, of: str) -> None:
    pids = sessions(database, of)
    assert pids
    with psycopg.connect(database.url, autocommit=True) as connection:
        for pid in pids:
            connection.execute("select pg_terminate_backend(%s, 5000)", (pid,))


async def test_a_lost_connection_is_said_and_made_anew(on_postgresql: Database) -> None:
    on_postgresql.add("a", "b")
    store = store_of(on_postgresql)
    rows = await store.read(None, (), (), 10)
    end(on_postgresql, "select position")
    with pytest.raises(StoreUnavailable, match="terminat"):
        await store.read(None, (), (), 10)
    assert await store.read(None, (), (), 10) == rows
    assert await store.settle(rows[:1]) == 1
    end(on_postgresql, "delete from")
    with pytest.raises(StoreUnavailable):
        await store.settle(rows[1:2])
    assert [row.key for row in await store.read(None, (), (), 10)] == ["b"]
    await store.close()


async def test_a_settle_under_way_survives_the_loss_of_the_reading_connection(on_postgresql: Database) -> None:
    """A connection that is closed under its waiter would leave it waiting for ever."""
    on_postgresql.add("a")
    store = store_of(on_postgresql)
    (row,) = await store.read(None, (), (), 10)
    with on_postgresql.open_transaction() as holder:
        holder.execute(sa.select(on_postgresql.tables.message).with_for_update())
        settling = asyncio.create_task(store.settle([row]))
        await eventually(lambda: sessions(on_postgresql, "delete from"))
        end(on_postgresql, "select position")
        with pytest.raises(StoreUnavailable):
            await store.read(None, (), (), 10)
        assert not settling.done()
    assert await asyncio.wait_for(settling, 5) == 1
    await store.close()


async def test_after_one_connection_is_lost_the_other_is_replaced_too(on_postgresql: Database) -> None:
    """The next statement could reach another server than the last one: what was read there must not be settled here."""
    on_postgresql.add("a")
    store = store_of(on_postgresql)
    await store.read(None, (), (), 10)
    await store.settle([])
    (settler,) = sessions(on_postgresql, "delete from")
    end(on_postgresql, "select position")
    with pytest.raises(StoreUnavailable):
        await store.read(None, (), (), 10)
    await store.settle([])
    assert settler not in sessions(on_postgresql)
    await store.close()


async def test_what_was_read_is_not_settled_on_a_connection_that_was_made_after_it(
    on_postgresql: Database, postgresql: PostgresqlServer, template: str
) -> None:
    """It may be to another server, where another message has the position. Here the reader has not noticed yet."""
    store = store_of(on_postgresql)
    on_postgresql.add("sent")
    sent = await store.read(None, (), (), 10)
    on_postgresql.close()
    postgresql.replace_database(on_postgresql.url, template)
    on_postgresql.add("not sent")
    assert [row.position for row in on_postgresql.rows("message")] == [sent[0].position]
    with pytest.raises(StoreUnavailable):
        await store.settle(sent)
    assert [row.key for row in await store.read(None, (), (), 10)] == ["not sent"]
    await store.close()


async def test_a_read_that_is_cancelled_leaves_a_store_that_works(on_postgresql: Database) -> None:
    on_postgresql.add("a")
    store = store_of(on_postgresql)
    await store.read(None, (), (), 10)
    with on_postgresql.open_transaction() as holder:
        holder.exec_driver_sql("lock table outbox_message in access exclusive mode")
        reading = asyncio.create_task(store.read(None, (), (), 10))
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(reading, 5)
    assert [row.key for row in await store.read(None, (), (), 10)] == ["a"]
    await store.close()


async def test_a_server_that_is_away_is_unavailable_and_no_password_is_shown(on_postgresql: Database) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    store = open_store(f"postgresql://someone:s3cret@127.0.0.1:{port}/shop", on_postgresql.tables)
    for call in (lambda: store.read(None, (), (), 1), lambda: store.settle([at(1)]), lambda: store.run(lambda c: None)):
        with pytest.raises(StoreUnavailable) as told:
            await call()
        assert "someone" in str(told.value)
        assert "s3cret" not in str(told.value)
    await store.close()


async def test_a_refused_login_is_said_as_the_server_says_it(on_postgresql: Database) -> None:
    url = sa.make_url(on_postgresql.url).set(username="nobody_of_that_name", password="s3cret")
    store = open_store(url, on_postgresql.tables)
    for call in (lambda: store.read(None, (), (), 1), lambda: store.run(lambda c: None)):
        with pytest.raises(StoreUnavailable, match="nobody_of_that_name") as told:
            await call()
        assert "s3cret" not in str(told.value)
    await store.close()


async def test_a_server_that_has_become_read_only_is_unavailable(on_postgresql: Database) -> None:
    """A former primary after a fail-over."""
    store = store_of(on_postgresql, options="-c default_transaction_read_only=on")
    with pytest.raises(StoreUnavailable, match="read-only"):
        await store.settle([at(1)])
    with pytest.raises(StoreUnavailable, match="read-only"):
        await store.run(lambda c: c.execute(sa.delete(on_postgresql.tables.message)))
    await store.close()


@pytest.mark.parametrize("kind", ["url", "engine", "async engine", "asyncpg"])
async def test_closing_leaves_no_connection_and_no_warning(on_postgresql: Database, kind: str) -> None:
    url = sa.make_url(on_postgresql.url).set(drivername="postgresql+psycopg")
    if kind != "asyncpg":
        url = url.update_query_dict({"application_name": APPLICATION})
    engine: sa.Engine | None = None
    async_engine = None
    if kind == "engine":
        engine = sa.create_engine(url)
    elif kind == "async engine":
        async_engine = create_async_engine(url)
    elif kind == "asyncpg":
        async_engine = create_async_engine(url.set(drivername="postgresql+asyncpg"))
    store = open_store(engine or async_engine or url, on_postgresql.tables)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            await store.read(None, (), (), 10)
            await store.settle([at(1)])
            await store.run(lambda c: c.execute(sa.text("select 1")))
            gc.collect()
        await store.close()
        if engine is not None:
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            engine.dispose()
        if async_engine is not None:
            await async_engine.dispose()
        del store
        gc.collect()
    assert [str(warning.message) for warning in warned] == []
    await eventually(lambda: not sessions(on_postgresql))


async def test_a_connection_whose_caller_was_cancelled_is_closed(on_postgresql: Database) -> None:
    store = store_of(on_postgresql)
    for pause in (0.0, 0.002, 0.005, 0.01, 0.02):
        reading = asyncio.create_task(store.read(None, (), (), 10))
        await asyncio.sleep(pause)
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
    await store.close()
    gc.collect()
    await eventually(lambda: not sessions(on_postgresql))


async def test_a_connection_is_closed_whose_caller_was_cancelled_before_it_had_it(
    on_postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = asyncio.Event()

    async def hangs(self: object, value: bool) -> None:
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("psycopg.AsyncConnection.set_autocommit", hangs)
    store = store_of(on_postgresql)
    reading = asyncio.create_task(store.read(None, (), (), 10))
    await asyncio.wait_for(reached.wait(), 10)
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading
    await eventually(lambda: not sessions(on_postgresql))
    await store.close()


@pytest.mark.parametrize("threshold", [None, 5])
async def test_the_hot_path_prepares_no_statements(on_postgresql: Database, threshold: int | None) -> None:
    """Behind PgBouncer they would fail, and elsewhere their plans outlive the table they were made for."""
    engine = sa.create_engine(
        sa.make_url(on_postgresql.url).set(drivername="postgresql+psycopg"),
        connect_args={"prepare_threshold": threshold},
    )
    store = PostgresqlStore(on_postgresql.tables, engine, ours=True)
    for _ in range(12):
        on_postgresql.add("k")
        await store.settle(await store.read(None, (), (), 10))
    for line in (store._reader, store._settler):
        assert line.connection is not None
        cursor = await line.connection.execute("select count(*) from pg_prepared_statements")
        assert await cursor.fetchone() == (0,)
    await store.close()


async def test_a_connection_that_has_prepared_statements_can_be_borrowed(on_postgresql: Database) -> None:
    """Both of its wrappers number their statements from zero."""
    engine = sa.create_engine(sa.make_url(on_postgresql.url).set(drivername="postgresql+psycopg"), pool_size=1)
    store = PostgresqlStore(on_postgresql.tables, engine, ours=True)
    for _ in range(8):
        await store.run(lambda c: c.execute(sa.text("select 1")))
    for _ in range(8):
        await store.read(None, (), (), 10)
        await store.settle([at(1)])
    await store.close()


async def test_a_cancelled_transaction_has_ended_before_the_next_one_begins(on_postgresql: Database) -> None:
    """Else a renewal that was cancelled could take the leases again, after they were given back."""
    store = store_of(on_postgresql)
    done: list[str] = []

    def slow(connection: sa.Connection) -> None:
        connection.execute(sa.text("select pg_sleep(0.3)"))
        done.append("slow")

    running = asyncio.create_task(store.run(slow))
    await asyncio.sleep(0.05)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await store.run(lambda c: done.append("next"))
    assert done == ["slow", "next"]
    await store.close()
