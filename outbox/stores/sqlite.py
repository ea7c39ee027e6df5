"""The relay's hot path on SQLite. One writer at a time, so positions are committed in their own order: the last position
read is an exact floor."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Collection, Sequence
from itertools import starmap
from typing import TYPE_CHECKING, Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from outbox._outgoing import Outgoing
from outbox.errors import StoreUnavailable
from outbox.stores._run import Runner, Scope
from outbox.tables import Tables

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")

# By the primary key, which is the row id. SQLAlchemy stores a UUID as 32 digits; a row written by hand may have others.
READ: Final = (
    "select position, case length(id) when 32 then substr(id, 1, 8) || '-' || substr(id, 9, 4) || '-' || substr(id, 13, 4)"
    " || '-' || substr(id, 17, 4) || '-' || substr(id, 21) else id end,"
    " topic, key, type, payload, content_type, headers, bucket from {message}"
    " where position > ?{and_} order by position limit ?"
)
# By the primary key too, for each position of a JSON list: one parameter, however many they are.
SETTLE: Final = "delete from {message} where position in (select value from json_each(?))"

ZERO: Final = -(1 << 63)
SWEEP: Final = 15.0  # seconds between two reads from zero: for positions that were written by hand, or restored
BUSY: Final = 5  # SQLITE_BUSY
TRIES: Final = 5


class SqliteStore:
    """`outbox.store.Store` for SQLite, through SQLAlchemy's connection and its driver's SQL."""

    dialect = "sqlite"

    def __init__(self, tables: Tables, engine: sa.Engine | AsyncEngine, *, ours: bool = False) -> None:
        self.tables = tables
        self._runner = Runner(engine, ours=ours)
        self._table = sqlite.dialect().identifier_preparer.format_table(tables.message)
        self._scope = Scope()
        self._rewound = 0
        self._highest = ZERO
        self.rewind()

    def rewind(self) -> None:
        self._start = ZERO
        self._rewound += 1
        self._swept = time.monotonic()

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
        if self._scope.grows(buckets, without_topics) or time.monotonic() - self._swept >= SWEEP:
            self.rewind()
        rewound = self._rewound
        # Rows in flight lie above the start only after a rewind. As they are before the read: a row that is settled
        # while it is read would otherwise look new.
        skipped = frozenset(in_flight) if self._start < self._highest else frozenset()
        while True:
            page = await self.run(_fetch(statement, (self._start, *filters, limit)))
            if page and rewound == self._rewound:
                self._start = page[-1].position
                self._highest = max(self._highest, self._start)
            rows = [row for row in page if row.position not in skipped] if skipped else page
            if rows or len(page) < limit or rewound != self._rewound:
                return rows

    async def settle(self, rows: Sequence[Outgoing]) -> int:
        positions = [row.position for row in rows]  # enough: a file does not fail over
        statement, these = SETTLE.format(message=self._table), (json.dumps(positions),)

        def delete(connection: sa.Connection) -> int:
            count: int = connection.exec_driver_sql(statement, these).rowcount
            return count

        for _ in range(TRIES - 1):
            try:
                return await self.run(delete)
            except StoreUnavailable as error:
                # A lock that was not had is the one failure after which nothing has happened for certain, and a file does
                # not fail over: tried again, instead of sending all of it again.
                code = getattr(getattr(error.__cause__, "orig", None), "sqlite_errorcode", None)
                if code is None or code & 0xFF != BUSY:
                    raise
                await asyncio.sleep(0.01)
        return await self.run(delete)

    async def run(self, work: Callable[[sa.Connection], T]) -> T:
        return await self._runner.run(work)

    async def close(self) -> None:
        await self._runner.close()


def _fetch(statement: str, parameters: tuple[Any, ...]) -> Callable[[sa.Connection], list[Outgoing]]:
    """By the driver itself: SQLAlchemy's result makes a `Row` of each row, which costs as much as reading it. And all in the
    thread that reads: to look at a thousand rows from another processor costs as much again."""

    def fetch(connection: sa.Connection) -> list[Outgoing]:
        raw: Any = connection.connection.dbapi_connection
        if connection.dialect.is_async:  # one call of its thread, not one for each of cursor, execute, fetch and close
            rows = raw.run_async(lambda driver: driver.execute_fetchall(statement, parameters))
        else:
            rows = raw.execute(statement, parameters).fetchall()
        return list(starmap(Outgoing, rows))

    return fetch
