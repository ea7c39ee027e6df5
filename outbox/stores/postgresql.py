"""The relay's hot path on PostgreSQL (13 or newer): psycopg, raw, in autocommit mode, nothing decoded that is not needed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from itertools import starmap
from typing import TYPE_CHECKING, Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from outbox._outgoing import Outgoing
from outbox.stores._run import Runner, Scope, unavailable
from outbox.stores.runs import runs
from outbox.tables import Tables

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")

# Both are sent unprepared, `prepare=False`: a prepared statement's plan outlives the table it was made for. Ours is nearly
# empty most of the time, where reading all of it is the right plan; kept through a burst of a million rows, that plan took
# 33 s to settle 2,000 of them, until the next ANALYZE. And even a new plan goes by the last statistics, which may be those
# of an empty table, so it is not told what would make it read all of it: how many rows are asked for, and how long the
# list is, is in a subquery. (tests/stores/test_plans.py)

# The primary key gives the order and the start; what is left out is a small list, given as a constant, which the database
# makes a hash of. One statement, so one snapshot: a late commit and what was committed after it are seen together or in
# this order.
READ: Final = (
    "select position, id::text, topic, key, type, payload, content_type, headers, bucket from {message} m"
    " where position > %(start)s{{and_}} order by position limit (select %(limit)s::bigint)"
)
WITHOUT_IN_FLIGHT: Final = " and position <> all(%(in_flight)s::bigint[])"
OF_BUCKETS: Final = " and bucket = any(%(buckets)s::smallint[])"
WITHOUT_TOPICS: Final = " and topic <> all(%(without_topics)s::text[])"

# By the primary key. By ranges where there are few: half the work, a tenth more messages of a relay to Kafka. A range holds
# nothing but what is settled (`runs`): by lowest and highest position, a row that was committed late would go unsent.
SETTLE_RANGES: Final = "delete from {message} where "
RANGE: Final = "position between %s and %s"
RANGES: Final = 16
SETTLE: Final = "delete from {message} where position = any(array(select unnest(%s::bigint[])))"
# The same, for a connection that a pooler keeps open while the server behind it is replaced: by then another message may
# have the position. Costs 1 µs more a row. One text, since psycopg takes as long for a list of texts as the server for the
# whole delete.
SETTLE_BY_ID: Final = SETTLE + " and id = any(string_to_array(%s, ' ')::uuid[])"

XMIN: Final = "select pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
# A transaction id of one's own and not the snapshot's xmax: that is the highest *ended* id plus one, and a transaction
# that is open now may have that very id or a higher one. Costs no flush, and only while messages flow.
XMIN_AND_XID: Final = XMIN + ", pg_current_xact_id()::text::bigint"

ZERO: Final = -(1 << 63)  # below every position, also below one that was written by hand
LOOK: Final = 0.1  # seconds between two looks at the transactions
ENDED: Final = 0.02  # seconds between two questions whether those that were noted have ended
SWEEP: Final = 15.0  # seconds between two reads from zero
WAITING: Final = 600  # looks that a writing transaction may stay open before they are thinned out


class Floor:
    """The position up to which no row can appear any more.

    Reading from zero is always right and slow under a held snapshot: each read walks over the deleted rows. Reading above
    the highest settled position inverts keys, since a transaction may have taken a lower position and commit later.
    What is right: everything that could still hold a position up to P had its transaction id when P was read, so once
    all those transactions have ended (a later snapshot's xmin has reached an id given out after P was read), **one more
    read from the old floor** sees the last of them, and P is the new floor.

    A transaction that holds no lock yet takes its position a moment before its id (one that has written or locked a row,
    which is what orders a key, has an id already). So the id that belongs to P is the one of the look after, 0.1 s later,
    and a sweep from zero finds what a process suspended for longer in exactly that moment has left.
    """

    def __init__(self) -> None:
        self.position = ZERO
        self._highest = ZERO
        self._noted = ZERO
        self._waiting: list[tuple[int, int]] = []
        self._next: int | None = None

    @property
    def wants_id(self) -> bool:
        """Whether the next `look` needs a transaction id."""
        return self._noted > max(self.position, self._waiting[-1][0] if self._waiting else ZERO)

    @property
    def at_rest(self) -> bool:
        """Whether a `look` would find nothing out."""
        return not self._waiting and self._highest <= self.position

    @property
    def waits(self) -> bool:
        """Whether a question for what has ended may find something out."""
        return bool(self._waiting)

    def ended(self, xmin: int) -> None:
        """Before a read: what has ended by now, for that read to make use of."""
        while self._waiting and self._waiting[0][1] <= xmin:
            self._next = self._waiting.pop(0)[0]

    def look(self, xmin: int, xid: int | None) -> None:
        """`ended`, and notes what is to end next. Two looks are `LOOK` apart: see above."""
        self.ended(xmin)
        if xid is not None:
            if len(self._waiting) >= WAITING:
                self._waiting.pop()
            self._waiting.append((self._noted, xid))
        self._noted = self._highest

    def has_read(self, last: int | None, full: bool) -> None:
        """After a read from the floor: up to ``last`` (None: no row), and whether the limit cut it off."""
        if last is not None:
            self._highest = max(self._highest, last)
        if self._next is not None:
            safe = self._next if not full or last is None else min(self._next, last)
            self.position = max(self.position, safe)
            self._next = None


class _Line:
    """One connection of the hot path, for one statement at a time."""

    def __init__(self) -> None:
        self.connection: psycopg.AsyncConnection[Any] | None = None
        self.cursor: psycopg.AsyncCursor[Any] | None = None  # kept: making one costs a tenth of an empty read
        self.life = 0
        self.turn = asyncio.Lock()

    async def close(self) -> None:
        connection, self.connection, self.cursor = self.connection, None, None
        if connection is not None:
            await connection.close()


class PostgresqlStore:
    """`outbox.store.Store` for PostgreSQL. Two connections for the hot path (reads, settles), the rest through SQLAlchemy."""

    dialect = "postgresql"

    def __init__(self, tables: Tables, engine: sa.Engine | AsyncEngine, *, ours: bool = False) -> None:
        self.tables = tables
        self._runner = Runner(engine, ours=ours)
        name = postgresql.dialect().identifier_preparer.format_table(tables.message)  # type: ignore[no-untyped-call]
        name = str(name).replace("%", "%%")
        self._read_sql = READ.format(message=name)
        self._settle_sql = SETTLE.format(message=name)
        self._settle_ranges_sql = SETTLE_RANGES.format(message=name)
        self._settle_by_id_sql = SETTLE_BY_ID.format(message=name)
        self._reader, self._settler = _Line(), _Line()
        self._life = 1
        self._scope = Scope()
        self.rewind()

    def rewind(self) -> None:
        self._floor = Floor()
        self._looked = self._asked = 0.0
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
        if self._scope.grows(buckets, without_topics):
            self.rewind()  # of what was left out until now, the floor knows nothing
        try:
            if self._settler.life != self._life:
                # Before anything is read: a connection that is made later may be to another server than what is read,
                # where another message has the position.
                async with self._settler.turn:
                    await self._cursor(self._settler)
            cursor = await self._cursor(self._reader)
            floor, now = self._floor, time.monotonic()
            if now - self._looked >= LOOK and not floor.at_rest:
                self._looked = self._asked = now
                row = await (await cursor.execute(XMIN_AND_XID if floor.wants_id else XMIN)).fetchone()
                assert row is not None
                floor.look(row[0], row[1] if len(row) > 1 else None)
            elif floor.waits and now - self._asked >= ENDED:
                self._asked = now
                row = await (await cursor.execute(XMIN)).fetchone()
                assert row is not None
                floor.ended(row[0])
            sweep = now - self._swept >= SWEEP
            parameters["start"] = ZERO if sweep else floor.position
            query: Any = self._read_sql.format(and_=and_)
            await cursor.execute(query, parameters, prepare=False)
            rows = await cursor.fetchall()
        except BaseException as error:
            await self._lost(self._reader, error)
            raise
        wrong = sweep and rows and rows[0][0] <= floor.position
        floor.has_read(rows[-1][0] if rows else None, len(rows) == limit)
        if wrong:
            self.rewind()  # what else is below that floor comes with the next reads
        elif sweep:
            self._swept = now
        return list(starmap(Outgoing, rows))

    async def settle(self, rows: Sequence[Outgoing]) -> int:
        try:
            async with self._settler.turn:
                cursor = await self._cursor(self._settler)
                pooled = cursor.connection.prepare_threshold is None
                statement, parameters = self._settlement(rows, by_id=pooled)
                await cursor.execute(statement, parameters, prepare=False)
        except BaseException as error:
            await self._lost(self._settler, error)
            raise
        return cursor.rowcount

    def _settlement(self, rows: Sequence[Outgoing], *, by_id: bool) -> tuple[Any, list[Any]]:
        # Any: ours, and the name is checked, but psycopg types ask for a literal
        positions = [row.position for row in rows]
        if by_id:
            return self._settle_by_id_sql, [positions, " ".join([row.id for row in rows])]
        ranges = list(runs(positions))
        if 0 < len(ranges) <= RANGES:
            ends = [end for both in ranges for end in both]
            return self._settle_ranges_sql + " or ".join([RANGE] * len(ranges)), ends
        return self._settle_sql, [positions]

    async def run(self, work: Callable[[sa.Connection], T]) -> T:
        return await self._runner.run(work)

    async def close(self) -> None:
        await self._reader.close()
        await self._settler.close()
        await self._runner.close()

    # ------------------------------------------------------------ connections

    async def _cursor(self, line: _Line) -> psycopg.AsyncCursor[Any]:
        if line.cursor is None or line.life != self._life:
            await line.close()
            life = self._life
            line.connection = await self._runner.raw_psycopg()
            line.cursor = line.connection.cursor(binary=True)
            line.life = life
        return line.cursor

    async def _lost(self, line: _Line, error: BaseException) -> None:
        """After any failure, cancellation included, the connection's state is unknown. What this relay knows of positions
        dies with it, so the other line gets a new connection too, but not before its own statement has ended: a waiter
        on a socket that is closed under it waits for ever. A driver's error is raised as `StoreUnavailable`."""
        self._life += 1
        self.rewind()
        await line.close()
        import psycopg

        if isinstance(error, psycopg.Error):
            raise unavailable(self._runner.engine, error) from error
