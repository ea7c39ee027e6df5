"""Who holds what a migration waits for: process, user, application, since when. Never a statement's text, which may hold
a user's data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa

from outbox_migrations._operations import Operation

# Of pg_stat_activity a role without pg_read_all_stats sees the process, user and application of others, not since when.
_ON_TABLE: Final = sa.text(
    "SELECT DISTINCT a.pid, a.usename, a.application_name, a.state,"
    " extract(epoch FROM clock_timestamp() - a.xact_start) AS age"
    " FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid"
    " WHERE l.relation = to_regclass(:table) AND l.granted AND l.pid <> pg_backend_pid() AND l.mode = ANY(:modes)"
    " ORDER BY 5 DESC NULLS LAST LIMIT 4"
)
_PREPARED: Final = sa.text(
    "SELECT p.gid, extract(epoch FROM clock_timestamp() - p.prepared) AS age FROM pg_prepared_xacts p"
    " WHERE p.database = current_database() ORDER BY p.prepared LIMIT 2"
)
_SNAPSHOTS: Final = sa.text(
    "SELECT a.pid, a.usename, a.application_name, a.state, extract(epoch FROM clock_timestamp() - a.xact_start) AS age"
    " FROM pg_stat_activity a WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()"
    " AND a.xact_start IS NOT NULL ORDER BY a.xact_start LIMIT 4"
)
# Of a prepared transaction pg_blocking_pids says 0.
_BLOCKING: Final = sa.text(
    "SELECT b.pid AS blocking, a.pid, a.usename, a.application_name, a.state, a.xact_start"
    " FROM unnest(pg_blocking_pids(:pid)) AS b (pid) LEFT JOIN pg_stat_activity a ON a.pid = b.pid LIMIT 4"
)
_MYSQL: Final = sa.text(
    "SELECT p.ID AS pid, p.USER AS usename, p.COMMAND AS state, timestampdiff(SECOND, t.trx_started, now()) AS age"
    " FROM information_schema.INNODB_TRX t JOIN information_schema.PROCESSLIST p ON p.ID = t.trx_mysql_thread_id"
    " WHERE p.ID <> connection_id() ORDER BY t.trx_started LIMIT 4"
)


def of(connection: sa.Connection, operation: Operation) -> str:
    """Who holds a lock that this operation waits for, in words."""
    if connection.dialect.name == "postgresql":
        name = str(connection.dialect.identifier_preparer.format_table(operation.table))
        rows = connection.execute(_ON_TABLE, {"table": name, "modes": list(operation.conflicts)}).all()
        return _said("it is held by", rows, connection.execute(_PREPARED).all())
    try:
        return _said("open transactions:", connection.execute(_MYSQL).all())
    except sa.exc.DBAPIError:
        return "who holds it, only a role with the privilege PROCESS can see"


def of_process(connection: sa.Connection, pid: int) -> str | None:
    """For whom a process waits, without how long they have been there, so that it is said once; None: for nobody."""
    rows = connection.execute(_BLOCKING, {"pid": pid}).all()
    if not rows:
        return None
    prepared = connection.execute(_PREPARED).all() if any(row.blocking == 0 for row in rows) else ()
    return _said("these hold it up:", [row for row in rows if row.pid], prepared)


def of_old_snapshots(connection: sa.Connection) -> str:
    """Whose transactions are open longest."""
    return _said("the oldest are", connection.execute(_SNAPSHOTS).all(), connection.execute(_PREPARED).all())


def _said(words: str, rows: Sequence[sa.Row[Any]], prepared: Sequence[sa.Row[Any]] = ()) -> str:
    who = [_one(row) for row in rows]
    who += [f"the prepared transaction {row.gid!r} of {_age(row.age)} ago" for row in prepared]
    return (
        f"{words} {'; '.join(who)}"
        if who
        else "who held it is gone already, or another role's (grant pg_read_all_stats)"
    )


def _one(row: sa.Row[Any]) -> str:
    about = [f"user {row.usename}"] if row.usename else []
    application = getattr(row, "application_name", None)
    if application:
        about.append(f"application {application!r}")
    since = getattr(row, "xact_start", None)
    if since is not None:
        about.append(f"{row.state or 'open'} since {since:%Y-%m-%d %H:%M:%S}")
    elif getattr(row, "age", None) is not None:
        about.append(f"{row.state or 'open'} for {_age(row.age)}")
    return f"process {row.pid}" + (f" ({', '.join(about)})" if about else "")


def _age(seconds: Any) -> str:
    return f"{max(0.0, float(seconds)):.0f} s"
