"""One file a database. `open_store` chooses by the engine's dialect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from outbox.errors import ConfigurationError
from outbox.store import Store
from outbox.stores.engine import engine_for, is_engine
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
    raise ConfigurationError(f"the relay reads PostgreSQL and SQLite in this version, not {engine.dialect.name}")


__all__ = ["engine_for", "open_store"]
