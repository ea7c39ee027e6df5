"""How messages reach the transaction: staged by ``add``, inserted as one statement after the last flush before commit.

Why last: a position taken before the entity's row lock inverts the key's order under concurrency, and a flush may insert
the message before it updates the entity. Taken last, every lock of the transaction is held already, so for one entity
position order = lock order = commit order.

Where staged rows live: on the **connection's root transaction**, and on the session's root transaction until that has a
connection. They end with it. (Rows kept in ``session.info`` were lost, or sent though rolled back, on nine of the ways a
session can end: tests/staging/ has all of them.)

When they are inserted, twice over: in the session's ``before_commit``, after a flush, and in the engine's ``commit`` and
``prepare_twophase`` events, which also see what later listeners add and commits that go through the Connection.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from outbox._message import Message
from outbox.errors import TransactionError

log = logging.getLogger("outbox.staging")


class Row:
    """A staged message: the parameters of its insert, and whom it goes with."""

    __slots__ = ("bind_arguments", "message", "nested", "parameters", "session", "stamp", "table")

    def __init__(
        self,
        table: sa.Table,
        parameters: dict[str, Any],
        message: Message,
        bind_arguments: Mapping[str, Any] | None = None,
        session: Session | None = None,
        nested: tuple[SessionTransaction, ...] = (),
    ) -> None:
        self.table = table
        self.parameters = parameters
        self.message = message
        self.bind_arguments = bind_arguments
        self.session = None if session is None else weakref.ref(session)
        self.nested = nested
        self.stamp = 0


class _Staged:
    """The rows of one root transaction of a connection.

    ``clock`` counts its savepoints: a row's stamp says after which savepoint it was staged, so that rolling one back on
    the Core connection, which no session sees, takes exactly the rows staged since.
    """

    __slots__ = ("clock", "rows", "savepoints")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.savepoints: dict[str, int] = {}
        self.clock = 0


_on_transaction: weakref.WeakKeyDictionary[sa.RootTransaction, _Staged] = weakref.WeakKeyDictionary()
_on_session: weakref.WeakKeyDictionary[SessionTransaction, list[Row]] = weakref.WeakKeyDictionary()
_connections: weakref.WeakKeyDictionary[Session, list[sa.Connection]] = weakref.WeakKeyDictionary()

inserted: list[Callable[[list[Row]], None]] = []
"""Called with the rows of each insert, after it succeeded and before the commit: for `outbox.testing.capture`."""


Built = tuple[sa.Table, dict[str, Any], Message]
"""A message ready to be inserted: its table, the parameters, and itself."""


def stage(session: Session, messages: Sequence[Built], bind_arguments: Mapping[str, Any] | None = None) -> None:
    """Stage messages on the session's transaction (begun if need be). Raises `TransactionError`; asks for no connection,
    which on an ``AsyncSession`` would need an await."""
    transaction = session.get_transaction()
    if transaction is None:
        if not session.autobegin:
            raise TransactionError("the session has no transaction (autobegin=False): call session.begin() first")
        transaction = session.begin()
    if not transaction.is_active or not session.is_active:
        raise TransactionError(
            "the session's transaction is not active (it failed, was prepared, or has just been committed): "
            "roll back or begin a new one, then add the message there"
        )
    held = _open_connections(session)
    nested = _nested(session)
    rows = [Row(table, parameters, message, bind_arguments, session, nested) for table, parameters, message in messages]
    if len(held) == 1 and bind_arguments is None:
        _refuse_autocommit(held[0])
        for row in rows:
            _append(held[0], row)
    else:
        # which connection is known once there is one, or, among several, once all of them are there
        _on_session.setdefault(_root(transaction), []).extend(rows)


def staged(session: Session) -> list[Message]:
    """What waits for this session's commit, in the order of ``add``."""
    transaction = session.get_transaction()
    waiting = list(_on_session.get(_root(transaction), ())) if transaction is not None else []
    for connection in _open_connections(session):
        state = _state(connection)
        if state is not None:
            waiting += [row for row in state.rows if row.session is not None and row.session() is session]
    return [row.message for row in waiting]


def discard(session: Session, keep: Callable[[Message], bool]) -> int:
    """Take staged messages back before they were inserted; returns how many."""
    transaction = session.get_transaction()
    lists = [_on_session.get(_root(transaction), [])] if transaction is not None else []
    lists += [state.rows for c in _open_connections(session) if (state := _state(c)) is not None]
    count = 0
    for rows in lists:
        left = [row for row in rows if keep(row.message)]
        count += len(rows) - len(left)
        rows[:] = left
    return count


def insert_now(session: Session) -> None:
    """Flush, then insert what this session has staged, without committing: what ``before_commit`` does."""
    transaction = session.get_transaction()
    if transaction is None:
        return
    if _root(transaction) not in _on_session and not any(
        (state := _state(connection)) is not None and state.rows for connection in _open_connections(session)
    ):
        return
    session.flush()
    pending = _on_session.pop(_root(transaction), [])
    try:
        for row in list(pending):
            _append(_connection_for(session, row), row)
            pending.remove(row)
    finally:
        if pending:
            _on_session[_root(transaction)] = pending
    for connection in _open_connections(session):
        _insert(connection)


def insert_at_once(connection: sa.Connection, messages: Sequence[Built]) -> None:
    """Insert on a Core connection, in its transaction (begun if need be). Raises `TransactionError`."""
    if connection.closed:
        raise TransactionError("the connection is closed: add the message while its transaction is open")
    transaction = connection.get_transaction()
    if transaction is not None and not transaction.is_active:
        raise TransactionError("the connection's transaction is not active any more: begin a new one")
    _refuse_autocommit(connection)
    _execute(connection, [Row(*message) for message in messages])


# ---------------------------------------------------------------- where rows are


def _state(connection: sa.Connection) -> _Staged | None:
    transaction = None if connection.closed else connection.get_transaction()
    return None if transaction is None else _on_transaction.get(transaction)


def _append(connection: sa.Connection, row: Row) -> None:
    transaction = connection.get_transaction()
    if transaction is None:
        raise TransactionError("the connection has no open transaction that the message could belong to")
    state = _on_transaction.get(transaction)
    if state is None:
        state = _on_transaction[transaction] = _Staged()
    row.stamp = state.clock
    state.rows.append(row)


def _insert(connection: sa.Connection) -> None:
    """Insert what is staged on this connection, one statement a table; forget it only once that succeeded."""
    state = _state(connection)
    if state is None or not state.rows:
        return
    rows = list(state.rows)
    _execute(connection, rows)
    del state.rows[: len(rows)]


def _execute(connection: sa.Connection, rows: list[Row]) -> None:
    by_table: dict[sa.Table, list[dict[str, Any]]] = {}
    for row in rows:
        by_table.setdefault(row.table, []).append(row.parameters)
    for table, parameters in by_table.items():
        # a list of parameters, not .values([...]): that costs 74 µs a message to compile
        connection.execute(table.insert(), parameters)
    for callback in inserted:
        callback(rows)


def _root(transaction: SessionTransaction) -> SessionTransaction:
    while transaction.parent is not None:
        transaction = transaction.parent
    return transaction


def _nested(session: Session) -> tuple[SessionTransaction, ...]:
    """The open savepoints of the session, innermost first."""
    found = []
    transaction = session.get_nested_transaction()
    while transaction is not None:
        if transaction.nested:
            found.append(transaction)
        transaction = transaction.parent
    return tuple(found)


def _open_connections(session: Session) -> list[sa.Connection]:
    """The connections that the session's transaction holds."""
    return [c for c in _connections.get(session, ()) if not c.closed and c.get_transaction() is not None]


def _connection_for(session: Session, row: Row) -> sa.Connection:
    """The connection a message goes through: the one that the transaction holds, or among several the one that the bind
    arguments (else an insert into the message table) resolve to. Never one that the data did not go through."""
    held = _open_connections(session)
    if len(held) == 1 and row.bind_arguments is None:
        chosen = held[0]
    else:
        arguments = dict(row.bind_arguments or {"clause": row.table.insert()})
        try:
            bind = session.get_bind(**arguments)
        except sa.exc.UnboundExecutionError as error:
            raise TransactionError(
                f"message for {row.message.topic!r}: the session has no database for {row.table.name!r}; "
                "pass bind_arguments={'mapper': YourEntity} (or bind=…) to add"
            ) from error
        engine = bind if isinstance(bind, sa.Engine) else bind.engine
        same = [c for c in held if c is bind or c.engine is engine or c.engine.pool is engine.pool]
        if same:
            chosen = same[0]
        elif not held or session.twophase:
            chosen = session.connection(bind_arguments=arguments)
        else:
            raise TransactionError(
                f"message for {row.message.topic!r}: it would go to {engine.url!r}, which this transaction has not "
                "written to, so both could not commit together. Pass bind_arguments={'mapper': YourEntity} that resolve "
                "to the database of your data, or use Session(twophase=True)"
            )
    _refuse_autocommit(chosen)
    return chosen


def _refuse_autocommit(connection: sa.Connection) -> None:
    level = connection.get_execution_options().get("isolation_level")
    if level is None:
        # create_engine(isolation_level=…) is kept here only, without a public name; asking the DBAPI instead would take
        # SQLite's documented "isolation_level = None plus our own BEGIN" for autocommit
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    if level == "AUTOCOMMIT":
        raise TransactionError(
            "the connection is in autocommit mode, so a message could not commit together with your data: "
            "use a connection or engine with another isolation_level"
        )


# ---------------------------------------------------------------- what SQLAlchemy tells us


def _after_begin(session: Session, transaction: SessionTransaction, connection: sa.Connection) -> None:
    held = _connections.setdefault(session, [])
    if not any(c is connection for c in held):
        held.append(connection)
    root = _root(transaction)
    rows = _on_session.get(root)
    if not rows or len(held) > 1 or any(row.bind_arguments is not None for row in rows):
        return
    _refuse_autocommit(connection)
    for row in rows:
        _append(connection, row)
    del _on_session[root]


def _before_commit(session: Session) -> None:
    if not session.in_nested_transaction():  # else it is the release of a savepoint
        insert_now(session)


def _after_soft_rollback(session: Session, transaction: SessionTransaction) -> None:
    # the subtransaction of a failed flush: what is rolled back is the savepoint, or root, that it ran in
    while not transaction.nested and transaction.parent is not None:
        transaction = transaction.parent

    def survives(row: Row) -> bool:
        return transaction.nested and not any(nested is transaction for nested in row.nested)

    root = _root(transaction)
    if root in _on_session:
        _on_session[root] = [row for row in _on_session[root] if survives(row)]
    for connection in _connections.get(session, ()):
        state = _state(connection)
        if state is not None:
            state.rows[:] = [
                row for row in state.rows if row.session is None or row.session() is not session or survives(row)
            ]


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        held = _connections.pop(session, [])
        left = len(_on_session.pop(transaction, ()))
        # A connection given from outside goes on after the session: its owner's commit still inserts what is staged.
        if left and not held:
            log.debug("%d staged messages ended with a session that was closed before its commit", left)


def _savepoint(connection: sa.Connection, name: str) -> None:
    state = _state(connection)
    if state is not None:
        state.clock += 1
        state.savepoints[name] = state.clock


def _rollback_savepoint(connection: sa.Connection, name: str, context: None) -> None:
    state = _state(connection)
    if state is not None:
        # a savepoint from before anything was staged here has no entry: everything came after it
        since = state.savepoints.get(name, 0)
        state.rows[:] = [row for row in state.rows if row.stamp < since]


def _commit(connection: sa.Connection) -> None:
    _insert(connection)


def _prepare_twophase(connection: sa.Connection, xid: Any) -> None:
    _insert(connection)


_installed = False


def install() -> None:
    """Listen to every session and engine of the process; once. Costs a transaction without messages about 2 µs, and an
    engine's commit 15–20 µs."""
    global _installed
    if _installed:
        return
    _installed = True
    event.listen(Session, "after_begin", _after_begin)
    event.listen(Session, "before_commit", _before_commit)
    event.listen(Session, "after_soft_rollback", _after_soft_rollback)
    event.listen(Session, "after_transaction_end", _after_transaction_end)
    event.listen(sa.Engine, "savepoint", _savepoint)
    event.listen(sa.Engine, "rollback_savepoint", _rollback_savepoint)
    event.listen(sa.Engine, "commit", _commit)
    event.listen(sa.Engine, "prepare_twophase", _prepare_twophase)
