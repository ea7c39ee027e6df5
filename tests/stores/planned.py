"""What a database does for each statement that our code sends it, as the database itself tells: which rows it looks at, and
by which index. Nothing here knows the statements: whatever is sent while `watched` is open is in the list."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import _connection_base

from tests.relay.database import Database

ALIASES = {
    "earlier": "outbox_attempt",
    "m": "outbox_message",
}  # which plans of SQLite and MySQL name instead of their table


@dataclass
class Scan:
    """One table in one statement's plan. ``whole``: from one end of the table or of an index to the other. ``looked_at``:
    rows, those it threw away included; None on SQLite, where `Statement.work` tells; on MySQL those of the statement."""

    table: str
    how: str
    whole: bool
    looked_at: int | None = None


@dataclass
class Statement:
    text: str
    scans: list[Scan] = field(default_factory=list)
    work: int = 0
    """On SQLite: steps of its virtual machine, some ten to twenty a row."""

    def __str__(self) -> str:
        plan = ", ".join(f"{scan.how} of {scan.table} ({scan.looked_at} rows)" for scan in self.scans)
        return f"{' '.join(self.text.split())[:300]}\n    {plan}, work {self.work}"


# In brackets, too: MySQL reads around what was removed in several parts.
READS_OR_WRITES = re.compile(r"[\s(]*(select|insert|update|delete|with)\b", re.IGNORECASE)


@contextmanager
def watched(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Statement]]:
    """The statements that end meanwhile on connections that are made meanwhile, to `watched_url`."""
    statements: list[Statement] = []
    with monkeypatch.context() as patch:
        how = {"postgresql": _on_postgresql, "sqlite": _on_sqlite, "mysql": _on_mysql}
        yield from how[dialect(database)](database, patch, statements)


def dialect(database: Database) -> str:
    return "mysql" if database.name == "mariadb" else database.name


def watched_url(database: Database) -> str:
    if database.name != "postgresql":
        return database.url
    options = {
        "session_preload_libraries": "auto_explain",
        "auto_explain.log_min_duration": "0",
        "auto_explain.log_analyze": "on",
        "auto_explain.log_timing": "off",
        "auto_explain.log_format": "json",
        "auto_explain.log_level": "notice",
    }
    text = " ".join(f"-c {name}={value}" for name, value in options.items())
    return str(sa.make_url(database.url).update_query_dict({"options": text}).render_as_string(hide_password=False))


# ------------------------------------------------------------ PostgreSQL: auto_explain, as notices


def _on_postgresql(_: Database, patch: pytest.MonkeyPatch, statements: list[Statement]) -> Iterator[list[Statement]]:
    def notice(connection: object, result: Any) -> None:
        text = psycopg.errors.Diagnostic(result, "utf-8").message_primary or ""
        if "plan:" in text:
            told = json.loads(text[text.index("{") :])
            statements.append(Statement(told["Query Text"], list(_scans(told["Plan"]))))

    # SQLAlchemy's connections and the relay's own are both of this class; a handler would miss those it wraps anew
    patch.setattr(_connection_base.BaseConnection, "_notice_handler", staticmethod(notice))
    yield statements


def _scans(node: dict[str, Any]) -> Iterator[Scan]:
    kind = node["Node Type"]
    if "Relation Name" in node and kind != "ModifyTable":
        rows = node["Actual Rows"] + sum(node.get(f"Rows Removed by {what}", 0) for what in ("Filter", "Index Recheck"))
        bounded = "Index Cond" in node or kind == "Bitmap Heap Scan"
        index = f" by {node['Index Name']}" if "Index Name" in node else ""
        yield Scan(node["Relation Name"], kind + index, not bounded, rows * node["Actual Loops"])
    for child in node.get("Plans", ()):
        yield from _scans(child)


# ------------------------------------------------------------ SQLite: a trace, and a count of its steps


def _on_sqlite(database: Database, patch: pytest.MonkeyPatch, statements: list[Statement]) -> Iterator[list[Statement]]:
    lock, step = threading.Lock(), 100

    def connected(raw: Any, record: object) -> None:
        last: list[Statement] = []

        def trace(text: str) -> None:
            if READS_OR_WRITES.match(text):
                last[:] = [Statement(text)]
                with lock:
                    statements.append(last[0])

        def progress() -> int:
            for statement in last:
                statement.work += step
            return 0

        raw.set_trace_callback(trace)
        raw.set_progress_handler(progress, step)

    sa.event.listen(sa.Engine, "connect", connected)
    try:
        yield statements
    finally:
        sa.event.remove(sa.Engine, "connect", connected)
    with database.engine.connect() as connection:
        for statement in statements:
            plan = connection.exec_driver_sql(f"explain query plan {statement.text}").all()
            for row in plan:
                if match := re.match(r"(SCAN|SEARCH) (\w+)(?: USING (.*))?", row[-1]):
                    how, table, index = match.groups()
                    statement.scans.append(Scan(ALIASES.get(table, table), f"{how} by {index}", how == "SCAN"))


# ------------------------------------------------------------ MySQL and MariaDB: the log of slow statements, explained


def _on_mysql(database: Database, _: pytest.MonkeyPatch, statements: list[Statement]) -> Iterator[list[Statement]]:
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for setting in ("log_output = 'TABLE'", "long_query_time = 0", "slow_query_log = 1"):
            connection.exec_driver_sql(f"set global {setting}")
        connection.exec_driver_sql("truncate table mysql.slow_log")
        try:
            yield statements
        finally:
            for setting in ("slow_query_log = 0", "long_query_time = 10"):
                connection.exec_driver_sql(f"set global {setting}")
        log = connection.exec_driver_sql(
            "select sql_text, rows_examined from mysql.slow_log where db = database()"
        ).all()
        connection = connection.execution_options(no_parameters=True)
        for text, examined in log:
            text = text.decode() if isinstance(text, bytes) else text
            if "outbox_" not in text or not READS_OR_WRITES.match(text):
                continue
            statements.append(Statement(text))
            for row in connection.exec_driver_sql(f"explain format=traditional {text}").mappings():
                if int(row["rows"] or 0):  # else nothing is read: the row that an INSERT writes
                    table = ALIASES.get(row["table"], row["table"])
                    whole = row["type"] == "ALL"
                    statements[-1].scans.append(Scan(table, f"{row['type']} by {row['key']}", whole, examined))
