"""``where``: whatever an application holds its transaction in, and how rows and statements get into that."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.util import ScopedRegistry

from outbox import _raw, staging
from outbox import _transactions as transactions
from outbox._drivers import Driver, driver_of
from outbox._rows import Built
from outbox._statements import Statement
from outbox.errors import TransactionError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session


class DriverConnection(Protocol):
    """A sync driver's own connection (PEP 249): psycopg, psycopg2, sqlite3, PyMySQL, mysqlclient; or Django's wrapper."""

    def cursor(self) -> Any: ...

    def commit(self) -> None: ...

    def rollback(self) -> None: ...


class _Cursors(Protocol):
    """psycopg, aiosqlite, asyncmy"""

    def cursor(self) -> Any: ...

    def commit(self) -> Coroutine[Any, Any, Any]: ...


class _Asyncpg(Protocol):
    def is_in_transaction(self) -> bool: ...

    def executemany(self, command: str, args: Any) -> Coroutine[Any, Any, Any]: ...


class _Tortoise(Protocol):
    def acquire_connection(self) -> Any: ...


AsyncDriverConnection: TypeAlias = _Cursors | _Asyncpg | _Tortoise
"""An async driver's own connection."""

SyncWhere: TypeAlias = "Session | scoped_session[Any] | sa.Connection | DriverConnection"
"""Where statements can be executed at once."""

Where: TypeAlias = "SyncWhere | AsyncSession | async_scoped_session[Any]"
"""Where messages can be added without an await: they are staged, or the connection is sync."""

AsyncWhere: TypeAlias = "AsyncSession | async_scoped_session[Any] | AsyncConnection | AsyncDriverConnection"
"""Where it takes an await to execute something."""


class Raw(NamedTuple):
    """A driver's own connection."""

    driver: Driver
    connection: Any


Target: TypeAlias = Session | sa.Connection | Raw


# ---------------------------------------------------------------- what is it?


def resolve(where: Any, verb: str, *, sync_only: bool = False) -> Target:
    """The sync session or connection behind ``where``, without importing sqlalchemy.ext.asyncio or a driver.
    Raises `TypeError`, which says what to write instead."""
    if isinstance(where, (Session, sa.Connection)):
        return where
    if isinstance(where, scoped_session):
        found: Session = where()
        return found
    where = _of_registry(where)
    sync_session = getattr(where, "sync_session", None)
    if isinstance(sync_session, Session):
        if sync_only:
            raise TypeError(
                f"outbox.{verb} is sync: with an AsyncSession write await session.run_sync(outbox.{verb}, …), or "
                f"await outbox.a{verb}(session, …)"
            )
        return sync_session
    if hasattr(where, "sync_connection"):
        raise TypeError(
            f"an AsyncConnection needs an await for its statements: write await connection.run_sync(outbox.{verb}, …), or "
            f"await outbox.a{verb}(connection, …)"
        )
    raw = _raw_of(where)
    if raw is None:
        raise TypeError(_no_transaction_in(where))
    if raw.driver.is_async:
        raise TypeError(
            f"an async connection needs an await for its statements: write await outbox.a{verb}(connection, …)"
        )
    return raw


def session_of(where: Any) -> Session | None:
    """The sync session behind ``where``; None behind a connection, also an async one. Raises `TypeError`."""
    where = _of_registry(where)
    if hasattr(where, "sync_connection") or ((raw := _raw_of(where)) and raw.driver.is_async):
        return None
    target = resolve(where, "staged")
    return target if isinstance(target, Session) else None


def resolve_async(where: Any, verb: str) -> Any:
    """``where``, if it is something async: a `Raw`, or what has a ``run_sync``. Raises `TypeError`."""
    where = _of_registry(where)
    if isinstance(getattr(where, "sync_session", None), Session) or hasattr(where, "sync_connection"):
        return where
    raw = _raw_of(where)
    if raw is None and not isinstance(where, (Session, sa.Connection, scoped_session)):
        raise TypeError(_no_transaction_in(where))
    if raw is None or not raw.driver.is_async:
        raise TypeError(f"a {type(where).__name__} needs no await: write outbox.{verb.removeprefix('a')}(…)")
    return raw


def _of_registry(where: Any) -> Any:
    registry = getattr(where, "registry", None)
    return registry() if isinstance(registry, ScopedRegistry) else where  # async_scoped_session


def _raw_of(where: Any) -> Raw | None:
    if isinstance(where, sa.PoolProxiedConnection):  # Engine.raw_connection()
        where = where.dbapi_connection
        if where is None:
            raise TransactionError("the connection is closed: it was given back to its pool")
    driver = driver_of(where)
    return None if driver is None else Raw(driver, where)


# What is mostly meant by something else that such libraries have.
_INSTEAD = {
    "peewee": "pass db.connection()",
    "pony": "pass db.get_connection()",
    "psycopg_pool": "pass what `with pool.connection() as connection:` gives",
    "asyncpg": "pass what `async with pool.acquire() as connection:` gives",
}


def _no_transaction_in(where: Any) -> str:
    kind = type(where)
    if hasattr(where, "fetchone") and hasattr(where, "execute"):
        instead = "pass the connection of this cursor"
    else:
        instead = _INSTEAD.get(
            kind.__module__.partition(".")[0],
            "pass a Session, AsyncSession, scoped session or Connection, or a connection of psycopg, psycopg2, asyncpg, "
            "sqlite3, aiosqlite, PyMySQL, mysqlclient, asyncmy, Django or Tortoise,",
        )
    return f"{kind.__name__} is no session or connection: {instead} whose transaction the message belongs to"


# ---------------------------------------------------------------- getting into it


def put(target: Target, rows: Sequence[Built], bind_arguments: Mapping[str, Any] | None) -> None:
    """Stage rows on a session, insert them on a connection."""
    if isinstance(target, Session):
        staging.stage(target, rows, bind_arguments)
    elif isinstance(target, Raw):
        _raw.execute(target.driver, target.connection, rows)
    else:
        staging.insert_at_once(target, rows)


def run(target: Target, statement: Statement, bind_arguments: Mapping[str, Any] | None) -> int:
    """Execute a statement in the transaction; returns how many rows it touched."""
    if isinstance(target, Raw):
        return _raw.execute(target.driver, target.connection, statement)
    if isinstance(target, Session):
        connection = transactions.connection_for(target, statement.table, bind_arguments)
    else:
        transactions.refuse_unfit(target)
        connection = target
    dialect = connection.dialect.name
    return statement.touched(connection.execute(statement.on(dialect), statement.parameters), dialect)


async def awork(where: Any, work: _raw.Work, sync: Callable[[Session | sa.Connection], Any]) -> Any:
    """Insert rows, or execute a statement and return how many rows it touched, where that takes an await: ``sync`` does it
    where SQLAlchemy does the waiting."""
    if isinstance(where, Raw):
        return await _raw.aexecute(where.driver, where.connection, work)
    return await where.run_sync(sync)
