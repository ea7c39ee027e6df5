"""The relay's own transactions are read committed whatever the engine that it was given says: under a higher level its leases
and its parking would be refused now and then, in autocommit they would be no transactions."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from outbox.errors import ConfigurationError, StoreUnavailable
from outbox.stores import open_store
from tests.relay.database import Database

LEVELS = ["REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"]
DRIVERS = {"postgresql": ("psycopg", "asyncpg"), "mysql": ("pymysql", "asyncmy"), "mariadb": ("pymysql", "asyncmy")}


@pytest.mark.parametrize("server", ["postgresql", "mariadb"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["sync", "sync, by an option", "async"])
async def test_an_engines_level_is_not_that_of_the_relays_transactions(
    request: pytest.FixtureRequest, server: str, level: str, kind: str
) -> None:
    database: Database = request.getfixturevalue(f"on_{server}")
    sync_driver, async_driver = DRIVERS[database.name]
    url = database.engine.url
    if kind == "sync":
        engine = sa.create_engine(url.set(drivername=f"{database.name}+{sync_driver}"), isolation_level=level)
        store = open_store(engine, database.tables)
    elif kind != "async":
        engine = sa.create_engine(url.set(drivername=f"{database.name}+{sync_driver}"))
        engine = engine.execution_options(isolation_level=level)
        store = open_store(engine, database.tables)
    else:
        async_engine = create_async_engine(url.set(drivername=f"{database.name}+{async_driver}"), isolation_level=level)
        engine = async_engine.sync_engine
        store = open_store(async_engine, database.tables)
    relay = database.tables.relay

    write = sa.insert(relay).values(owner="a", host="b", version="c")
    count = sa.select(sa.func.count()).select_from(relay)

    def write_and_fail(connection: sa.Connection) -> None:
        connection.execute(write)
        connection.execute(write)

    assert await store.run(lambda connection: connection.get_isolation_level()) == "READ COMMITTED"
    with pytest.raises(StoreUnavailable):
        await store.run(write_and_fail)
    assert await store.run(lambda connection: connection.scalar(count)) == 0
    await store.close()

    def is_as_it_was(connection: sa.Connection) -> bool:
        connection.execute(write)
        if level != "AUTOCOMMIT":
            return connection.get_isolation_level() == level
        connection.rollback()
        return connection.scalar(count) == 1

    if kind != "async":
        with engine.connect() as connection:
            assert is_as_it_was(connection)
        engine.dispose()
    else:
        async with async_engine.connect() as async_connection:
            assert await async_connection.run_sync(is_as_it_was)
        await async_engine.dispose()


@pytest.mark.parametrize("kind", ["made so", "by an option"])
async def test_an_sqlite_engine_in_autocommit_mode_is_refused(on_sqlite: Database, kind: str) -> None:
    if kind == "made so":
        engine = sa.create_engine(on_sqlite.url, isolation_level="AUTOCOMMIT")
    else:
        engine = sa.create_engine(on_sqlite.url).execution_options(isolation_level="AUTOCOMMIT")
    store = open_store(engine, on_sqlite.tables)
    with pytest.raises(ConfigurationError, match="autocommit mode"):
        await store.run(lambda connection: None)
    await store.close()
    engine.dispose()
