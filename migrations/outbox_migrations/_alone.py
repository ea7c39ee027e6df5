"""Being the only one who migrates these tables: of several processes that start at once, the others wait."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Final

import sqlalchemy as sa

from outbox import SchemaMismatch, StoreUnavailable
from outbox.tables import Tables

_POLL: Final = 0.1  # seconds between two looks for PostgreSQL's advisory lock

Alone = tuple[sa.Connection, Callable[[], None], "Callable[[], AbstractContextManager[sa.Connection]] | None"]
"""The connection to work on, what ends its transaction, and how to get one that is in none."""


@contextmanager
def alone(engine: sa.Engine, tables: Tables, patience: float) -> Iterator[Alone]:
    """Connections of our own, committed at the end."""
    with ExitStack() as stack:
        connection = stack.enter_context(engine.connect())
        outside = None
        if engine.dialect.name == "postgresql":
            # On a connection of its own, since the work is in several transactions; in a transaction, since behind PgBouncer
            # a session's lock would stay with somebody else. It holds no snapshot, for which building an index would wait.
            holder = stack.enter_context(engine.connect())
            _lock_postgresql(holder, tables, patience, own=True)
            holder.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            outside = _outside(connection)
        else:
            stack.enter_context(begin_alone(connection, tables, patience))
        try:
            yield connection, connection.commit, outside
            connection.commit()
        except BaseException:
            if not connection.invalidated:
                connection.rollback()
            raise


@contextmanager
def begin_alone(connection: sa.Connection, tables: Tables, patience: float) -> Iterator[None]:
    """Have this transaction to ourselves, as far as migrations go, until it ends (MySQL: until this block does). Raises
    `SchemaMismatch` where the schema does not exist."""
    name = connection.dialect.name
    release: AbstractContextManager[Any] = nullcontext()
    if name == "postgresql":
        _lock_postgresql(connection, tables, patience, own=False)
    elif name in ("mysql", "mariadb"):
        release = _locked_mysql(connection, tables, patience)
    elif name == "sqlite":
        # The driver begins no transaction before DDL: each CREATE TABLE would be committed by itself. Where it never
        # begins one (isolation_level None) the caller has chosen autocommit, or has begun one already.
        driver = connection.connection.dbapi_connection
        if getattr(driver, "isolation_level", None) is not None and not getattr(driver, "in_transaction", True):
            connection.exec_driver_sql("BEGIN IMMEDIATE")
    with release:
        require_schema(connection, tables)
        yield


def require_schema(connection: sa.Connection, tables: Tables) -> None:
    """Raises `SchemaMismatch` where the schema does not exist."""
    if tables.schema is not None and not sa.inspect(connection).has_schema(tables.schema):
        what = "database" if connection.dialect.name in ("mysql", "mariadb") else "schema"
        raise SchemaMismatch(
            f"there is no {what} {tables.schema!r} here: create it first (CREATE {what.upper()} {tables.schema})"
        )


def _key(tables: Tables) -> int:
    """A number for these tables, for advisory locks."""
    return 0x6F7574 << 32 | zlib.crc32(tables.message.fullname.encode())


def _lock_postgresql(connection: sa.Connection, tables: Tables, patience: float, *, own: bool) -> None:
    """Asked again and again: a session that waits inside the statement holds a snapshot, for which the one that builds an
    index waits, for whose lock it waits itself."""
    until = time.monotonic() + max(patience, 1.0)
    while not connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(_key(tables)))):
        if own:
            connection.rollback()
        if time.monotonic() > until:
            raise _another(tables, patience)
        time.sleep(_POLL)


@contextmanager
def _locked_mysql(connection: sa.Connection, tables: Tables, patience: float) -> Iterator[None]:
    database = tables.schema or connection.dialect.default_schema_name or ""
    name = f"outbox_{zlib.crc32(f'{database}.{tables.message.name}'.encode())}"
    if connection.scalar(sa.select(sa.func.get_lock(name, max(1, int(patience))))) != 1:
        raise _another(tables, patience)
    try:
        yield
        # MySQL has committed whatever came before its DDL, so nothing is taken from the caller; whoever waits for the lock
        # is to see the rest of it, too
        connection.exec_driver_sql("COMMIT")
    finally:
        if not connection.invalidated:
            connection.scalar(sa.select(sa.func.release_lock(name)))


def _another(tables: Tables, patience: float) -> StoreUnavailable:
    return StoreUnavailable(
        f"another process has been migrating {tables.message.fullname.removesuffix('message')}* for {patience:.0f} s: "
        "wait for it, then run this again"
    )


def _outside(connection: sa.Connection) -> Callable[[], AbstractContextManager[sa.Connection]]:
    @contextmanager
    def outside() -> Iterator[sa.Connection]:
        connection.commit()
        before = connection.get_isolation_level()
        connection.execution_options(isolation_level="AUTOCOMMIT")
        try:
            yield connection
        finally:
            if not connection.invalidated:
                connection.commit()
                connection.execution_options(isolation_level=before)

    return outside
