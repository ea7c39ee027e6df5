"""How messages reach the transaction: staged by ``add``, inserted as one statement after the last flush before commit.

Why last: a position taken before the entity's row lock inverts the key's order under concurrency, and a flush may insert
the message before it updates the entity. Taken last, every lock of the transaction is held already, so for one entity
position order = lock order = commit order.

Where staged rows live: on the **connection's root transaction**, and on the session's root transaction until it is known
which connection that is. They end with it. (Rows kept in ``session.info`` were lost, or sent though rolled back, on nine
of the ways a session can end: tests/staging/ has all of them.)

When they are inserted, twice over: in the session's ``before_commit``, after a flush, and in the engine's ``commit`` and
two-phase events, which also see what later listeners add and commits that go through the Connection.

Which connection: the one that the transaction has written to. So the statements of a transaction are looked at.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from outbox._message import Message
from outbox.errors import TransactionError

log = logging.getLogger("outbox.staging")

Built = tuple[sa.Table, dict[str, Any], Message]
"""A message ready to be inserted: its table, the parameters, and itself."""

_numbers = itertools.count()


class Row:
    """A staged message: the parameters of its insert, and whom it goes with.

    Sessions and their savepoints are held weakly: rows hang on their connection's transaction, and a session that its
    owner forgot must still be collected, else its connection never returns to the pool.
    """

    __slots__ = ("bind_arguments", "message", "nested", "number", "parameters", "session", "stamp", "table", "unflushed")

    def __init__(
        self,
        built: Built,
        session: weakref.ref[Session] | None = None,
        nested: tuple[weakref.ref[SessionTransaction], ...] = (),
        bind_arguments: Mapping[str, Any] | None = None,
        unflushed: bool = False,
    ) -> None:
        self.table, self.parameters, self.message = built
        self.session = session
        self.nested = nested
        self.bind_arguments = bind_arguments
        self.unflushed = unflushed
        self.number = next(_numbers)
        self.stamp = 0


class _Staged:
    """The rows of one root transaction of a connection.

    ``clock`` counts its savepoints: a row's stamp says after which savepoint it was staged, so that rolling one back on
    the Core connection, which no session sees, takes exactly the rows staged since.
    """

    __slots__ = ("clock", "committed", "rows", "savepoints")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.savepoints: dict[str, int] = {}
        self.clock = 0
        self.committed = False  # by a COMMIT that SQLAlchemy did not know for one


_on_transaction: weakref.WeakKeyDictionary[sa.RootTransaction, _Staged] = weakref.WeakKeyDictionary()
_on_session: weakref.WeakKeyDictionary[SessionTransaction, list[Row]] = weakref.WeakKeyDictionary()
_connections: weakref.WeakKeyDictionary[Session, list[sa.Connection]] = weakref.WeakKeyDictionary()
_written: weakref.WeakSet[sa.RootTransaction] = weakref.WeakSet()
_prepared: weakref.WeakSet[sa.RootTransaction] = weakref.WeakSet()
_released: weakref.WeakSet[SessionTransaction] = weakref.WeakSet()
_bare_savepoints: weakref.WeakKeyDictionary[sa.RootTransaction, int] = weakref.WeakKeyDictionary()

inserted: list[Callable[[list[Row]], None]] = []
"""Called with the rows of each insert, after it succeeded and before the commit: for `outbox.testing.capture`."""


def stage(session: Session, messages: Sequence[Built], bind_arguments: Mapping[str, Any] | None = None) -> None:
    """Stage messages on the session's transaction (begun if need be). Raises `TransactionError`; asks for no connection,
    which on an ``AsyncSession`` would need an await."""
    root = session.get_transaction() or _begin(session)
    if not root.is_active or not session.is_active:
        raise TransactionError(
            "the session's transaction is not active (it failed, was prepared, or has just been committed): "
            "roll back or begin a new one, then add the message there"
        )
    connection = _likely_connection(session, bind_arguments)
    if connection is not None:
        _refuse_unfit(connection)
    elif isinstance(session.bind, sa.Engine):
        _refuse_autocommit(session.bind)
    reference, nested = weakref.ref(session), _nested(session)
    # Only for a connection that outlives the session, which may be closed without commit while its flushes remain.
    unflushed = isinstance(session.bind, sa.Connection) and bool(session.new or session.dirty or session.deleted)
    rows = [Row(built, reference, nested, bind_arguments, unflushed) for built in messages]
    if connection is not None:
        _append(connection, rows)
    else:
        # which connection is known once there is one, or, among several, once one of them was written to
        _on_session.setdefault(root, []).extend(rows)


def staged(session: Session) -> list[Message]:
    """What waits for this session's commit, in the order of ``add``."""
    root = session.get_transaction()
    rows = list(_on_session.get(root, ())) if root is not None else []
    for connection in _open_connections(session):
        rows += _rows_of(session, connection)
    return [row.message for row in sorted(rows, key=_number)]


def discard(session: Session, keep: Callable[[Message], bool]) -> int:
    """Take staged messages back before they were inserted; returns how many."""
    root = session.get_transaction()
    lists = [_on_session.get(root, [])] if root is not None else []
    lists += [state.rows for c in _open_connections(session) if (state := _state(c)) is not None]
    count = 0
    for rows in lists:
        left = [row for row in rows if keep(row.message)]
        count += len(rows) - len(left)
        rows[:] = left
    return count


def insert_now(session: Session) -> None:
    """Flush, then insert what this session has staged, without committing: what ``before_commit`` does."""
    root = session.get_transaction()
    if root is None:
        return
    if root not in _on_session and not any(
        (state := _state(connection)) is not None and state.rows for connection in _open_connections(session)
    ):
        return
    session.flush()
    _settle(session, root)
    for connection in _open_connections(session):
        _insert(connection)


def insert_at_once(connection: sa.Connection, messages: Sequence[Built]) -> None:
    """Insert on a Core connection, in its transaction (begun if need be). Raises `TransactionError`."""
    _refuse_unfit(connection)
    _execute(connection, [Row(built) for built in messages])


def connection_for(
    session: Session, table: sa.Table, bind_arguments: Mapping[str, Any] | None = None
) -> sa.Connection:
    """The connection through which a row of ours commits together with the data of this session's transaction: the one
    that it has written to, else the one that the bind arguments (or an UPDATE of the table) resolve to. Never one that
    the data did not go through. Raises `TransactionError`."""
    held = _open_connections(session)
    writers = [connection for connection in held if connection.get_transaction() in _written]
    if bind_arguments is None and len(writers) == 1 and not session.twophase:
        chosen = writers[0]  # whatever get_bind would say: a message belongs to the data
    else:
        # An UPDATE, since routing recipes know that as a write, and INSERT only in a flush.
        arguments = {"clause": sa.update(table)} if bind_arguments is None else bind_arguments
        try:
            bind = _bind(session, arguments)
        except sa.exc.UnboundExecutionError as error:
            if bind_arguments is not None or len(held) != 1:
                raise TransactionError(
                    f"the session has no database for {table.name!r}: pass bind_arguments={{'mapper': YourEntity}} "
                    "(or {'bind': engine})"
                ) from error
            bind = held[0]
        found = _through(held, bind)
        if writers and found not in writers and not session.twophase:
            raise TransactionError(
                f"{table.name!r} would be written to {bind.engine.url!r}, which this transaction has not written to, so "
                "it could not commit together with your data. Pass bind_arguments={'mapper': YourEntity} that resolve to "
                "the database of your data, or use Session(twophase=True)"
            )
        chosen = found or session.connection(bind_arguments={"bind": bind})
    _refuse_unfit(chosen)
    return chosen


# ---------------------------------------------------------------- where rows are


def _begin(session: Session) -> SessionTransaction:
    if not session.autobegin:
        raise TransactionError("the session has no transaction (autobegin=False): call session.begin() first")
    try:
        return session.begin()
    except sa.exc.InvalidRequestError as error:
        raise TransactionError(f"the session cannot begin a transaction: {error}") from error


def _state(connection: sa.Connection) -> _Staged | None:
    transaction = None if connection.closed else connection.get_transaction()
    return None if transaction is None else _on_transaction.get(transaction)


def _append(connection: sa.Connection, rows: list[Row]) -> None:
    transaction = connection.get_transaction()
    if transaction is None:
        raise TransactionError("the connection has no open transaction that the message could belong to")
    state = _on_transaction.get(transaction)
    if state is None:
        state = _on_transaction[transaction] = _Staged()
    for row in rows:
        row.stamp = state.clock
    state.rows += rows


def _rows_of(session: Session, connection: sa.Connection) -> list[Row]:
    state = _state(connection)
    return [] if state is None else [row for row in state.rows if row.session is not None and row.session() is session]


def _settle(session: Session, root: SessionTransaction) -> None:
    """Put each row of the session onto the connection that it commits with. Until the commit that was a guess: the one
    connection there was may be the replica that was read, before the leader was written to."""
    held = _open_connections(session)
    rows = list(_on_session.get(root, ()))
    if not rows and len(held) == 1 and held[0].get_transaction() in _written and not session.twophase:
        return  # as good as always
    for connection in held:
        rows += _rows_of(session, connection)
    targets: dict[tuple[sa.Table, int], sa.Connection] = {}
    for row in rows:
        key = (row.table, id(row.bind_arguments))
        if key not in targets:
            targets[key] = connection_for(session, row.table, row.bind_arguments)
    for connection in held:
        _drop(connection, lambda row: row in moving)
    moving = set()
    ...


def _number(row: Row) -> int:
    return row.number
