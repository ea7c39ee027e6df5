"""What is over and still kept: since when, how much room it takes, and when cleanup last looked."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass, field
from typing import Any, Final

import sqlalchemy as sa

from outbox.observe.partitions import inbox_partitions
from outbox.observe.words import duration, some
from outbox.tables import Tables

RECORD: Final = "cleanup"
"""The row of ``checkpoint`` in which a cleanup that is over says what it did: JSON, by the database's clock."""

LATE: Final = 2 * 86400.0  # seconds


@dataclass(frozen=True, slots=True)
class CleanupStatus:
    """Ages are seconds. ``ran``: since the last one ended (None: there never was one), which ``removed`` so many rows by
    table. ``inbox_oldest``: age of the first inbox row; ``inbox_kept``: how long they are kept. ``bytes``: of inbox and dead
    letters with their indexes, on PostgreSQL. ``partitions``: the last day (ISO 8601) for which an inbox in partitions has
    one (None: none, or an ordinary table), ``in_default``: the share of its rows, 0 to 1, that are no day's, about."""

    ran: float | None
    removed: dict[str, int] = field(default_factory=dict)
    inbox_oldest: float | None = None
    inbox_kept: float | None = None
    bytes: int | None = None
    partitioned: bool = False
    partitions: str | None = None
    in_default: float | None = None

    def line(self) -> str:
        """For `outbox status`."""
        if self.ran is None:
            ran = "never ran"
        else:
            rows = sum(self.removed.values())
            ran = f"ran {duration(self.ran)} ago" + (f" and removed {some(rows, 'row')}" if rows else "")
        parts = [ran]
        if self.inbox_oldest is not None:
            kept = f" of {duration(self.inbox_kept)}" if self.inbox_kept is not None else ""
            parts.append(f"the inbox goes back {duration(self.inbox_oldest)}{kept}")
        if self.bytes is not None:
            parts.append(f"inbox and dead letters take {self.bytes / 1e6:,.1f} MB")
        if self.partitioned:
            parts.append(self._partitions())
        late = self.inbox_kept is not None and (self.inbox_oldest or 0.0) > self.inbox_kept + LATE
        if late and (self.ran is None or self.ran > LATE):
            parts.append("start a relay, or run `outbox cleanup`")
        return "; ".join(parts)

    def _partitions(self) -> str:
        tomorrow = (dt.datetime.now(dt.UTC) + dt.timedelta(days=1)).date().isoformat()
        if self.partitions is None or self.partitions < tomorrow:
            last = "no day has one yet" if self.partitions is None else f"the last is of {self.partitions}"
            return (
                f"the inbox is in partitions, and {last}: start a relay or run `outbox cleanup`, as the tables' owner; until "
                "then rows go into the default one, and are deleted one by one"
            )
        rest = ""
        if self.in_default is not None and self.in_default > 0.5:
            rest = f", but {self.in_default:.0%} of the rows are in the default one, to be deleted one by one in time"
        return f"the inbox is in partitions up to {self.partitions}{rest}"


def cleanup(connection: sa.Connection, tables: Tables, now: dt.datetime) -> CleanupStatus:
    """Some look-ups: by primary key, by the first entry of an index, and of what PostgreSQL knows of its files."""
    found = _record(connection, tables)
    ran, value = found if found is not None else (None, {})
    oldest = connection.scalar(sa.select(sa.func.min(tables.inbox.c.processed_at)))
    partitions = inbox_partitions(connection, tables)
    days = [one for one in partitions or () if one.until is not None]
    rows = sum(one.rows for one in partitions or ())
    return CleanupStatus(
        ran=None if ran is None else max(0.0, (now - ran).total_seconds()),
        removed=value.get("removed", {}),
        inbox_oldest=None if oldest is None else max(0.0, (now - oldest).total_seconds()),
        inbox_kept=value.get("retention", {}).get("inbox"),
        bytes=_bytes(connection, tables),
        partitioned=partitions is not None,
        partitions=(days[-1].ends - dt.timedelta(days=1)).date().isoformat() if days else None,
        in_default=1 - sum(one.rows for one in days) / rows if rows else None,
    )


def inbox_kept(connection: sa.Connection, tables: Tables) -> float | None:
    """For how many seconds the last cleanup kept inbox rows; None where there was none, or it keeps them for ever."""
    found = _record(connection, tables)
    kept: float | None = found[1].get("retention", {}).get("inbox") if found is not None else None
    return kept


def _record(connection: sa.Connection, tables: Tables) -> tuple[dt.datetime, dict[str, Any]] | None:
    checkpoint = tables.checkpoint
    query = sa.select(checkpoint.c.updated_at, checkpoint.c.value).where(checkpoint.c.name == RECORD)
    row = connection.execute(query).one_or_none()
    return None if row is None else (row.updated_at, json.loads(row.value))


def _bytes(connection: sa.Connection, tables: Tables) -> int | None:
    if connection.dialect.name != "postgresql":
        return None
    # with partitions, whose parent has no file itself
    query = sa.text(
        "select coalesce(sum(coalesce("
        "(select sum(pg_total_relation_size(t.relid)) from pg_partition_tree(to_regclass(n)) t),"  # none of an ordinary table
        " pg_total_relation_size(to_regclass(n)))), 0)::bigint from unnest(cast(:names as text[])) n"
    )
    quote = connection.dialect.identifier_preparer.format_table
    names = [quote(table) for table in (tables.inbox, tables.dead_letter)]
    found: int = connection.execute(query, {"names": names}).scalar_one()
    return found
