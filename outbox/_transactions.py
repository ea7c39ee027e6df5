"""Which connection a row of ours has to go through, so that it commits with the data of a session's transaction.

SQLAlchemy does not tell which of its connections a session has written to, so the statements are looked at
(``see_statement``); `outbox.staging` passes on the events. Nothing here asks for a connection before a commit, since on an
``AsyncSession`` that would need an await.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session, SessionTransaction

from outbox.errors import TransactionError

# Connections are held weakly, too: those of a session that its owner forgot are collected with it, not one turn later.
_connections: weakref.WeakKeyDictionary[Session, list[weakref.ref[sa.Connection]]] = weakref.WeakKeyDictionary()
_written: weakref.WeakSet[sa.RootTransaction] = weakref.WeakSet()
_prepared: weakref.WeakSet[sa.RootTransaction] = weakref.WeakSet()
_bare_savepoints: weakref.WeakKeyDictionary[sa.RootTransaction, int] = weakref.WeakKeyDictionary()
_committed: weakref.WeakSet[sa.RootTransaction] = weakref.WeakSet()  # by the release of such a savepoint


# ---------------------------------------------------------------- sessions and their connections


def join(session: Session, connection: sa.Connection) -> None:
    """The session's transaction holds this connection from now on."""
    references = _connections.setdefault(session, [])
    if not any(reference() is connection for reference in references):
        references.append(weakref.ref(connection))


def part(session: Session) -> None:
    """The session's transaction has ended."""
    _connections.pop(session, None)


def held(session: Session) -> list[sa.Connection]:
    """The connections in a transaction that the session's transaction holds."""
    connections = [reference() for reference in _connections.get(session, ())]
    return [c for c in connections if c is not None and not c.closed and c.get_transaction() is not None]


def has_held(session: Session) -> bool:
    """Whether the session's transaction ever had a connection."""
    return bool(_connections.get(session))


def root_of(transaction: SessionTransaction) -> SessionTransaction:
    while transaction.parent is not None:
        transaction = transaction.parent
    return transaction


def savepoints_of(session: Session) -> tuple[weakref.ref[SessionTransaction], ...]:
    """The open savepoints of the session, innermost first."""
    found = []
    transaction = session.get_nested_transaction()
    while transaction is not None:
        if transaction.nested:
            found.append(weakref.ref(transaction))
        transaction = transaction.parent
    return tuple(found)


# ---------------------------------------------------------------- the right connection


def connection_for(session: Session, table: sa.Table, bind_arguments: Mapping[str, Any] | None = None) -> sa.Connection:
    """The connection through which a row of ours commits together with the data of this session's transaction: the one
    that it has written to, else the one that the bind arguments, or an UPDATE of the table, resolve to. Never one that
    the data did not go through. Raises `TransactionError`."""
    connections = held(session)
    writers = [connection for connection in connections if has_written(connection)]
    if bind_arguments is None and len(writers) == 1 and not session.twophase:
        chosen = writers[0]  # whatever get_bind would say
    else:
        bind = _bind(session, table, bind_arguments)
        if bind is None:
            if len(connections) != 1:
                raise TransactionError(
                    f"the session cannot tell which database {table.name!r} is in: pass bind_arguments={{'mapper': "
                    "YourEntity}, which resolve to the database of your data"
                )
            bind = connections[0]
        found = _through(connections, bind)
        if writers and found not in writers and not session.twophase:
            raise TransactionError(
                f"{table.name!r} would be written to {bind.engine.url!r}, which this transaction has not written to, so "
                "it could not commit together with your data. Pass bind_arguments={'mapper': YourEntity}, which resolve "
                "to the database of your data, or use Session(twophase=True)"
            )
        if found is None:
            found = session.connection(bind_arguments={"bind": bind})
            join(session, found)  # it may have been there before we listened
        chosen = found
    refuse_unfit(chosen)
    return chosen


def likely_connection(
    session: Session, table: sa.Table, bind_arguments: Mapping[str, Any] | None
) -> sa.Connection | None:
    """The same as far as it can be said now, among the connections that there are."""
    connections = held(session)
    if bind_arguments is None:
        if len(connections) < 2:
            return connections[0] if connections else None
        writers = [connection for connection in connections if has_written(connection)]
        if len(writers) == 1:
            return writers[0]
    bind = _bind(session, table, bind_arguments)
    return None if bind is None else _through(connections, bind)


def _bind(
    session: Session, table: sa.Table, bind_arguments: Mapping[str, Any] | None
) -> sa.Engine | sa.Connection | None:
    # An UPDATE, since the routing recipe of SQLAlchemy's documentation takes that for a write, an INSERT only in a flush.
    arguments: Mapping[str, Any] = {"clause": sa.update(table)} if bind_arguments is None else bind_arguments
    try:
        bind: sa.Engine | sa.Connection = arguments.get("bind") or session.get_bind(**arguments)
    except sa.exc.UnboundExecutionError as error:
        if bind_arguments is None:
            return None
        raise TransactionError(f"the bind_arguments resolve to no database: {error}") from error
    return bind


def _through(connections: list[sa.Connection], bind: sa.Engine | sa.Connection) -> sa.Connection | None:
    """The connection among these that goes to the same database."""
    pool = bind.engine.pool  # an engine with other execution options shares it
    return next((c for c in connections if c is bind or c.engine.pool is pool), None)


def refuse_unfit(connection: sa.Connection) -> None:
    """Raise `TransactionError` where a row written now would not commit with the connection's transaction."""
    if connection.closed or connection.invalidated:
        raise TransactionError("the connection is closed or lost: add the message while its transaction is open")
    transaction = connection.get_transaction()
    if transaction is not None and (not transaction.is_active or transaction in _prepared):
        raise TransactionError(
            "the connection's transaction is not active (it failed, was prepared or has ended): begin a new one"
        )
    refuse_autocommit(connection)


def refuse_autocommit(bind: sa.Connection | sa.Engine) -> None:
    """Raise `TransactionError` if each statement commits by itself there."""
    level = bind.get_execution_options().get("isolation_level")
    if level is None:
        # create_engine(isolation_level=…) is kept here only, without a public name; asking the DBAPI instead would take
        # SQLite's documented "isolation_level = None plus our own BEGIN" for autocommit
        level = getattr(bind.dialect, "_on_connect_isolation_level", None)
    if level is None and isinstance(bind, sa.Connection) and _driver_autocommits(bind):
        level = "AUTOCOMMIT"
    if level == "AUTOCOMMIT":
        raise TransactionError(
            "the connection is in autocommit mode, so a message could not commit together with your data: "
            "use a connection or engine with another isolation_level"
        )


def _driver_autocommits(connection: sa.Connection) -> bool:
    """Whether the driver itself was told to: connect_args={"autocommit": True}."""
    if connection.dialect.name == "postgresql":
        return bool(getattr(connection.connection.dbapi_connection, "autocommit", False))
    status = _mysql_status(connection.connection.driver_connection)
    return status is not None and bool(status & _AUTOCOMMIT) and not status & _IN_TRANSACTION


# ---------------------------------------------------------------- what statements tell


_WRITES: Final = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE", "COPY", "CALL"})

# By these MySQL and MariaDB commit what came before them, also where they fail
# (dev.mysql.com/doc/refman/8.4/en/implicit-commit.html).
_MYSQL_COMMITS: Final = frozenset(
    {"ALTER", "ANALYZE", "BEGIN", "CACHE", "CHECK", "CREATE", "DROP", "FLUSH", "GRANT", "INSTALL", "LOCK", "OPTIMIZE"}
    | {"RENAME", "REPAIR", "RESET", "REVOKE", "START", "STOP", "TRUNCATE", "UNINSTALL"}
)

# Errors with which MySQL and MariaDB roll back the whole transaction: a row changed since the snapshot (MariaDB's
# innodb_snapshot_isolation), the lock table is full, a deadlock, and the last two within XA.
_MYSQL_ROLLS_BACK: Final = frozenset({1020, 1206, 1213, 1613, 1614})
_MYSQL_LOCK_TIMEOUT: Final = 1205


def see_statement(connection: sa.Connection, statement: str, context: Any) -> tuple[str, str]:
    """Note whether the statement writes. Returns its first two words where they are not a query's: ('COMMIT', '')."""
    # the context's is the statement before listeners put comments in front of it
    statement = getattr(context, "statement", None) or statement
    if statement.startswith("SELECT"):
        return "", ""
    if context is not None and (context.isinsert or context.isupdate or context.isdelete):
        _note_write(connection)
        return "", ""
    word, rest = first_word(statement)
    if word in _WRITES:
        _note_write(connection)
    return word, rest


def first_word(statement: str) -> tuple[str, str]:
    """The first word, in capitals, and what follows it: ('ROLLBACK', 'to mine')."""
    words = statement[:200].strip("; \t\r\n").split(None, 1)
    return (words[0].upper(), words[1] if len(words) > 1 else "") if words else ("", "")


def commits(connection: sa.Connection, word: str, rest: str) -> bool:
    """Whether the statement of these words ends the transaction with a commit, though SQLAlchemy does not know."""
    if word in ("COMMIT", "END"):
        return True
    if word not in _MYSQL_COMMITS or connection.dialect.name not in ("mysql", "mariadb"):
        return False
    return rest[:9].upper() != "TEMPORARY"


def rolls_back(word: str, rest: str) -> str | None:
    """The savepoint that a statement of these words rolls back to, '' for the whole transaction; None: it does not."""
    if word not in ("ROLLBACK", "ABORT"):
        return None
    to = re.match(r"(?:WORK\s+|TRANSACTION\s+)?TO\s+(?:SAVEPOINT\s+)?(\S+)", rest, re.IGNORECASE)
    return to[1] if to else ""


def undone_by_error(connection: sa.Connection, error: BaseException | None) -> bool:
    """Whether the database has rolled back the whole transaction with the statement that failed like this. PostgreSQL
    leaves it open, so that it can only be rolled back; the others begin a new one with the next statement."""
    if connection.dialect.name == "sqlite":
        return has_written(connection) and no_transaction_is_open(connection)
    if connection.dialect.name not in ("mysql", "mariadb"):
        return False
    code = error.args[0] if error is not None and error.args else None
    if code == _MYSQL_LOCK_TIMEOUT:
        return bool(connection.exec_driver_sql("SELECT @@innodb_rollback_on_timeout").scalar())
    return code in _MYSQL_ROLLS_BACK


def _note_write(connection: sa.Connection) -> None:
    transaction = connection.get_transaction()
    if transaction is not None:
        _written.add(transaction)


def forget_writes(connection: sa.Connection) -> None:
    """What was written is rolled back, though the connection's transaction has not ended."""
    transaction = connection.get_transaction()
    if transaction is not None:
        _written.discard(transaction)


def has_written(connection: sa.Connection) -> bool:
    """Whether the connection's transaction has written anything."""
    return connection.get_transaction() in _written


def note_prepared(connection: sa.Connection) -> None:
    """The connection's two-phase transaction was prepared: nothing can be added to it."""
    transaction = connection.get_transaction()
    if transaction is not None:
        _prepared.add(transaction)


def no_transaction_is_open(connection: sa.Connection) -> bool:
    """Whether the driver knows that the database is in no transaction, without asking the server. False: unknown."""
    with suppress(Exception):
        driver: Any = connection.connection.driver_connection
        if hasattr(driver, "in_transaction"):  # sqlite3, aiosqlite
            return not driver.in_transaction
        if hasattr(driver, "is_in_transaction"):  # asyncpg
            return not driver.is_in_transaction()
        if (status := _mysql_status(driver)) is not None:
            return not status & _IN_TRANSACTION
        return int(driver.info.transaction_status) == 0  # psycopg, psycopg2: IDLE
    return False


_IN_TRANSACTION: Final = 1  # SERVER_STATUS_IN_TRANS
_AUTOCOMMIT: Final = 2  # SERVER_STATUS_AUTOCOMMIT


def _mysql_status(driver: Any) -> int | None:
    """What MySQL said with its last answer, where the driver keeps it: PyMySQL, aiomysql, and asyncmy, which does not take
    notice of a zero. mysqlclient does not show it."""
    status = getattr(driver, "server_status", None)
    return status if isinstance(status, int) else None


# "If a RELEASE command releases the outermost savepoint, so that the transaction stack becomes empty, then RELEASE is the
# same as COMMIT" (sqlite.org/lang_savepoint.html). And it is the outermost, since sqlite3 sends no BEGIN before a SAVEPOINT
# unless it is told to. What SQLAlchemy rolls back after that is committed all the same.


def savepoint_begins(connection: sa.Connection) -> None:
    """A SAVEPOINT is about to be sent."""
    transaction = connection.get_transaction()
    if transaction is None or connection.dialect.name != "sqlite":
        return
    depth = _bare_savepoints.get(transaction, 0)
    if depth or no_transaction_is_open(connection):
        _bare_savepoints[transaction] = depth + 1


def savepoint_ends(connection: sa.Connection) -> bool:
    """A savepoint is about to be released or rolled back to. True: releasing it commits."""
    transaction = connection.get_transaction()
    depth = _bare_savepoints.pop(transaction, 0) if transaction is not None else 0
    if transaction is not None and depth > 1:
        _bare_savepoints[transaction] = depth - 1
    return depth == 1


def committed_by_a_savepoint(connection: sa.Connection) -> None:
    """The savepoint that is about to be released commits."""
    transaction = connection.get_transaction()
    if transaction is not None:
        _committed.add(transaction)


def was_committed_by_a_savepoint(connection: sa.Connection) -> bool:
    return connection.get_transaction() in _committed
