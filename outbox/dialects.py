"""What each database says in its own way: types, the clock, an insert that does nothing where the row is there.

PostgreSQL, SQLite, MySQL and MariaDB; a new one is added here, and as a store.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from outbox.errors import ConfigurationError

MYSQL: Final = ("mysql", "mariadb")
"""SQLAlchemy's names for both: either may be in the URL of either."""


class UtcDateTime(sa.types.TypeDecorator[dt.datetime]):
    """An instant. Aware in Python; ``timestamptz`` on PostgreSQL, UTC without a zone where the database has none."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name in MYSQL:
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
    # of the statement, not clock_timestamp(): that is another one for each row, so that no index can be searched for it
    return f"statement_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kw)})"


@compiles(clock, "sqlite")
def _clock_sqlite(element: clock, compiler: Any, **kw: Any) -> str:
    # milliseconds, padded to the six digits that SQLAlchemy stores, so that text compares as time does
    form = "%Y-%m-%d %H:%M:%f000"
    if compiler.dialect.paramstyle == "format":  # Django's, which formats the statement for its log
        form = form.replace("%", "%%")
    return f"strftime('{form}', 'now', {compiler.process(element.clauses, **kw)} || ' seconds')"


@compiles(clock, *MYSQL)
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


@compiles(now, *MYSQL)
def _now_mysql(element: now, compiler: Any, **kw: Any) -> str:
    return "(utc_timestamp(6))"


# For one row that was there the server counts 0 or 1 rows affected, the latter where the client set CLIENT_FOUND_ROWS,
# which is also what it counts for a new row. The insert id tells them apart on every connection: none of our tables that
# are inserted into this way gives one out, so it is 0 unless the update has set it.
# Without parameters of its own, which PyMySQL cannot give to several rows.
_MARKED: Final = sa.func.last_insert_id(sa.literal_column("1")).op(">")(sa.literal_column("0"))


def insert_if_absent(table: sa.Table, dialect: str) -> sa.Insert:
    """An insert that does nothing where the row is there already: by conflict clause, never by the text of an error.
    `was_absent` says which, of one row."""
    if dialect == "postgresql":
        from sqlalchemy.dialects import postgresql

        insert: sa.Insert = postgresql.insert(table).on_conflict_do_nothing()
    elif dialect == "sqlite":
        from sqlalchemy.dialects import sqlite

        insert = sqlite.insert(table).on_conflict_do_nothing()
    elif dialect in MYSQL:
        from sqlalchemy.dialects import mysql

        # Not INSERT IGNORE, which also stores what the columns refuse, cut to fit. An update to what it is, and a mark.
        key = next(iter(table.primary_key.columns))
        insert = mysql.insert(table).on_duplicate_key_update({key.name: sa.func.if_(_MARKED, key, key)})
    else:
        raise ConfigurationError(f"database {dialect!r}: PostgreSQL, SQLite, MySQL and MariaDB are possible")
    # SQLAlchemy keeps the row count of an INSERT only when told to: an async psycopg cursor is closed by then and says -1
    return insert.execution_options(preserve_rowcount=True)


def was_absent(result: Any, dialect: str) -> bool:
    """Whether an `insert_if_absent` of one row has inserted it: from SQLAlchemy's result, or a driver's cursor."""
    if dialect in MYSQL:
        return not result.lastrowid
    return bool(result.rowcount == 1)


def delete_listed(table: sa.Table, dialect: str, listed: Mapping[str, Sequence[Any]]) -> sa.Executable:
    """Delete the rows whose columns are in these lists, of which one is the primary key's.

    InnoDB locks every row that a DELETE only looks at, so it would wait for the open transaction that inserts one; and of
    a small table the optimizer prefers to look at all. Hence the index is forced there."""
    if dialect not in MYSQL:
        return sa.delete(table).where(*(table.c[name].in_(values) for name, values in listed.items()))
    from sqlalchemy.dialects import mysql

    name = mysql.dialect().identifier_preparer.format_table(table)
    conditions = " AND ".join(f"t.{column} IN :{column}" for column in listed)
    return sa.text(f"DELETE t FROM {name} t FORCE INDEX (PRIMARY) WHERE {conditions}").bindparams(
        *(
            sa.bindparam(column, list(values), expanding=True, type_=table.c[column].type)
            for column, values in listed.items()
        )
    )


# What MySQL and MariaDB need, without importing their dialects. Text is compared byte by byte everywhere: MySQL's default
# collation would merge the keys 'a' and 'A', and the one that both call utf8mb4_bin 'a' and 'a '.


class MysqlText(sa.String):
    """VARCHAR in UTF-8, compared byte by byte."""


class MysqlLongText(sa.Text):
    """Up to 16 MiB of UTF-8."""


class MysqlBytes(sa.LargeBinary):
    """Bytes of any length."""


class MysqlUuidText(sa.CHAR):
    """36 characters, compared as UUIDs are: without regard to case."""


class MysqlUuid(sa.types.TypeDecorator[uuid.UUID]):
    """A UUID as text with dashes. SQLAlchemy would make it UUID or CHAR(32) in the same MariaDB, as the URL begins with
    mariadb or mysql. This is what both can be asked for by hand, what the relay sends as it is, and Debezium too."""

    impl = MysqlUuidText(36)
    cache_ok = True

    def process_bind_param(self, value: uuid.UUID | str | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> uuid.UUID | None:
        return None if value is None else uuid.UUID(value)


@compiles(MysqlText, *MYSQL)
def _mysql_text(type_: MysqlText, compiler: Any, **kw: Any) -> str:
    return f"VARCHAR({type_.length}) {_byte_by_byte(compiler.dialect)}"


@compiles(MysqlLongText, *MYSQL)
def _mysql_long_text(type_: MysqlLongText, compiler: Any, **kw: Any) -> str:
    return f"MEDIUMTEXT {_byte_by_byte(compiler.dialect)}"


@compiles(MysqlBytes, *MYSQL)
def _mysql_bytes(type_: MysqlBytes, compiler: Any, **kw: Any) -> str:
    return "LONGBLOB"


@compiles(MysqlUuidText, *MYSQL)
def _mysql_uuid(type_: MysqlUuidText, compiler: Any, **kw: Any) -> str:
    return "CHAR(36) CHARACTER SET ascii COLLATE ascii_general_ci"


def _byte_by_byte(dialect: Any) -> str:
    """Until it is connected, the dialect of a mysql:// URL takes the server for MySQL."""
    return f"CHARACTER SET utf8mb4 COLLATE {'utf8mb4_nopad_bin' if dialect.is_mariadb else 'utf8mb4_0900_bin'}"


def text(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(MysqlText(length), *MYSQL)


def long_text() -> sa.types.TypeEngine[str]:
    return sa.Text().with_variant(MysqlLongText(), *MYSQL)


def binary() -> sa.types.TypeEngine[bytes]:
    return sa.LargeBinary().with_variant(MysqlBytes(), *MYSQL)


def unique_id() -> sa.types.TypeEngine[uuid.UUID]:
    return sa.Uuid().with_variant(MysqlUuid(), *MYSQL)


def number() -> sa.types.TypeEngine[int]:
    # SQLite gives AUTOINCREMENT to INTEGER only
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")
