"""Operations as an SQL script: for ``alembic upgrade --sql`` and ``outbox migrate --sql``. Nothing is asked of a database."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, Final

import sqlalchemy as sa

from outbox import ConfigurationError
from outbox_migrations._operations import LOCK_TIMEOUT, Operation

_DIALECTS: Final = {
    "postgresql": ("sqlalchemy.dialects.postgresql.base", "PGDialect"),
    "sqlite": ("sqlalchemy.dialects.sqlite.base", "SQLiteDialect"),
    "mysql": ("sqlalchemy.dialects.mysql.base", "MySQLDialect"),
    "mariadb": ("sqlalchemy.dialects.mysql.mariadb", "MariaDBDialect"),
}

SET_TIMEOUT: Final = f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT * 1000:.0f}ms'"
RESET_TIMEOUT: Final = "SET LOCAL lock_timeout TO DEFAULT"


def dialect_of(name: str) -> sa.Dialect:
    """SQLAlchemy's dialect for a database's name, without its driver. Raises `ConfigurationError`."""
    if name not in _DIALECTS:
        raise ConfigurationError(f"database {name!r}: PostgreSQL, SQLite, MySQL and MariaDB are possible")
    module, found = _DIALECTS[name]
    dialect: sa.Dialect = getattr(import_module(module), found)()
    return dialect


def sql(statement: sa.Executable, dialect: sa.Dialect) -> str:
    """One statement as text, without parameters."""
    literal = {} if isinstance(statement, sa.schema.ExecutableDDLElement) else {"literal_binds": True}
    compiled: Any = statement.compile(dialect=dialect, compile_kwargs=literal)  # type: ignore[attr-defined]
    text = str(compiled).strip()
    # what a driver would take for a parameter's mark is doubled by its dialect
    return text.replace("%%", "%") if compiled.preparer._double_percents else text


def script(steps: Iterable[tuple[str, Iterable[Operation]]], dialect: sa.Dialect, *, fresh: bool) -> Iterator[str]:
    """The lines of a whole script, with its transactions. ``fresh``: from no tables at all, in one transaction."""
    begin = {"sqlite": "BEGIN IMMEDIATE;", "postgresql": "BEGIN;"}.get(dialect.name)
    postgresql = dialect.name == "postgresql"
    is_open = False
    for name, operations in steps:
        yield f"-- {name}"
        for operation in operations:
            if postgresql and not fresh and operation.beside is not None:
                if is_open:
                    yield "COMMIT;"
                is_open = False
                yield from (f"{line};" for line in beside_writers(operation, dialect))
                continue
            if begin and not is_open:
                yield begin
                is_open = True
                if postgresql and not fresh:
                    yield f"{SET_TIMEOUT};"
            yield f"{sql(operation.statement, dialect)};"
        if is_open and not fresh:
            yield "COMMIT;"
            is_open = False
    if is_open:
        yield "COMMIT;"


def beside_writers(operation: Operation, dialect: sa.Dialect) -> list[str]:
    """What builds an index outside a transaction, so that it can be run again after it was cut off."""
    assert operation.index is not None
    assert operation.beside is not None
    drop = sql(sa.schema.DropIndex(operation.index), dialect)
    return [drop.replace("DROP INDEX ", "DROP INDEX CONCURRENTLY IF EXISTS ", 1), sql(operation.beside, dialect)]
