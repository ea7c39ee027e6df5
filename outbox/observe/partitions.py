"""The daily partitions of an inbox on PostgreSQL, as the catalogue has them (docs/decisions/0017)."""

from __future__ import annotations

import datetime as dt
import re
import uuid
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from outbox.tables import Tables

DEFAULT: Final = "inbox_default"
"""Prefix and this are the name of the partition for ids that are no day's."""

# Only a partitioned table has a row of `pg_partitioned_table`; it may have no partitions.
_FOUND: Final = sa.text(
    "SELECT c.relname, pg_get_expr(c.relpartbound, c.oid) AS bounds, greatest(c.reltuples, 0)::bigint AS rows"
    " FROM pg_partitioned_table p LEFT JOIN pg_inherits i ON i.inhparent = p.partrelid"
    " LEFT JOIN pg_class c ON c.oid = i.inhrelid WHERE p.partrelid = to_regclass(:inbox)"
)
_BOUNDS: Final = re.compile(r"FROM \('([0-9a-f-]{36})'\) TO \('([0-9a-f-]{36})'\)")


@dataclass(frozen=True, slots=True)
class Partition:
    """``first`` to ``until`` (exclusive) are message ids, None in the default partition. ``rows``: as PostgreSQL counted
    them last."""

    name: str
    first: uuid.UUID | None
    until: uuid.UUID | None
    rows: int

    @property
    def ends(self) -> dt.datetime:
        """The moment from which on ids of version 7 come after it."""
        assert self.until is not None
        return dt.datetime.fromtimestamp((self.until.int >> 80) / 1000, dt.UTC)


def lowest_id(day: dt.date) -> uuid.UUID:
    """Below every UUID of version 7 (RFC 9562, 5.7) that is made on that day (UTC) or later, above all that were before."""
    begins = dt.datetime(day.year, day.month, day.day, tzinfo=dt.UTC)
    return uuid.UUID(int=int(begins.timestamp() * 1000) << 80)


def inbox_partitions(connection: sa.Connection, tables: Tables) -> list[Partition] | None:
    """By what they hold, the default one last; None where the inbox is an ordinary table."""
    if connection.dialect.name != "postgresql":
        return None
    name = connection.dialect.identifier_preparer.format_table(tables.inbox)
    rows = connection.execute(_FOUND, {"inbox": name}).all()
    if not rows:
        return None
    found = []
    for relname, bounds, count in rows:
        if bounds is None:
            continue
        match = _BOUNDS.fullmatch(bounds.removeprefix("FOR VALUES "))
        first, until = (uuid.UUID(match[1]), uuid.UUID(match[2])) if match else (None, None)
        found.append(Partition(relname, first, until, count))
    return sorted(found, key=lambda one: (one.first is None, one.first or uuid.UUID(int=0)))
