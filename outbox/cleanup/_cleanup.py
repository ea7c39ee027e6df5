"""`Cleanup`: remove what is over now, and return; for cron, for code, for ``outbox cleanup``. A relay does the same in the
background, in its own event loop (`outbox.relay.cleaning`)."""

from __future__ import annotations

import datetime as dt
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

import sqlalchemy as sa

from outbox._outbox import Outbox
from outbox._refusals import is_undone
from outbox.backoff import Backoff
from outbox.cleanup.archive import Archive
from outbox.cleanup.retention import Retention
from outbox.cleanup.rules import Rule, rules_for, sparing_unsent, unsent_beyond
from outbox.cleanup.sweep import ROWS, Sweep
from outbox.dialects import clock, insert_if_absent
from outbox.observe.cleanup import RECORD
from outbox.observe.schema import check_schema
from outbox.stores._run import unavailable
from outbox.stores.engine import is_engine, sync_engine_for, transaction
from outbox.tables import Tables

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")

TRIES: Final = 8  # of one batch that loses against others
AGAIN: Final = Backoff(first=0.05, factor=2.0, most=2.0)
SQLITE_BUSY: Final = 5


@dataclass(frozen=True, slots=True)
class Kept:
    """Rows of ``table`` that are old enough to go and stay, and why."""

    table: str
    count: int
    why: str


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What a cleanup removed, rows by table, and what it left although it is old enough."""

    removed: dict[str, int] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be done with an inbox in partitions, and what helps."""
    made: list[dt.date] = field(default_factory=list)
    """The days of which partitions of the inbox were made."""


class Cleanup:
    """Removes inbox rows, closed dead letters, lines of the audit and what was sent, once they are older than ``retention``
    says and nothing waits for them. What is not sent, not handled, or open is never touched, however old.

    ``database``: URL or sync `Engine`; None takes it from ``OUTBOX_DATABASE``. ``retention``: None takes it from
    ``OUTBOX_RETENTION_…``. ``rows``: of one transaction, at the most; fewer where the database is slow, with longer pauses.

    Every method raises `StoreUnavailable` where the database cannot be asked, `SchemaMismatch` for other tables, and
    `ConfigurationError` where its clock is not to be believed. After a crash what is committed is gone and nothing else;
    it may run beside relays, consumers and other cleanups.
    """

    def __init__(
        self,
        outbox: Outbox,
        *,
        database: str | sa.URL | sa.Engine | AsyncEngine | None = None,
        retention: Retention | None = None,
        rows: int = ROWS,
    ) -> None:
        self.outbox = outbox
        self.retention = retention or Retention.from_environment()
        self._database, self._rows = database, rows

    def run(
        self, *, archive: str | None = None, progress: Callable[[dict[str, int]], None] = lambda removed: None
    ) -> Cleaned:
        """Remove what is old now. ``archive``: a file to which each row is appended before it is removed, as a line of
        JSON. ``progress`` is called after each batch with the rows removed so far, by table."""
        tables = self.outbox.tables
        with _Database(self._database) as database:
            database.run(lambda connection: check_schema(connection, tables))
            if archive is None:
                sweep = self._sweep(database, None, progress)
            else:
                with Archive(archive) as file:
                    sweep = self._sweep(database, file, progress)
            kept = database.run(lambda connection: kept_in(connection, tables, self.retention))
            return Cleaned(sweep.removed, kept, sweep.notes, sorted(sweep.made))

    def plan(self) -> Cleaned:
        """What `run` would do. Changes nothing, and counts what is old: with millions of such rows it takes seconds. Of an
        inbox in partitions what is old goes with its day, up to two days later."""
        tables = self.outbox.tables

        def look(connection: sa.Connection) -> Cleaned:
            check_schema(connection, tables)
            Sweep(tables, self.retention).begin(connection)  # says whether the clock is to be believed
            rules = _rules(connection, tables, self.retention)
            counts = {rule.name: _count(connection, rule, rule.removable()) for rule in rules}
            return Cleaned({name: n for name, n in counts.items() if n}, kept_in(connection, tables, self.retention))

        with _Database(self._database) as database:
            return database.run(look)

    def _sweep(self, database: _Database, archive: Archive | None, progress: Callable[[dict[str, int]], None]) -> Sweep:
        sweep = Sweep(self.outbox.tables, self.retention, rows=self._rows, archive=archive)
        database.run(sweep.begin)
        while True:
            began = time.monotonic()
            batch = database.run(sweep.batch)
            pause = sweep.done(batch, time.monotonic() - began)
            if batch.last:
                database.run(lambda connection: record(connection, self.outbox.tables, sweep))
                return sweep
            progress(sweep.removed)
            time.sleep(pause)


def record(connection: sa.Connection, tables: Tables, sweep: Sweep) -> None:
    """Write down that a sweep is over, what it removed and how long it keeps what: for `outbox status`, for the relays, which
    leave each other alone for a while, and for consumers, which check it when they start."""
    checkpoint = tables.checkpoint
    retention = {name: value for name, value in sweep.retention.as_dict().items() if math.isfinite(value)}
    value = json.dumps({"removed": sweep.removed, "retention": retention})
    mine = sa.update(checkpoint).where(checkpoint.c.name == RECORD).values(value=value, updated_at=clock())
    if connection.execute(mine).rowcount == 0:
        insert = insert_if_absent(checkpoint, connection.dialect.name)
        connection.execute(insert.values(name=RECORD, value=value, updated_at=clock()))


def kept_in(connection: sa.Connection, tables: Tables, retention: Retention) -> list[Kept]:
    """What is old enough and stays. After a cleanup these are few, and found by the index on the time."""
    found = []
    for rule in _rules(connection, tables, retention):
        for why, condition in rule.needed:
            found.append(Kept(rule.name, _count(connection, rule, condition), why))
    letter = tables.dead_letter
    open_ = sa.select(sa.func.count()).select_from(letter).where(letter.c.state == "open")
    found.append(
        Kept("dead_letter", connection.scalar(open_) or 0, "open: replay or discard them (`outbox dlq groups`)")
    )
    return [kept for kept in found if kept.count]


def _rules(connection: sa.Connection, tables: Tables, retention: Retention) -> list[Rule]:
    rules = [rule for rule in rules_for(tables, retention) if math.isfinite(rule.seconds)]
    return [sparing_unsent(rule, tables) if unsent_beyond(connection, tables, rule.seconds) else rule for rule in rules]


def _count(connection: sa.Connection, rule: Rule, condition: sa.ColumnElement[bool]) -> int:
    query = sa.select(sa.func.count()).select_from(rule.table)
    return connection.scalar(query.where(rule.at < clock(-rule.seconds), rule.candidate, condition)) or 0


class _Database:
    """Transactions on a database of the caller's, or of its URL, one after the other; what others win is tried again."""

    def __init__(self, database: str | sa.URL | sa.Engine | AsyncEngine | None) -> None:
        self._ours = not is_engine(database)
        self._engine = sync_engine_for(database, create=True)

    def __enter__(self) -> _Database:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._ours:
            self._engine.dispose()

    def run(self, work: Callable[[sa.Connection], T]) -> T:
        tries = 0
        while True:
            try:
                with transaction(self._engine) as connection:
                    return work(connection)
            except sa.exc.DBAPIError as error:
                tries += 1
                if tries >= TRIES or not _lost(error):
                    raise unavailable(self._engine, error) from error
            time.sleep(AGAIN.delay(tries))


def _lost(error: sa.exc.DBAPIError) -> bool:
    """Whether the transaction was rolled back for another's sake, so that it may be tried again."""
    busy = getattr(error.orig, "sqlite_errorcode", None)
    if busy is not None:
        return bool(busy & 0xFF == SQLITE_BUSY)
    return error.orig is not None and is_undone(error.orig)
