"""The relay's hot path on SQLite. One writer at a time, so positions are committed in their own order: the last position
read is an exact floor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from outbox._message import Outgoing
from outbox.stores._run import Runner
from outbox.tables import Tables

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")

# By the primary key, which is the row id.
READ: Final = (
    "select position, substr(id, 1, 8) || '-' || substr(id, 9, 4) || '-' || substr(id, 13, 4) || '-' || substr(id, 17, 4)"
    " || '-' || substr(id, 21), topic, key, type, payload, content_type, headers, bucket from {message}"
    " where position > ?{and_} order by position limit ?"
)
SETTLE: Final = "delete from {message} where position in ({marks})"
SETTLE_AT_ONCE: Final = 500  # rows; SQLite takes 999 parameters in its oldest builds


class SqliteStore:
    """`outbox.store.Store` for SQLite, through SQLAlchemy's connection and its driver's SQL."""

    dialect = "sqlite"

    def __init__(self, tables: Tables, engine: sa.Engine | AsyncEngine) -> None:
        self.tables = tables
        self._runner = Runner(engine)
        self._table = sqlite.dialect().identifier_preparer.format_table(tables.message)
        self._start = 0
        self._rewound = 0

    def rewind(self) -> None:
        self._start = 0
        self._rewound += 1

    async def read(
        self, buckets: Collection[int] | None, in_flight: Collection[int], without_topics: Collection[str], limit: int
    ) -> list[Outgoing]:
        and_ = ""
        filters: list[Any] = []
        for column, values, word in (("bucket", buckets, "in"), ("topic", without_topics or None, "not in")):
            if values is not None:
                and_ += f" and {column} {word} ({', '.join('?' * len(values))})"
                filters += values
        statement = READ.format(message=self._table, and_=and_)
        rewound = self._rewound
        while True:
            parameters = (self._start, *filters, limit)
            rows = await self.run(lambda c, p=parameters: c.exec_driver_sql(statement, p).fetchall())  # type: ignore[misc]
            if rows and rewound == self._rewound:
                self._start = rows[-1][0]
            # rows in flight lie above the start only after a rewind
            found = [Outgoing._make(row) for row in rows if row[0] not in in_flight]
            if found or len(rows) < limit:
                return found

    async def settle(self, positions: Sequence[int]) -> int:
        def delete(connection: sa.Connection) -> int:
            count = 0
            for at in range(0, len(positions), SETTLE_AT_ONCE):
                part = tuple(positions[at : at + SETTLE_AT_ONCE])
                statement = SETTLE.format(message=self._table, marks=", ".join("?" * len(part)))
                count += connection.exec_driver_sql(statement, part).rowcount
            return count

        return await self.run(delete)

    async def run(self, work: Callable[[sa.Connection], T]) -> T:
        return await self._runner.run(work)

    async def close(self) -> None:
        await self._runner.close()
