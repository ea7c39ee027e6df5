"""An outbox in a database of its own, and what tests do to it behind the relay's back."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from outbox import Outbox
from outbox._message import bucket_of, new_id
from outbox._outgoing import Outgoing
from outbox.stores.engine import sync_engine_for


class Database:
    """An outbox's tables at ``url``, and rows of it by plain Core: what a relay finds, however it came there."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.outbox = Outbox()
        self.tables = self.outbox.tables
        self.engine = sync_engine_for(url, create=True)

    @property
    def name(self) -> str:
        return self.engine.dialect.name

    def create(self) -> Database:
        self.outbox.metadata.create_all(self.engine)
        return self

    def add(
        self, *keys: str | None, topic: str = "orders", connection: sa.Connection | None = None, **columns: Any
    ) -> list[str]:
        """One message a key, in this order, in one transaction (or in that of ``connection``); returns their ids."""
        if connection is None:
            with self.engine.begin() as connection:
                return self.add(*keys, topic=topic, connection=connection, **columns)
        rows = [row(key, topic=topic, **columns) for key in keys]
        connection.execute(sa.insert(self.tables.message), rows)
        return [str(row["id"]) for row in rows]

    @contextmanager
    def open_transaction(self) -> Iterator[sa.Connection]:
        """A writer that takes its time."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    def count(self, table: str = "message") -> int:
        with self.engine.connect() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(getattr(self.tables, table))) or 0

    def rows(self, table: str) -> Sequence[sa.Row[Any]]:
        found = getattr(self.tables, table)
        with self.engine.connect() as connection:
            return connection.execute(sa.select(found).order_by(*found.primary_key.columns)).all()

    def execute(self, statement: sa.Executable) -> None:
        with self.engine.begin() as connection:
            connection.execute(statement)

    def close(self) -> None:
        self.engine.dispose()


def row(key: str | None, *, topic: str = "orders", **columns: Any) -> dict[str, Any]:
    id = new_id()
    made = {
        "id": id,
        "bucket": bucket_of(key, id),
        "topic": topic,
        "key": key,
        "type": "Test",
        "payload": b"{}",
        "content_type": "application/json",
        "headers": None,
    }
    return made | columns


def at(position: int) -> Outgoing:
    """A row at that position, for what asks for no more of it."""
    return Outgoing(position, str(new_id()), "orders", None, None, None, None, None, 0)


def key_in_bucket(bucket: int) -> str:
    """A key of that bucket."""
    return next(key for n in range(100_000) if bucket_of(key := f"key-{n}", uuid.UUID(int=0)) == bucket)
