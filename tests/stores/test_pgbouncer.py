"""PgBouncer in transaction mode between a store and PostgreSQL: each transaction on another backend, and what becomes of
the server behind it is hidden."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from outbox.errors import StoreUnavailable
from outbox.store import Store
from outbox.stores import open_store
from outbox.stores.postgresql import PostgresqlStore
from tests.relay.database import Database
from tests.services import PgbouncerServer, PostgresqlServer


@pytest.fixture
def pooled_url(pgbouncer: PgbouncerServer, on_postgresql: Database) -> str:
    return pgbouncer.through(on_postgresql.url)


async def work(store: Store, database: Database) -> None:
    """More of everything than it takes psycopg to prepare a statement."""
    for _ in range(12):
        database.add("a", "b")
        rows = await store.read(None, (), (), 10)
        assert len(rows) == 2
        assert await store.read(None, [row.position for row in rows], (), 10) == []
        assert await store.settle(rows) == 2
        assert await store.run(lambda c: c.scalar(sa.select(sa.func.count()).select_from(database.tables.message))) == 0


async def many_times(store: Store, query: sa.Select[Any]) -> None:
    for _ in range(20):
        await store.run(lambda c: c.scalar(query))


@pytest.mark.parametrize("driver", ["postgresql", "postgresql+asyncpg"])
async def test_a_relay_needs_no_setting_behind_it_and_leaves_nothing_on_a_session(
    pooled_url: str, on_postgresql: Database, pgbouncer: PgbouncerServer, driver: str
) -> None:
    url = sa.make_url(pooled_url).set(drivername=driver)
    if driver == "postgresql+asyncpg":
        url = url.set(query={"prepared_statement_cache_size": "0"})
    store = open_store(url, on_postgresql.tables)
    await work(store, on_postgresql)
    await store.close()
    assert pgbouncer.left_on_sessions(pooled_url) == []


async def test_without_it_statements_may_be_prepared(on_postgresql: Database) -> None:
    store = open_store(on_postgresql.url, on_postgresql.tables)
    await work(store, on_postgresql)
    assert isinstance(store, PostgresqlStore)
    for line in (store._reader, store._settler):  # which prepare nothing themselves, behind whatever they are
        assert line.connection is not None
        assert line.connection.prepare_threshold is not None
    await store.close()


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_an_engine_of_the_users_with_prepared_statements_is_told_what_to_set(
    pooled_url: str, on_postgresql: Database, kind: str
) -> None:
    url = sa.make_url(pooled_url).set(drivername="postgresql+psycopg")
    engine: Any = (create_async_engine if kind == "async" else sa.create_engine)(url)
    store = open_store(engine, on_postgresql.tables)
    with pytest.raises(StoreUnavailable, match=r"PgBouncer.*connect_args=\{'prepare_threshold': None\}"):
        await many_times(store, sa.select(sa.func.count()).select_from(on_postgresql.tables.lease))
    await store.close()
    engine.dispose() if kind == "sync" else await engine.dispose()


async def test_what_took_a_position_in_a_restored_database_is_not_settled_for_what_had_it_before(
    pooled_url: str, on_postgresql: Database, pgbouncer: PgbouncerServer, postgresql: PostgresqlServer, template: str
) -> None:
    """PgBouncer keeps the relay's connections open while the server behind it is replaced."""
    store = open_store(pooled_url, on_postgresql.tables)
    on_postgresql.add("sent", "sent too")
    sent = await store.read(None, (), (), 10)
    with pgbouncer.paused(pooled_url):
        on_postgresql.close()
        postgresql.replace_database(on_postgresql.url, template)
    (new,) = on_postgresql.add("not sent")
    found = on_postgresql.rows("message")
    assert [row.position for row in found] == [sent[0].position]
    assert await store.settle(sent) == 0
    assert [row.id for row in await store.read(None, (), (), 10)] == [new]
    await store.close()
