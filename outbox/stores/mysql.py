"""The relay's hot path on MySQL (8.0.17 or newer) and MariaDB (10.6 or newer): the engine's own driver, raw, in autocommit
mode and READ COMMITTED, so that it holds no lock that a writer could wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import starmap
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from outbox._outgoing import Outgoing
from outbox._refusals import is_undone
from outbox.stores._run import Runner, unavailable
from outbox.stores.runs import Settled, runs
from outbox.tables import Tables

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")

# In the order of the primary key, from the first row on: above any other position a row could still be committed late.
# One statement, so one snapshot: a late commit and what was committed after it are seen together or in this order.
# No parameters, since drivers put them into the text anyway.
SELECT: Final = (
    "select position, id, topic, `key`, type, payload, content_type, headers, bucket from {message} where {where}"
)
READ: Final = SELECT + " order by position limit {limit}"
# The same without what this relay has removed by itself, over which InnoDB walks until it is purged (decision 14). What lies
# below is read downwards: to find the end of a range, InnoDB walks on to the next row that is there. Gaps are looked up.
READ_AROUND: Final = (
    f"({SELECT} and position < {{below}} order by position desc limit {{limit}})"
    f" union all ({SELECT} and position in ({{gaps}}))"
    f" union all ({SELECT} and position > {{above}} order by position limit {{limit}})"
)
# Runs of positions, each of which is in flight: ranges of the primary key. Many of them would take the optimizer longer
# than all the rows; "+ 0" keeps it from making ranges out of the list.
BETWEEN: Final = "position not between {first} and {last}"
NOT_IN: Final = "position + 0 not in ({positions})"
OF_BUCKETS: Final = "bucket in ({buckets})"
WITHOUT_TOPICS: Final = "topic not in ({topics})"

# By the primary key, one look-up a position, and nothing else: InnoDB locks every row that a DELETE only looks at, and would
# wait for the open transaction that inserts it. So not by ranges, which end at the row behind them, and the index is forced,
# since of a small table the optimizer prefers to look at all. And by id: a proxy (ProxySQL, those of the clouds) hides a
# fail-over, after which another message may have the position. That costs 1 µs a row.
SETTLE: Final = "delete m from {message} m force index (primary) where position in ({positions}) and id in ({ids})"

# What the connection gets. Under REPEATABLE READ to delete a position that is not there locks the gap that it left, and
# inserts into it wait.
QUIETLY: Final = ("set session transaction isolation level read committed", "set autocommit = 1")
# MariaDB makes a subquery with a table of a list this long, which takes five times as long.
LISTS_STAY_LISTS: Final = "set in_predicate_conversion_threshold = 0"

RUNS: Final = 16
TRIES: Final = 5
SWEEP: Final = (
    15.0  # seconds between two reads of everything: by hand, or by a hidden fail-over, a position can come again
)


class MysqlStore:
    """`outbox.store.Store` for MySQL and MariaDB. Two connections for the hot path (reads, settles), the rest through
    SQLAlchemy. ``hot``: an engine of the same database whose driver the hot path uses instead."""

    def __init__(
        self,
        tables: Tables,
        engine: sa.Engine | AsyncEngine,
        *,
        ours: bool = False,
        hot: AsyncEngine | None = None,
    ) -> None:
        self.tables = tables
        self.dialect = engine.dialect.name
        self._runner = Runner(engine, ours=ours)
        self._table = mysql.dialect().identifier_preparer.format_table(tables.message)
        # decoded in C and without a thread, which a server that falls silent would keep
        self._hot = Runner(hot, ours=True) if hot is not None else self._runner
        self._reader, self._settler = _Line(self._hot), _Line(self._hot)
        self.rewind()

    def rewind(self) -> None:
        self._settled = Settled()
        self._swept = time.monotonic()

    async def read(
        self, buckets: Collection[int] | None, in_flight: Collection[int], without_topics: Collection[str], limit: int
    ) -> list[Outgoing]:
        settled, now = self._settled, time.monotonic()
        sweep = now - self._swept >= SWEEP
        conditions = list(_without(in_flight)) or ["true"]
        if buckets is not None:
            conditions.append(OF_BUCKETS.format(buckets=_numbers(buckets)))
        if without_topics:
            conditions.append(WITHOUT_TOPICS.format(topics=_texts(list(without_topics))))
        names: dict[str, Any] = {"message": self._table, "where": " and ".join(conditions), "limit": int(limit)}
        if settled and not sweep:
            below, gaps, above = settled.below, _numbers(settled.gaps) or "null", settled.above
            around = READ_AROUND.format(**names, below=below, gaps=gaps, above=above)
            rows, _ = await self._execute(self._reader, around)
            if sum(row[0] < below for row in rows) < limit:
                return list(starmap(Outgoing, sorted(rows, key=itemgetter(0))[:limit]))
            self.rewind()  # those are the last that lie below, and the first are wanted
        rows, _ = await self._execute(self._reader, READ.format(**names))
        if sweep:
            self._swept = now
            if any(row[0] in settled for row in rows):
                self.rewind()
        return list(starmap(Outgoing, rows))

    async def settle(self, rows: Sequence[Outgoing]) -> int:
        if not rows:
            return 0
        positions = _numbers(row.position for row in rows)
        statement = SETTLE.format(message=self._table, positions=positions, ids=_texts([row.id for row in rows]))
        settled = self._settled  # as it is before: what is forgotten meanwhile may be another server's
        _, count = await self._execute(self._settler, statement, TRIES)
        if count == len(rows):
            settled.add([row.position for row in rows])
        return count

    async def run(self, work: Callable[[sa.Connection], T]) -> T:
        return await self._runner.run(work)

    async def close(self) -> None:
        await self._reader.close()
        await self._settler.close()
        await self._runner.close()
        if self._hot is not self._runner:
            await self._hot.close()

    async def _execute(self, line: _Line, sql: str, tries: int = 1) -> tuple[Sequence[Sequence[Any]], int]:
        """Rows and row count. Tried again where the server chose the statement as a deadlock's victim: then nothing of it
        has happened for certain. After any other failure, cancellation included, the connection's state is unknown, and
        what the caller read through the other one may be another server's: both are made anew."""
        try:
            while True:
                try:
                    return await line.execute(sql)
                except Exception as error:
                    tries -= 1
                    if not tries or not is_undone(error):
                        raise
        except BaseException as error:
            self._reader.old = self._settler.old = True
            self.rewind()
            await line.close()
            if self._hot.is_drivers(error):
                raise unavailable(self._hot.engine, error) from error
            raise


class _Line:
    """One connection of the hot path, for one statement at a time."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._connection: Any = None
        self.old = False

    async def execute(self, sql: str) -> tuple[Sequence[Sequence[Any]], int]:
        if self._connection is None or self.old:
            await self.close()
            self.old = False
            self._connection = await self._runner.raw()
            for statement in QUIETLY:
                await self._runner.raw_execute(self._connection, statement)
            if self._runner.engine.dialect.is_mariadb:  # type: ignore[attr-defined]
                await self._runner.raw_execute(self._connection, LISTS_STAY_LISTS)
        return await self._runner.raw_execute(self._connection, sql)

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._runner.raw_close(connection)


def _without(in_flight: Collection[int]) -> Iterator[str]:
    ranges = list(runs(in_flight))
    if len(ranges) > RUNS:
        yield NOT_IN.format(positions=_numbers(in_flight))
        return
    for first, last in ranges:
        yield BETWEEN.format(first=first, last=last)


def _numbers(numbers: Iterable[int]) -> str:
    return ",".join(map(str, map(int, numbers)))


def _texts(texts: list[str]) -> str:
    """A list of literals; where one could end early, in hexadecimal digits."""
    joined = "','".join(texts)
    if joined.count("'") == 2 * (len(texts) - 1) and "\\" not in joined:
        return f"'{joined}'"
    return ",".join(f"_utf8mb4 0x{text.encode().hex()}" for text in texts)
