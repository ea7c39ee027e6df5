"""One file a database. `open_store` chooses by the engine's dialect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from outbox.dialects import MYSQL
from outbox.errors import ConfigurationError
from outbox.store import Store
from outbox.stores.engine import async_engine_for, engine_for, is_engine, names_its_driver
from outbox.tables import Tables

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


def open_store(database: str | sa.URL | sa.Engine | AsyncEngine | None, tables: Tables) -> Store:
    """The store of a database. Nothing is connected yet. Raises `ConfigurationError`. An engine that is made here is
    disposed of by the store's `close`; one that is given stays the caller's."""
    engine = engine_for(database)
    ours = not is_engine(database)
    if engine.dialect.name == "postgresql":
        from outbox.stores.postgresql import PostgresqlStore

        return PostgresqlStore(tables, engine, ours=ours)
    if engine.dialect.name == "sqlite":
        from outbox.stores.sqlite import SqliteStore

        return SqliteStore(tables, engine, ours=ours)
    if engine.dialect.name in MYSQL:
        from outbox.stores.mysql import MysqlStore

        hot = None if names_its_driver(database) else async_engine_for(database)
        return MysqlStore(tables, engine, ours=ours, hot=hot)
    raise ConfigurationError(f"the relay reads PostgreSQL, SQLite, MySQL and MariaDB, not {engine.dialect.name}")


__all__ = ["engine_for", "open_store"]
