"""What each database says in its own way: types, the clock, an insert that does nothing where the row is there.

PostgreSQL, SQLite, MySQL and MariaDB; a new one is added here, and as a store.
"""

from __future__ import annotations

import datetime as dt
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from outbox.errors import ConfigurationError


class UtcDateTime(sa.types.TypeDecorator[dt.datetime]):
    """An instant. Aware in Python; ``timestamptz`` on PostgreSQL, UTC without a zone where the database has none."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            from sqlalchemy.dialects.mysql import DATETIME

            return dialect.type_descriptor(DATETIME(fsp=6))
        return dialect.type_descriptor(sa.DateTime(timezone=True))

    def process_bind_param(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:
        if value is None or dialect.name == "postgresql":
            return value
        return value.astimezone(dt.UTC).replace(tzinfo=None)

    def process_result_value(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


class clock(FunctionElement[dt.datetime]):
    """The database's clock now, plus some seconds: ``clock()``, ``clock(30)``. Never the application's clock."""

    inherit_cache = True
    name = "outbox_clock"
    type = UtcDateTime()

    def __init__(self, seconds: float = 0) -> None:
        super().__init__(sa.literal(seconds, sa.Float()))


@compiles(clock)
def _clock_postgresql(element: clock, compiler: Any, **kw: Any) -> str:
    return f"clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kw)})"


@compiles(clock, "sqlite")
def _clock_sqlite(element: clock, compiler: Any, **kw: Any) -> str:
    # milliseconds, padded to the six digits that SQLAlchemy stores, so that text compares as time does
    form = "%Y-%m-%d %H:%M:%f000"
    if compiler.dialect.paramstyle in ("format", "pyformat"):  # of wrappers, such as Django's
        form = form.replace("%", "%%")
    return f"strftime('{form}', 'now', {compiler.process(element.clauses, **kw)} || ' seconds')"


@compiles(clock, "mysql", "mariadb")
def _clock_mysql(element: clock, compiler: Any, **kw: Any) -> str:
    return f"utc_timestamp(6) + interval {compiler.process(element.clauses, **kw)} second"


class now(FunctionElement[dt.datetime]):
    """The database's clock as a column default."""

    inherit_cache = True
    name = "outbox_now"
    type = UtcDateTime()


@compiles(now)
def _now_postgresql(element: now, compiler: Any, **kw: Any) -> str:
    return "clock_timestamp()"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **kw: Any) -> str:
    return "(strftime('%Y-%m-%d %H:%M:%f000', 'now'))"


@compiles(now, "mysql", "mariadb")
def _now_mysql(element: now, compiler: Any, **kw: Any) -> str:
    return "(utc_timestamp(6))"


def insert_if_absent(table: sa.Table, dialect: str) -> sa.Insert:
    """An insert that does nothing where the row is there already: by conflict clause, never by the text of an error.
    Its result's ``rowcount`` says which."""
    if dialect == "postgresql":
        from sqlalchemy.dialects import postgresql

        insert: sa.Insert = postgresql.insert(table).on_conflict_do_nothing()
    elif dialect == "sqlite":
        from sqlalchemy.dialects import sqlite

        insert = sqlite.insert(table).on_conflict_do_nothing()
    elif dialect in ("mysql", "mariadb"):
        insert = table.insert().prefix_with("IGNORE")
    else:
        raise ConfigurationError(f"database {dialect!r}: PostgreSQL, SQLite, MySQL and MariaDB are possible")
    # SQLAlchemy keeps the row count of an INSERT only when told to: an async psycopg cursor is closed by then and says -1
    return insert.execution_options(preserve_rowcount=True)


# What MySQL and MariaDB need, without importing their dialects (all of SQLAlchemy's cost 60 ms). Text is compared byte by
# byte everywhere: MySQL's default collation would merge the keys 'a' and 'A'.


class MysqlText(sa.String):
    """VARCHAR in UTF-8, compared byte by byte."""


class MysqlLongText(sa.Text):
    """Up to 16 MiB of UTF-8."""


class MysqlBytes(sa.LargeBinary):
    """Bytes of any length."""


_BINARY_UTF8: Final = "CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"


@compiles(MysqlText, "mysql", "mariadb")
def _mysql_text(type_: MysqlText, compiler: Any, **kw: Any) -> str:
    return f"VARCHAR({type_.length}) {_BINARY_UTF8}"


@compiles(MysqlLongText, "mysql", "mariadb")
def _mysql_long_text(type_: MysqlLongText, compiler: Any, **kw: Any) -> str:
    return f"MEDIUMTEXT {_BINARY_UTF8}"


@compiles(MysqlBytes, "mysql", "mariadb")
def _mysql_bytes(type_: MysqlBytes, compiler: Any, **kw: Any) -> str:
    return "LONGBLOB"


def text(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(MysqlText(length), "mysql", "mariadb")


def long_text() -> sa.types.TypeEngine[str]:
    return sa.Text().with_variant(MysqlLongText(), "mysql", "mariadb")


def binary() -> sa.types.TypeEngine[bytes]:
    return sa.LargeBinary().with_variant(MysqlBytes(), "mysql", "mariadb")


def number() -> sa.types.TypeEngine[int]:
    # SQLite gives AUTOINCREMENT to INTEGER only
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")
