"""The relay's hot path on PostgreSQL (13 or newer): psycopg, raw, in autocommit mode, nothing decoded that is not needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from outbox._message import Outgoing
from outbox.errors import StoreUnavailable
from outbox.stores._run import Runner
from outbox.tables import Tables

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")

# The primary key gives the order and the start; what is left out is a small list. One statement, so one snapshot: a
# late commit and what was committed after it are seen together or in this order. Sent unprepared with the list as a
# parameter, so that the planner knows it and hashes it.
READ: Final = (
    "select position, id::text, topic, key, type, payload, content_type, headers, bucket from {message} m"
    " where position > %(start)s{{and_}} order by position limit %(limit)s"
)
WITHOUT_IN_FLIGHT: Final = " and position <> all(%(in_flight)s::bigint[])"
OF_BUCKETS: Final = " and bucket = any(%(buckets)s::smallint[])"
WITHOUT_TOPICS: Final = " and topic <> all(%(without_topics)s::text[])"

# By the primary key.
SETTLE: Final = "delete from {message} where position = any(%s::bigint[])"

SNAPSHOT: Final = (
    "select pg_snapshot_xmin(s)::text::bigint, pg_snapshot_xmax(s)::text::bigint from pg_current_snapshot() s"
)

LOOK: Final = 0.1  # seconds between two looks at the snapshot
SWEEP: Final = 15.0  # seconds between two reads from zero


class Floor:
    """The position up to which no row can appear any more.

    Reading from zero is always right and slow under a held snapshot: each read walks over the deleted rows. Reading above
    the highest settled position inverts keys, since a transaction may have taken a lower position and commit later.
    What is right: everything that could still hold a position up to P had its transaction id when P was read, so once
    all those transactions have ended (a later snapshot's xmin has reached the xmax of then), **one more read from the old
    floor** sees the last of them, and P is the new floor.

    A transaction takes its position a moment before its id. So the xmax that belongs to P is the one of the look after
    (0.1 s later), and a sweep from zero finds what a process suspended for longer in exactly that moment has left.
    """

    def __init__(self) -> None:
        self.position = 0
        self._highest = 0
        self._noted = 0
        self._waiting: list[tuple[int, int]] = []
        self._next: int | None = None

    def look(self, xmin: int, xmax: int) -> None:
        """Before a read: what the snapshot allows, once that read is done."""
        while self._waiting and self._waiting[0][1] <= xmin:
            self._next = self._waiting.pop(0)[0]
        if self._noted > self.position and (not self._waiting or self._waiting[-1][0] < self._noted):
            self._waiting.append((self._noted, xmax))
        self._noted = self._highest

    def has_read(self, last: int | None, full: bool) -> None:
        """After a read from the floor: up to ``last`` (None: no row), and whether the limit cut it off."""
        if last is not None:
            self._highest = max(self._highest, last)
        if self._next is not None:
            safe = self._next if not full or last is None else min(self._next, last)
            self.position = max(self.position, safe)
            self._next = None


class PostgresqlStore:
    """`outbox.store.Store` for PostgreSQL. Two connections for the hot path (reading, settling), the rest through SQLAlchemy."""

    dialect = "postgresql"

    def __init__(self, tables: Tables, engine: sa.Engine | AsyncEngine) -> None:
        self.tables = tables
        self._runner = Runner(engine)
        name = postgresql.dialect().identifier_preparer.format_table(tables.message)
        name = name.replace("%", "%%")
        self._read_sql = READ.format(message=name)
        self._settle_sql = SETTLE.format(message=name)
        self._reader: psycopg.AsyncConnection[Any] | None = None
        self._settler: psycopg.AsyncConnection[Any] | None = None
        self.rewind()

    def rewind(self) -> None:
        self._floor = Floor()
        self._looked = 0.0
        self._swept = time.monotonic()

    async def read(
        self, buckets: Collection[int] | None, in_flight: Collection[int], without_topics: Collection[str], limit: int
    ) -> list[Outgoing]:
        parameters: dict[str, Any] = {"limit": limit}
        and_ = ""
        if buckets is not None:
            and_ += OF_BUCKETS
            parameters["buckets"] = list(buckets)
        if in_flight:
            and_ += WITHOUT_IN_FLIGHT
            parameters["in_flight"] = list(in_flight)
        if without_topics:
            and_ += WITHOUT_TOPICS
            parameters["without_topics"] = list(without_topics)
        now = time.monotonic()
        try:
            reader = self._reader or await self._open("_reader")
            floor = self._floor
            # a topic that is left out has rows that nobody has read: the floor must not pass them
            look = not without_topics and now - self._looked >= LOOK
            if look:
                self._looked = now
                row = await (await reader.execute(SNAPSHOT)).fetchone()
                floor.look(*cast("tuple[int, int]", row))
            sweep = now - self._swept >= SWEEP
            parameters["start"] = 0 if sweep else floor.position
            query: Any = self._read_sql.format(and_=and_)
            cursor = reader.cursor(binary=True)
            await cursor.execute(query, parameters, prepare=not in_flight)
            rows = await cursor.fetchall()
        except BaseException as error:
            await self._lost(error)
            raise
        if sweep:
            self._swept = now
        floor.has_read(rows[-1][0] if rows else None, len(rows) == limit)
        return list(map(Outgoing._make, rows))

    async def settle(self, positions: Sequence[int]) -> int:
        try:
            sql: Any = self._settle_sql  # ours, and the name is checked: psycopg types ask for a literal
            settler = self._settler or await self._open("_settler")
            cursor = await settler.execute(sql, (list(positions),), binary=True)
        except BaseException as error:
            await self._lost(error)
            raise
        return cursor.rowcount

    async def run(self, work: Callable[[sa.Connection], T]) -> T:
        return await self._runner.run(work)

    async def close(self) -> None:
        await self._drop()
        await self._runner.close()

    # ------------------------------------------------------------ connections

    async def _open(self, name: str) -> psycopg.AsyncConnection[Any]:
        connection = await self._runner.raw_psycopg()
        await connection.set_autocommit(True)
        setattr(self, name, connection)
        return connection

    async def _drop(self) -> None:
        connections = [c for c in (self._reader, self._settler) if c is not None]
        self._reader = self._settler = None
        self.rewind()
        for connection in connections:
            await connection.close()

    async def _lost(self, error: BaseException) -> None:
        """After any failure, cancellation included, the connection's state is unknown: both are closed. What this relay
        knows of positions dies with them. A driver's error is raised as `StoreUnavailable`."""
        await self._drop()
        import psycopg

        if isinstance(error, psycopg.Error):
            raise StoreUnavailable(
                f"PostgreSQL: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
