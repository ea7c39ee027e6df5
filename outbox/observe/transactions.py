"""The transaction that has been open longest. While it is, what was deleted cannot be cleaned away, and on PostgreSQL a
relay's reads begin ever further below what it sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

OLD: Final = 60.0  # seconds from which on a transaction is worth a word

# Without pg_read_all_stats (or being a superuser) a role sees only its own transactions here, and nothing says so.
_SEES: Final = sa.text("SELECT pg_has_role('pg_read_all_stats', 'USAGE')")
_POSTGRESQL: Final = sa.text(
    "SELECT extract(epoch FROM clock_timestamp() - started)::float AS age, who FROM ("
    " SELECT a.xact_start AS started, 'process ' || a.pid || ', user ' || coalesce(a.usename, '?')"
    "  || CASE WHEN a.application_name <> '' THEN ', application ' || a.application_name ELSE '' END AS who"
    "  FROM pg_stat_activity a WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()"
    "  AND a.xact_start IS NOT NULL AND (a.backend_xid IS NOT NULL OR a.backend_xmin IS NOT NULL)"
    "  AND a.backend_type = 'client backend'"
    " UNION ALL SELECT p.prepared, 'prepared transaction ' || p.gid || ', user ' || p.owner FROM pg_prepared_xacts p"
    "  WHERE p.database = current_database()"
    ") AS open ORDER BY started LIMIT 1"
)


@dataclass(frozen=True, slots=True)
class Transactions:
    """``seen``: whether those of other roles can be seen. ``oldest``: age in seconds of the one that is open longest, and
    whose it is; None where there is none, or none that can be seen."""

    seen: bool
    oldest: float | None = None
    who: str | None = None


def transactions(connection: sa.Connection) -> Transactions | None:
    """What is open in this database; None where it cannot be asked (SQLite has one writer; MySQL reads without floors)."""
    if connection.dialect.name != "postgresql":
        return None
    row = connection.execute(_POSTGRESQL).one_or_none()
    seen = bool(connection.scalar(_SEES))
    return Transactions(seen) if row is None else Transactions(seen, max(0.0, row.age), row.who)
