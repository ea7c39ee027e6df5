"""One way through the tables, oldest rows first, a batch at a time.

A batch is a slice of time: from where the last one ended to the n-th row after it, found by the index on the time. So rows
that are needed are looked at once a sweep, and dead rows that vacuum has not taken yet are not walked over again by each
batch (a LIMIT from the beginning would: quadratic). Bounds come from the database's clock, once for a sweep.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from outbox.cleanup.archive import Archive
from outbox.cleanup.days import Chore, Days, is_owner
from outbox.cleanup.pace import Pace
from outbox.cleanup.retention import HOUR, Retention
from outbox.cleanup.rules import Rule, rules_for, sparing_unsent, unsent_beyond
from outbox.dialects import MYSQL, UtcDateTime, clock
from outbox.errors import ConfigurationError
from outbox.observe.partitions import inbox_partitions
from outbox.tables import Tables

ROWS: Final = 1000  # of a batch, at the most
AT_ONCE: Final = 400  # keys of one statement, of two columns: SQLite's oldest builds take 999 parameters
SKEW: Final = HOUR  # seconds between the database's clock and ours, from which on one of them is not to be believed


class Stored(sa.types.UserDefinedType[Any]):
    """A time as the driver gives it, to be given back as it is: text that is no time, in a row written to SQLite by hand,
    must not stop a sweep."""

    cache_ok = True


@dataclass(frozen=True, slots=True)
class Batch:
    """``removed`` rows of ``table`` (a rule's name). ``full``: there is more of it. ``last``: the sweep is over."""

    table: str
    removed: int
    full: bool
    last: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a sweep is: which rule, and from which time on (None: from the first row)."""

    rule: int = 0
    since: Any = None  # as stored
    after: bool = False  # all rows of that time have been seen


class Sweep:
    """``begin`` in one transaction, then ``batch``, each in its own, until it says ``last``; ``done`` after each commit.

    After a failed transaction nothing has moved: the same batch is tried again.
    """

    def __init__(
        self, tables: Tables, retention: Retention, *, rows: int = ROWS, archive: Archive | None = None
    ) -> None:
        self.tables, self.retention = tables, retention
        self.pace = Pace(rows)
        self.removed: dict[str, int] = {}
        self.notes: list[str] = []
        """What could not be done with an inbox in partitions, and what helps."""
        self.made: set[dt.date] = set()
        """The days of which it made partitions."""
        self._archive = archive
        self._rules: list[tuple[Rule, Any]] = []
        self._chores: list[Chore] = []
        self._at_chore = False
        self._place = self._next = _Place()

    def begin(self, connection: sa.Connection) -> None:
        """Fix what is old, by the database's clock. Raises `ConfigurationError` where that is far from this machine's: one
        of the two has jumped, and everything would look old."""
        now: dt.datetime = connection.execute(sa.select(sa.type_coerce(clock(), UtcDateTime()))).scalar_one()
        apart = (now - dt.datetime.now(dt.UTC)).total_seconds()
        if abs(apart) > SKEW:
            raise ConfigurationError(
                f"cleanup: the database's clock says {now:%Y-%m-%d %H:%M:%S} UTC, {abs(apart) / HOUR:,.0f} hours "
                f"{'ahead of' if apart > 0 else 'behind'} this machine's: nothing is removed until one of them is set right"
            )
        self._rules, self._chores, self.notes = [], [], []
        for rule in self._wanted(connection, now):
            cutoff = connection.execute(sa.select(sa.type_coerce(clock(-rule.seconds), Stored()))).scalar_one()
            self._rules.append((rule, cutoff))
        self._place = self._next = _Place()

    def _wanted(self, connection: sa.Connection, now: dt.datetime) -> Iterator[Rule]:
        for rule in rules_for(self.tables, self.retention):
            finite = math.isfinite(rule.seconds)
            sparing = finite and unsent_beyond(connection, self.tables, rule.seconds)
            days = self._days_of(connection, rule, now, sparing=sparing) if rule.name == "inbox" else None
            if days is not None:
                self._chores = list(days.chores(connection))
            if finite:
                yield from [sparing_unsent(rule, self.tables) if sparing else rule] if days is None else days.by_row()

    def _days_of(self, connection: sa.Connection, rule: Rule, now: dt.datetime, *, sparing: bool) -> Days | None:
        partitions = inbox_partitions(connection, self.tables)
        if partitions is None:
            return None
        if not is_owner(connection, self.tables):
            self.notes = [
                f"only the owner of {self.tables.inbox.fullname} may make and drop partitions: run `outbox cleanup` as it "
                "once a day; until then rows are deleted one by one"
            ]
            return None
        days = Days(self.tables, partitions, now, rule.seconds, sparing=sparing, archive=self._archive)
        self.notes, self.made = days.notes, days.made
        return days

    def batch(self, connection: sa.Connection) -> Batch:
        """Remove the next few rows, or a day of them, in the transaction of ``connection``. Goes on until it has seen some,
        or is through."""
        if self._chores:
            self._at_chore = True
            return Batch("inbox", self._chores[0](connection), full=False)
        place, rows = self._place, self.pace.rows
        while place.rule < len(self._rules):
            rule, cutoff = self._rules[place.rule]
            start = _from(rule, place)
            until = connection.scalar(_nth(rule, start, cutoff, rows))
            # one bound and no more: SQLite goes by the first, and would walk on to the cutoff
            end = (
                _at(rule) < sa.literal(cutoff, Stored()) if until is None else _at(rule) <= sa.literal(until, Stored())
            )
            slice = [*start, end]
            removed = self._remove(connection, rule, slice, rows)
            # where the slice was not emptied, there may be more rows of its last time
            place = _Place(place.rule + 1) if until is None else _Place(place.rule, until, after=removed < rows)
            if removed or until is not None:  # also where all were needed: they have been looked at
                self._next = place
                return Batch(rule.name, removed, full=until is not None)
        self._next = place
        return Batch("", 0, full=False, last=True)

    def done(self, batch: Batch, seconds: float) -> float:
        """The batch's transaction has committed, after so long; returns how many seconds to wait."""
        self._place = self._next
        if self._at_chore:
            self._at_chore = False
            del self._chores[0]
        if batch.removed:
            self.removed[batch.table] = self.removed.get(batch.table, 0) + batch.removed
        return self.pace.after(seconds, full=batch.full)

    # ------------------------------------------------------------ statements

    def _remove(self, connection: sa.Connection, rule: Rule, slice: Sequence[sa.ColumnElement[bool]], rows: int) -> int:
        """Rows that somebody holds are left for the next sweep: nobody is waited for, so neither a replay nor another
        cleanup is ever in a deadlock with this one."""
        columns = list(rule.key) if self._archive is None else list(rule.table.columns)
        old = (
            sa.select(*columns)
            .where(*slice, rule.removable())
            .order_by(rule.at)
            .limit(rows)
            .with_for_update(skip_locked=True, of=rule.table)
        )
        if self._archive is None and connection.dialect.name in ("postgresql", "sqlite"):
            return connection.execute(_in_one(rule, old, connection.dialect.name)).rowcount
        if (
            connection.dialect.name == "sqlite"
        ):  # FOR UPDATE means nothing there: a write takes the one lock, before the look
            connection.execute(sa.delete(rule.table).where(sa.false()))
        found = connection.execute(old).mappings().all()
        if not found:
            return 0
        if self._archive is not None:
            self._archive.write(f"{self.tables.prefix}{rule.name}", map(dict, found))
        _by_key(connection, rule, found)
        return len(found)  # locked, so that they are all there


def _at(rule: Rule) -> sa.ColumnElement[Any]:
    return sa.type_coerce(rule.at, Stored())


def _from(rule: Rule, place: _Place) -> list[sa.ColumnElement[bool]]:
    if place.since is None:
        return [rule.at.is_not(None)]
    since = sa.literal(place.since, Stored())
    return [_at(rule) > since if place.after else _at(rule) >= since]


def _nth(rule: Rule, start: Sequence[sa.ColumnElement[bool]], cutoff: Any, rows: int) -> sa.Select[Any]:
    """The time of the n-th row from there on; nothing where that is not old. By the index on the time: the cutoff is
    compared outside, since PostgreSQL, while it has no statistics, takes a span with two ends for a few rows, and sorts."""
    nth = sa.select(_at(rule).label("at")).where(*start).order_by(rule.at).limit(1).offset(rows - 1).subquery()
    return sa.select(nth.c.at).where(nth.c.at < sa.literal(cutoff, Stored()))


def _in_one(rule: Rule, old: sa.Select[Any], dialect: str) -> sa.Delete:
    """``WITH old AS (SELECT … LIMIT n FOR UPDATE SKIP LOCKED) DELETE … WHERE key IN (SELECT … FROM old)``: nothing crosses
    the network, and the delete goes by the primary key. PostgreSQL runs a CTE that locks exactly once; a plain subquery it
    may run again, and lock more. SQLite has the write lock from the beginning; of a statement that begins with WITH, Python's
    driver does not say how many rows it deleted."""
    doomed = old.subquery("old") if dialect == "sqlite" else old.cte("old")
    keys = sa.tuple_(*rule.key) if len(rule.key) > 1 else rule.key[0]
    return sa.delete(rule.table).where(keys.in_(sa.select(*doomed.c)))


def _by_key(connection: sa.Connection, rule: Rule, found: Sequence[Any]) -> None:
    """The same in two steps, for MySQL, which cannot select from the table it deletes from, and where the rows are wanted.

    On MySQL row by row: of a list of keys the optimizer may look at all rows of a small table instead, and InnoDB locks what
    it looks at: a row that a handler holds would be waited for, which `SKIP LOCKED` has just avoided."""
    names = [column.name for column in rule.key]
    keys = [tuple(row[name] for name in names) for row in found]
    if connection.dialect.name in MYSQL:
        one = sa.delete(rule.table).where(*(column == sa.bindparam(f"the_{column.name}") for column in rule.key))
        connection.execute(
            one, [{f"the_{name}": value for name, value in zip(names, key, strict=True)} for key in keys]
        )
        return
    target = sa.tuple_(*rule.key) if len(names) > 1 else rule.key[0]
    for at in range(0, len(keys), AT_ONCE):
        part = keys[at : at + AT_ONCE]
        connection.execute(
            sa.delete(rule.table).where(target.in_(part if len(names) > 1 else [key[0] for key in part]))
        )
