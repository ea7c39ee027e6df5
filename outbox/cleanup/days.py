"""An inbox in daily partitions: those of the next days are made, those that are over go as a whole (docs/decisions/0017).

Each chore is a transaction of its own. One that does not get its lock at once gives way and comes with the next sweep:
messages whose day has no partition go into the default one, whose rows are deleted.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import sqlalchemy as sa

from outbox._refusals import words
from outbox.cleanup.archive import Archive
from outbox.cleanup.retention import DAY
from outbox.cleanup.rules import Rule, inbox_rule, sparing_unsent
from outbox.observe.partitions import Partition, lowest_id
from outbox.storage import STORAGE, listed
from outbox.tables import Tables

AHEAD: Final = 7  # days
GRACE: Final = 2 * DAY  # seconds after which what should have gone with its day is deleted row by row
LOCK: Final = "200ms"  # for which a chore waits for a lock, and so the longest time that consumers queue behind it
WORK: Final = "10s"  # of one statement that holds a lock: PostgreSQL reads the default partition when one is attached
AT_ONCE: Final = 1000  # rows that are written to an archive

DETACHED: Final = "pyoutbox: this was a day of the inbox, and is dropped by the next cleanup"
REFUSED: Final = "42501"
TOOK_LONG: Final = "57014"
IN_DEFAULT: Final = "23514"
# lock_timeout, statement_timeout, deadlock; another cleanup made it (twice), or has dropped it; the default partition has
# rows of that day
GIVES_WAY: Final = frozenset({"55P03", "57014", "40P01", "42P07", "23505", "42P01", "23514"})

Chore = Callable[[sa.Connection], int]
"""Does one thing in the transaction it is given, and returns how many inbox rows are gone by it."""


def is_owner(connection: sa.Connection, tables: Tables) -> bool:
    """Whether partitions may be made and dropped by this role; nobody can be granted that."""
    name = connection.dialect.identifier_preparer.format_table(tables.inbox)
    query = sa.text("SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass(:inbox)")
    return bool(connection.scalar(query, {"inbox": name}))


class Days:
    """What is to be done with the ``partitions`` of one inbox, at the time ``now`` of the database. ``seconds``: how long
    rows are kept; ``sparing``: also while their message is unsent. ``notes``: in words, what could not be done and what
    helps."""

    def __init__(
        self,
        tables: Tables,
        partitions: list[Partition],
        now: dt.datetime,
        seconds: float,
        *,
        sparing: bool = False,
        archive: Archive | None = None,
    ) -> None:
        self.tables, self.partitions, self._now, self._seconds = tables, partitions, now, seconds
        self._sparing, self._archive = sparing, archive
        self._free: set[str] = set()
        self._slow = False
        self.notes: list[str] = []
        self.made: set[dt.date] = set()

    def chores(self, connection: sa.Connection) -> Iterator[Chore]:
        yield from (partial(self._drop, name) for name in self._detached(connection))
        for one in self.over():
            yield partial(self._look, one)
            yield partial(self._detach, one)
            yield partial(self._drop, one.name)
        yield from (partial(self._make, day) for day in self._missing())

    def over(self) -> list[Partition]:
        """Partitions of which every row may be old enough."""
        oldest = self._now.timestamp() - self._seconds
        return [one for one in self.partitions if one.until is not None and one.ends.timestamp() <= oldest]

    def by_row(self) -> list[Rule]:
        """What is deleted row by row all the same: the default partition, and what is left of days that could not go because
        some of their rows are needed."""
        rest = self._rule(self.tables.inbox, self._seconds + GRACE)
        return [*(self._rule(self._table(one.name)) for one in self.partitions if one.until is None), rest]

    def _rule(self, table: sa.Table, seconds: float | None = None) -> Rule:
        rule = inbox_rule(self.tables, self._seconds if seconds is None else seconds, table)
        return sparing_unsent(rule, self.tables) if self._sparing else rule

    # ------------------------------------------------------------ chores

    def _missing(self) -> Iterator[dt.date]:
        tomorrow = self._now.date() + dt.timedelta(days=1)
        for day in (tomorrow + dt.timedelta(days=n) for n in range(AHEAD)):
            first, until = lowest_id(day), lowest_id(day + dt.timedelta(days=1))
            if not any(p.first is not None and p.until is not None and p.first < until and first < p.until
                       for p in self.partitions):  # fmt: skip
                yield day

    def _make(self, day: dt.date, connection: sa.Connection) -> int:
        """A table that is attached, rather than made as a partition: that would lock the inbox. Where the default one takes
        too long to be read, it would for each other day, and its consumers wait."""
        if self._slow:
            return 0
        day_of = sa.table(f"{self.tables.prefix}inbox_d{day:%Y%m%d}", schema=self._home(connection))
        name = connection.dialect.identifier_preparer.format_table(day_of)
        inbox = self._quoted(connection, self.tables.inbox.name)
        first, until = lowest_id(day), lowest_id(day + dt.timedelta(days=1))
        statements = (
            f"CREATE TABLE {name} (LIKE {inbox} INCLUDING ALL)",
            f"ALTER TABLE {name} SET ({listed(STORAGE['inbox'])})",
            f"ALTER TABLE {inbox} ATTACH PARTITION {name} FOR VALUES FROM ('{first}') TO ('{until}')",
        )

        def make() -> int:
            for statement in statements:
                connection.exec_driver_sql(statement)
            self.made.add(day)
            return 0

        return self._giving_way(connection, f"making the inbox's partition of {day}", make)

    def _look(self, one: Partition, connection: sa.Connection) -> int:
        """Whether a row in it must stay: each is asked what every row of the inbox is asked before it is deleted."""
        rule = self._rule(self._table(one.name))
        stays = sa.or_(rule.at >= self._cutoff, sa.not_(rule.removable()))

        def look() -> int:
            if not connection.scalar(sa.select(sa.exists().select_from(rule.table).where(stays))):
                self._free.add(one.name)
            return 0

        return self._giving_way(connection, f"looking at {one.name}", look, work="0")  # it may take its time

    def _detach(self, one: Partition, connection: sa.Connection) -> int:
        """No row of it becomes needed between the look and the lock (see `outbox.cleanup.rules`), but one may come: a message
        of that day that was handled only now. With the lock it is seen, or waits and finds another place. So this is a
        transaction of its own, whose first snapshot is of after the lock, whatever its isolation level."""
        if one.name not in self._free:
            return 0
        name, inbox = self._quoted(connection, one.name), self._quoted(connection, self.tables.inbox.name)
        newer = sa.select(sa.exists().where(self._table(one.name).c.processed_at >= self._cutoff))

        def detach() -> int:
            connection.exec_driver_sql(f"LOCK TABLE ONLY {inbox}, {name} IN ACCESS EXCLUSIVE MODE")
            if not connection.scalar(newer):
                connection.exec_driver_sql(f"ALTER TABLE {inbox} DETACH PARTITION {name}")
                connection.exec_driver_sql(f"COMMENT ON TABLE {name} IS '{DETACHED}'")
            return 0

        return self._giving_way(connection, f"dropping the inbox's partition {one.name}", detach)

    def _drop(self, name: str, connection: sa.Connection) -> int:
        """What was detached, now or before a crash. A row is in the archive before it goes."""
        if name not in self._detached(connection):
            return 0
        table = self._table(name)

        def drop() -> int:
            rows = 0
            if self._archive is None:
                rows = connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            else:
                found = connection.execute(sa.select(table).execution_options(yield_per=AT_ONCE))
                for part in found.mappings().partitions():
                    self._archive.write(self.tables.inbox.name, map(dict, part))
                    rows += len(part)
            connection.exec_driver_sql(f"DROP TABLE {self._quoted(connection, name)}")
            return rows

        return self._giving_way(connection, f"dropping the table {name}", drop, work="0")  # nobody waits for it

    # ------------------------------------------------------------ how

    def _detached(self, connection: sa.Connection) -> list[str]:
        query = sa.text(
            "SELECT c.relname FROM pg_class c JOIN pg_description d"
            " ON d.objoid = c.oid AND d.classoid = 'pg_class'::regclass AND d.objsubid = 0"
            " WHERE NOT c.relispartition AND c.relkind = 'r' AND d.description = :detached"
            " AND starts_with(c.relname, :begins) AND c.relnamespace ="
            " (SELECT relnamespace FROM pg_class WHERE oid = to_regclass(:inbox))"
        )
        inbox = self._quoted(connection, self.tables.inbox.name)
        begins = f"{self.tables.prefix}inbox_d"
        return list(connection.scalars(query, {"detached": DETACHED, "begins": begins, "inbox": inbox}))

    def _giving_way(
        self, connection: sa.Connection, what: str, do: Callable[[], int], *, work: str | None = None
    ) -> int:
        """All of it or nothing (0), and nobody waits for long."""
        try:
            with connection.begin_nested():
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK}'")
                connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{work or WORK}'")
                return do()
        except sa.exc.DBAPIError as error:
            refusal = error.orig or error
            state = getattr(refusal, "sqlstate", None) or getattr(refusal, "pgcode", None)
            if state == REFUSED:  # to create tables in the schema
                self.notes.append(f"{what} was refused: {words(refusal)}. Until then its rows are deleted one by one")
            elif state not in GIVES_WAY:
                raise
            elif state == IN_DEFAULT:
                self.notes.append(
                    f"{what} is not possible: the default one has ids of that day. They are deleted by age"
                )
            elif state == TOOK_LONG:
                self._slow = True
                self.notes.append(f"{what} took longer than {work or WORK}, while consumers may have waited: given up")
            return 0

    def _home(self, connection: sa.Connection) -> str | None:
        """The schema of the inbox, which need not be the first one in the search path."""
        query = sa.text(
            "SELECT nspname FROM pg_namespace n JOIN pg_class c ON c.relnamespace = n.oid WHERE c.oid = to_regclass(:inbox)"
        )
        home: str | None = connection.scalar(query, {"inbox": self._quoted(connection, self.tables.inbox.name)})
        return home

    @property
    def _cutoff(self) -> dt.datetime:
        return self._now - dt.timedelta(seconds=self._seconds)

    def _table(self, name: str) -> sa.Table:
        return self.tables.inbox.to_metadata(sa.MetaData(), name=name)

    def _quoted(self, connection: sa.Connection, name: str) -> str:
        return connection.dialect.identifier_preparer.format_table(sa.table(name, schema=self.tables.schema))
