"""Carrying operations out on a database in use, so that nobody ever queues behind us for long.

A statement that waits for a lock on PostgreSQL (a metadata lock on MySQL) makes everybody who comes after it wait too, also
those whom it would not disturb. So it waits for `LOCK_TIMEOUT` at most, then gives way, says who holds the lock, rests and
tries again.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Event, Thread
from typing import Any, Final

import sqlalchemy as sa

from outbox import ConfigurationError, StoreUnavailable
from outbox.stores import pooler
from outbox_migrations import _holders as holders
from outbox_migrations._operations import LOCK_TIMEOUT, Operation

logger = logging.getLogger("outbox.migrations")

PATIENCE: Final = 60.0
"""Seconds for which a statement is tried again, unless the caller says otherwise."""

WATCH: Final = 1.0
"""Seconds between two looks at whom an index that is built beside writers waits for."""

SMALL = 8 * 1024 * 1024
"""Bytes of a table up to which an index is built while its writers wait: a moment."""

_REST: Final = (0.2, 3.0)  # seconds between two tries: the first and the longest
_LOCKED: Final = ("55P03", "40P01")  # PostgreSQL: lock_timeout, deadlock
_LOCKED_MYSQL: Final = (1205, 1213)

Outside = Callable[[], AbstractContextManager[sa.Connection]]
"""Makes a connection that is in no transaction, and whatever was done before it committed."""


class Online:
    """Carries operations out on one connection. ``outside``: how to leave its transaction, where that is possible.
    ``commit``: called after each operation where the transaction is ours to end."""

    def __init__(
        self,
        connection: Callable[[], sa.Connection],
        *,
        patience: float = PATIENCE,
        outside: Outside | None = None,
        commit: Callable[[], None] | None = None,
    ) -> None:
        self._connection, self._patience, self._outside, self._commit = connection, patience, outside, commit

    def carry_out(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            connection = self._connection()
            if operation.index is not None and connection.dialect.name == "postgresql":
                self._index(operation)
            elif not operation.done(connection):
                self._patiently(operation)
            if self._commit is not None:
                self._commit()

    def _patiently(self, operation: Operation) -> None:
        until = time.monotonic() + self._patience
        rest = _REST[0]
        while True:
            connection = self._connection()
            try:
                with _impatient(connection, operation):
                    connection.execute(operation.statement)
                return
            except sa.exc.DBAPIError as error:
                if not is_locked(error, connection.dialect.name):
                    raise
                who = holders.of(connection, operation)
                if time.monotonic() + rest >= until:
                    raise StoreUnavailable(
                        f"{operation.what}: {operation.table.fullname} was locked for {self._patience:.0f} s; {who}. "
                        "Nothing is half-done: end what holds it and run this again"
                    ) from error
            if self._commit is not None:
                self._commit()  # no snapshot and no lock while we rest
            logger.warning("%s waits: %s is locked; %s", operation.what, operation.table.fullname, who)
            time.sleep(rest * random.uniform(0.7, 1.0))
            rest = min(rest * 1.6, _REST[1])

    def _index(self, operation: Operation) -> None:
        """PostgreSQL: beside writers where it may take long, else in the transaction."""
        connection = self._connection()
        if _index_state(connection, operation) == "valid":
            return
        if self._commit is None and _size(connection, operation.table) <= SMALL:
            _drop_rest(connection, operation)
            self._patiently(operation)
            return
        if self._outside is None:
            raise ConfigurationError(
                f"{operation.what}: the table is large, and this transaction is not ours to end, so its writers would wait "
                "while the index is built. Run `outbox migrate` beforehand, after which this does nothing, or let "
                "Alembic begin the transaction itself (env.py gives it a connection without one)"
            )
        self._beside(operation, self._outside)

    def _beside(self, operation: Operation, outside: Outside) -> None:
        """It waits for transactions that are open, and nobody waits for it: so it may take its time, and begins only once.
        What another attempt has left behind is no index, and is dropped first."""
        assert operation.beside is not None
        with outside() as connection:
            # Behind PgBouncer the setting would stay with somebody else: there it waits for as long as it takes.
            before = None if pooler.is_between(connection) else connection.scalar(sa.text("SHOW lock_timeout"))
            if before is not None:
                connection.execute(sa.text(f"SET lock_timeout = {max(self._patience, LOCK_TIMEOUT) * 1000:.0f}"))
            try:
                with _watched(connection, operation) as seen:
                    _drop_rest(connection, operation, concurrently=True)
                    connection.execute(operation.beside)
            except sa.exc.DBAPIError as error:
                if not is_locked(error, "postgresql"):
                    raise
                who = seen[-1] if seen else holders.of_old_snapshots(connection)
                raise StoreUnavailable(
                    f"{operation.what}: it waited {self._patience:.0f} s for transactions that are open; {who}. "
                    "Nothing is half-done but an index that nobody uses: end them and run this again, which drops it first"
                ) from error
            finally:
                if before is not None and not connection.closed and not connection.invalidated:
                    connection.execute(sa.select(sa.func.set_config("lock_timeout", before, False)))


@contextmanager
def _watched(connection: sa.Connection, operation: Operation) -> Iterator[list[str]]:
    """Say, from another connection, for whom a statement waits that may wait for long; yields what was said."""
    said: list[str] = []
    if connection.dialect.is_async:  # such a connection belongs to its event loop
        yield said
        return
    pid, over = connection.scalar(sa.text("SELECT pg_backend_pid()")), Event()

    def watch() -> None:
        try:
            with connection.engine.connect() as other:
                while not over.wait(WATCH):
                    who = holders.of_process(other, pid)
                    other.rollback()  # no snapshot between two looks: the index would wait for it
                    if who is not None and who not in said:
                        said.append(who)
                        logger.warning("%s waits for transactions that are open; %s", operation.what, who)
        except sa.exc.SQLAlchemyError as error:
            logger.warning("%s may wait; for whom cannot be seen (%s)", operation.what, type(error).__name__)

    thread = Thread(target=watch, name="outbox-migrations-watch")
    thread.start()
    try:
        yield said
    finally:
        over.set()
        thread.join()


def is_locked(error: sa.exc.DBAPIError, dialect: str) -> bool:
    """Whether a lock was not had in time: nothing has happened, and it may be tried again."""
    original: Any = error.orig
    if dialect == "postgresql":
        return (getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)) in _LOCKED
    if dialect in ("mysql", "mariadb"):
        return bool(getattr(original, "args", ())) and original.args[0] in _LOCKED_MYSQL
    return False


@contextmanager
def _impatient(connection: sa.Connection, operation: Operation) -> Iterator[None]:
    """Statements in here wait `LOCK_TIMEOUT` for a lock; on PostgreSQL the transaction outlives their failure."""
    if operation.new:
        yield
    elif connection.dialect.name == "postgresql":
        before = connection.scalar(sa.text("SHOW lock_timeout"))
        with connection.begin_nested():
            connection.execute(sa.text(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT * 1000:.0f}"))
            yield
            connection.execute(sa.select(sa.func.set_config("lock_timeout", before, True)))
    elif connection.dialect.name in ("mysql", "mariadb"):
        before = connection.scalar(sa.text("SELECT @@SESSION.lock_wait_timeout"))
        connection.execute(sa.text("SET SESSION lock_wait_timeout = 1"))  # whole seconds
        try:
            yield
        finally:
            if not connection.invalidated:  # else what ended it is to be told
                connection.execute(sa.text(f"SET SESSION lock_wait_timeout = {int(before or 60)}"))
    else:
        yield


# ---------------------------------------------------------------- PostgreSQL: the index as it is

_INDEX: Final = sa.text(
    "SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
    " WHERE i.indrelid = to_regclass(:table) AND c.relname = :name"
)
_SIZE: Final = sa.text("SELECT coalesce(pg_relation_size(to_regclass(:table)), 0)")


def _index_state(connection: sa.Connection, operation: Operation) -> str:
    """``valid``, ``invalid`` (an attempt was cut off) or ``absent``."""
    assert operation.index is not None
    parameters = {"table": _quoted(connection, operation.table), "name": str(operation.index.name)}
    valid = connection.scalar(_INDEX, parameters)
    return "absent" if valid is None else "valid" if valid else "invalid"


def _drop_rest(connection: sa.Connection, operation: Operation, *, concurrently: bool = False) -> None:
    """Drop an index that an attempt has left unfinished: nobody uses it, and every insert pays for it."""
    if _index_state(connection, operation) != "invalid":
        return
    assert operation.index is not None
    name = connection.dialect.identifier_preparer.format_index(operation.index)
    schema = operation.table.schema
    where = f"{connection.dialect.identifier_preparer.quote_schema(schema)}." if schema else ""
    connection.execute(sa.text(f"DROP INDEX {'CONCURRENTLY ' if concurrently else ''}{where}{name}"))


def _size(connection: sa.Connection, table: sa.Table) -> int:
    return int(connection.scalar(_SIZE, {"table": _quoted(connection, table)}) or 0)


def _quoted(connection: sa.Connection, table: sa.Table) -> str:
    return str(connection.dialect.identifier_preparer.format_table(table))
