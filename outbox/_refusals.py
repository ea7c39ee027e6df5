"""What a database's refusals mean, by the codes of its drivers and never by their texts; and their texts, without what they
quote of the user's data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

# MySQL quotes values in these, between apostrophes: a duplicate entry, the statement near a syntax error, a value that is
# wrong or out of range, a path in JSON.
_QUOTING: Final = frozenset(
    [1062, 1064, 1264, 1265, 1292, 1366, 1367, 1411, 1525, 1526, 1582, 1586, 1690, 1859, 3140, 3141, 3144, 3156]
)
_QUOTED: Final = re.compile(r"(['\"]).*\1(?= for (?:key|column|function)\b| at (?:row|line)\b)|(['\"]).*", re.DOTALL)

_MYSQL_UNDOES: Final = frozenset({1020, 1213})  # MariaDB's snapshot isolation, a deadlock
_MYSQL_FULL: Final = frozenset({1021, 1114})  # a disk, a table or its file
_FULL: Final = "53100"
_MISSING: Final = frozenset({1146, "42P01"})  # no such table; SQLite has no code for it
_SQLSTATES: Final = frozenset({"40001", "40P01"})  # serialization failure, deadlock


def words(error: BaseException) -> str:
    """What a driver's error says, in one line: PostgreSQL's first (then comes the row), MySQL's without what it quotes."""
    try:
        code, text = _mysql(error)
        if code is None:
            text = str(error)
        elif code in _QUOTING:
            text = _QUOTED.sub("…", text)
    except Exception:
        return f"<unprintable {type(error).__name__}>"
    lines = text.strip().splitlines()
    line = lines[0] if lines else ""
    return f"{line} (error {code})" if code is not None else line


def is_undone(error: BaseException) -> bool:
    """Whether the database has rolled the whole transaction back, for no fault of it: the same may be tried again."""
    code, _ = _mysql(error)
    if code is not None:
        return code in _MYSQL_UNDOES
    state: Any = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return state in _SQLSTATES


def is_full(error: BaseException) -> bool:
    """Whether the database's disk is full, as PostgreSQL, MySQL and MariaDB say it: no statement is to blame."""
    code, _ = _mysql(error)
    state: Any = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return code in _MYSQL_FULL or (code is None and state == _FULL)


def is_missing(error: BaseException) -> bool:
    """Whether the statement names a table that is not there."""
    code, _ = _mysql(error)
    state: Any = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return code in _MISSING or state in _MISSING or str(error).startswith("no such table: ")


@contextmanager
def advised() -> Iterator[None]:
    """The driver's error is raised as it is, and where a table is missing with a note (PEP 678) of what makes ours."""
    try:
        yield
    except Exception as error:
        if is_missing(getattr(error, "orig", None) or error):
            error.add_note(
                "Where that is a table of the outbox: `outbox migrate --database URL` makes them, or metadata.create_all(), "
                "or a revision of Alembic (docs/migrations.md)"
            )
        raise


def _mysql(error: BaseException) -> tuple[int | None, str]:
    """Number and text, as all drivers of MySQL give them."""
    if len(error.args) < 2 or isinstance(error, OSError):
        return None, ""
    code, text = error.args[:2]
    return (code, text) if type(code) is int and isinstance(text, str) else (None, "")
