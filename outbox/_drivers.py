"""Drivers' own connections: which driver one belongs to, and whether a row written now would commit with its transaction.

Nothing here imports a driver (whoever has a connection has imported its module), asks the server, or reads the text of an
error: each driver says by flags of its own what became of the transaction.

A driver of another database, or another driver of these, is one line in `_KNOWN`, and a function if it tells in its own way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from outbox.errors import TransactionError

# ---------------------------------------------------------------- what they say of their transaction


def _libpq(connection: Any) -> None:
    """psycopg and psycopg2: the status that libpq keeps. In autocommit a BEGIN of the user's, or ``transaction()``,
    still opens a transaction; out of it the first statement does."""
    status = int(connection.info.transaction_status)
    if status == 4:  # UNKNOWN
        raise _closed()
    if status == 3:  # INERROR
        raise _failed()
    if status == 1 and connection.autocommit:  # ACTIVE
        raise TransactionError(
            "the connection is in autocommit mode and has statements in flight, so that it does not know whether it is in a "
            "transaction: call pipeline.sync() first"
        )
    if status != 2 and connection.autocommit:  # INTRANS
        raise _autocommit("use `with connection.transaction():`, or set connection.autocommit = False")


def _asyncpg(connection: Any) -> None:
    """asyncpg begins no transaction by itself. One that failed is in a transaction: the server says so."""
    try:
        closed, begun = connection.is_closed(), connection.is_in_transaction()
    except sys.modules["asyncpg"].InterfaceError as error:
        raise _closed() from error  # given back to its pool
    if closed:
        raise _closed()
    if not begun:
        raise _autocommit("use `async with connection.transaction():`")


def _sqlite(connection: Any) -> None:
    """sqlite3 and aiosqlite: a BEGIN, or a driver that sends one before the INSERT."""
    try:
        begun, level = connection.in_transaction, connection.isolation_level
    except (sys.modules["sqlite3"].ProgrammingError, ValueError) as error:
        raise _closed() from error
    # since Python 3.12; False: the driver keeps a transaction open, whatever isolation_level says
    mode = getattr(getattr(connection, "_conn", connection), "autocommit", -1)
    if not begun and (mode is True or (mode == -1 and level is None)):
        raise _autocommit("execute BEGIN IMMEDIATE first, or connect with another isolation_level")


def _mysql(connection: Any) -> None:
    """PyMySQL and asyncmy keep the server's status flags as of its last answer."""
    if any(getattr(connection, name, good) != good for name, good in _OPEN):
        raise _closed()
    if not connection.server_status & 1 and connection.get_autocommit():  # SERVER_STATUS_IN_TRANS
        raise _autocommit("call connection.begin() first, or connection.autocommit(False)")


_OPEN: Final = (("open", True), ("connected", True))  # either has one of these


def _mysqlclient(connection: Any) -> None:
    if not connection.open:
        raise _closed()
    if connection.get_autocommit():
        raise _autocommit("call connection.autocommit(False); of a BEGIN this driver does not tell")


def _django(connection: Any) -> None:
    """Django's own notes: it leaves autocommit in an ``atomic`` block, or for who manages transactions himself."""
    if connection.closed_in_transaction:
        raise _closed()
    if connection.needs_rollback:
        raise _failed()
    if not connection.in_atomic_block and connection.get_autocommit():
        raise _autocommit(f"use `with transaction.atomic(using={connection.alias!r}):`")


def _closed() -> TransactionError:
    return TransactionError("the connection is closed or lost: add the message while its transaction is open")


def _failed() -> TransactionError:
    return TransactionError(
        "the connection's transaction has failed and can only be rolled back: do that, begin a new one"
    )


def _autocommit(remedy: str) -> TransactionError:
    return TransactionError(
        "the connection is in autocommit mode and in no transaction, so a message could not commit together with your "
        f"data: {remedy}"
    )


# ---------------------------------------------------------------- which they are


@dataclass(frozen=True)
class Driver:
    """How to write through a connection of one driver. ``dialect`` is SQLAlchemy's, which says the SQL and converts the
    parameters, in another ``paramstyle`` where the connection is a wrapper that wants one."""

    dialect: str
    refuse_unfit: Callable[[Any], None]
    is_async: bool = False
    paramstyle: str | None = None
    text_uuids: bool = False  # it takes a UUID as text, or only where it was told to take UUIDs

    @property
    def database(self) -> str:
        """SQLAlchemy's name of it: ``postgresql``."""
        return self.dialect.partition(".")[0]


PSYCOPG: Final = (
    Driver("postgresql.psycopg", _libpq),
    Driver("postgresql.psycopg", _libpq, is_async=True),
)
ASYNCPG: Final = Driver("postgresql.asyncpg", _asyncpg, is_async=True)

# Tortoise's wrapper, around a connection of one of the drivers or a pool of them.
TORTOISE: Final = Driver("", lambda connection: None, is_async=True)

_KNOWN: Final[tuple[tuple[str, str, Driver], ...]] = (
    ("psycopg", "Connection", PSYCOPG[0]),
    ("psycopg", "AsyncConnection", PSYCOPG[1]),
    ("psycopg2.extensions", "connection", Driver("postgresql.psycopg2", _libpq, text_uuids=True)),
    ("asyncpg", "Connection", ASYNCPG),
    ("asyncpg.pool", "PoolConnectionProxy", ASYNCPG),
    ("sqlite3", "Connection", Driver("sqlite.pysqlite", _sqlite)),
    ("aiosqlite", "Connection", Driver("sqlite.pysqlite", _sqlite, is_async=True)),
    ("pymysql.connections", "Connection", Driver("mysql.pymysql", _mysql)),
    ("MySQLdb.connections", "Connection", Driver("mysql.mysqldb", _mysqlclient)),
    ("tortoise.backends.base.client", "BaseDBAsyncClient", TORTOISE),
    ("asyncmy.connection", "Connection", Driver("mysql.asyncmy", _mysql, is_async=True)),
)

# Through its own cursor: so its log of queries, its wrappers around them and its exceptions go on working.
_DJANGO: Final = {
    "postgresql": Driver("postgresql.psycopg", _django, paramstyle="format"),
    "sqlite": Driver("sqlite.pysqlite", _django, paramstyle="format"),
    "mysql": Driver("mysql.mysqldb", _django, paramstyle="format"),
}


def driver_of(connection: Any) -> Driver | None:
    """The driver that a connection belongs to; None: it is no connection, or of a driver that we do not know."""
    if _is(connection, "django.db.backends.base.base", "BaseDatabaseWrapper") or (
        _is(connection, "django.utils.connection", "ConnectionProxy") and hasattr(connection, "in_atomic_block")
    ):
        return _DJANGO.get(connection.vendor)
    for module, name, driver in _KNOWN:
        if _is(connection, module, name):
            return driver
    return None


def _is(thing: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(thing, kind)
