"""One file a database. `open_store` chooses by the engine's dialect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from outbox.errors import ConfigurationError
from outbox.store import Store
from outbox.stores.engine import engine_for
from outbox.tables import Tables

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


def open_store(database: str | sa.URL | sa.Engine | AsyncEngine | None, tables: Tables) -> Store:
    """The store of a database. Nothing is connected yet. Raises `ConfigurationError`."""
    engine = engine_for(database)
    if engine.dialect.name == "postgresql":
        from outbox.stores.postgresql import PostgresqlStore

        return PostgresqlStore(tables, engine)
    if engine.dialect.name == "sqlite":
        from outbox.stores.sqlite import SqliteStore

        return SqliteStore(tables, engine)
    raise ConfigurationError(f"the relay reads PostgreSQL and SQLite in this version, not {engine.dialect.name}")


__all__ = ["engine_for", "open_store"]
