"""How messages reach the transaction: staged by ``add``, inserted as one statement after the last flush before commit.

Why last: a position taken before the entity's row lock inverts the key's order under concurrency, and a flush may insert
the message before it updates the entity. Taken last, every lock of the transaction is held already, so for one entity
position order = lock order = commit order.

Where staged rows live: on the **connection's root transaction**, and on the session's root transaction while that has
no connection. They end with it. (Rows kept in ``session.info`` were lost, or sent though rolled back, on nine of the ways
a session can end: tests/staging/ has all of them.)

When they are inserted, twice over: in the session's ``before_commit``, after a flush, and in the engine's ``commit`` and
two-phase events, which also see what later listeners add and commits that go through the Connection.

Through which connection: the one that the transaction has written to, for which its statements are looked at.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
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
_BY_NUMBER: Final = attrgetter("number")


class Row:
    """A staged message: the parameters of its insert, and whom it goes with.

    Sessions and savepoints are held weakly: rows hang on their connection's transaction, and a session that its owner
    forgot must still be collected, else its connection never returns to the pool.
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
        # Staged beside changes that were not flushed yet: a commit through the Connection leaves both for the next.
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
        self.committed = False  # by a COMMIT that SQLAlchemy does not take for one

    def of(self, session: Session) -> list[Row]:
        return [row for row in self.rows if row.session is not None and row.session() is session]


_on_transaction: weakref.WeakKeyDictionary[sa.RootTransaction, _Staged] = weakref.WeakKeyDictionary()
_on_session: weakref.WeakKeyDictionary[SessionTransaction, list[Row]] = weakref.WeakKeyDictionary()
_connections: weakref.WeakKeyDictionary[Session, list[sa.Connection]] = weakref.WeakKeyDictionary()
_written: weakref.WeakSet[sa.RootTransaction] = weakref.WeakSet()
_prepared: weakref.WeakSet[sa.RootTransaction] = weakref.WeakSet()
_committing: weakref.WeakSet[SessionTransaction] = weakref.WeakSet()
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
    connection = _likely_connection(session, messages[0][0], bind_arguments)
    if connection is None and root in _committing:
        connection = connection_for(session, messages[0][0], bind_arguments)  # by a listener that comes after ours
    if connection is not None:
        _refuse_unfit(connection)
    elif isinstance(session.bind, sa.Engine):
        _refuse_autocommit(session.bind)
    reference, nested = weakref.ref(session), _nested(session)
    unflushed = bool(session.new or session.dirty or session.deleted)
    rows = [Row(built, reference, nested, bind_arguments, unflushed) for built in messages]
    if connection is None:
        _on_session.setdefault(root, []).extend(rows)
    else:
        _append(connection, rows)


def staged(session: Session) -> list[Message]:
    """What waits for this session's commit, in the order of ``add``."""
    root = session.get_transaction()
    return [row.message for row in _waiting(session, root)] if root is not None else []


def discard(session: Session, keep: Callable[[Message], bool]) -> int:
    """Take staged messages back before they were inserted; returns how many."""
    root = session.get_transaction()
    gone = {row for row in _waiting(session, root) if not keep(row.message)} if root is not None else set()
    if gone:
        _drop(session, lambda row: row in gone)
    return len(gone)


def insert_now(session: Session) -> None:
    """Flush, then insert what this session has staged, without committing: what ``before_commit`` does."""
    root = session.get_transaction()
    if root is None or not (root in _on_session or any(_rows(c) for c in _open_connections(session))):
        return
    session.flush()
    _settle(session, root)
    for connection in _open_connections(session):
        _insert(connection, session)


def insert_at_once(connection: sa.Connection, messages: Sequence[Built]) -> None:
    """Insert on a Core connection, in its transaction (begun if need be). Raises `TransactionError`."""
    _refuse_unfit(connection)
    _execute(connection, [Row(built) for built in messages])


def connection_for(
    session: Session, table: sa.Table, bind_arguments: Mapping[str, Any] | None = None
) -> sa.Connection:
    """The connection through which a row of ours commits together with the data of this session's transaction: the one
    that it has written to, else the one that the bind arguments, or an UPDATE of the table, resolve to. Never one that
    the data did not go through. Raises `TransactionError`."""
    held = _open_connections(session)
    writers = [connection for connection in held if connection.get_transaction() in _written]
    if bind_arguments is None and len(writers) == 1 and not session.twophase:
        chosen = writers[0]  # whatever get_bind would say
    else:
        bind = _bind(session, table, bind_arguments)
        if bind is None:
            if len(held) != 1:
                raise TransactionError(
                    f"the session cannot tell which database {table.name!r} is in: pass bind_arguments={{'mapper': "
                    "YourEntity}, which resolve to the database of your data"
                )
            bind = held[0]
        found = _through(held, bind)
        if writers and found not in writers and not session.twophase:
            raise TransactionError(
                f"{table.name!r} would be written to {bind.engine.url!r}, which this transaction has not written to, so "
                "it could not commit together with your data. Pass bind_arguments={'mapper': YourEntity}, which resolve "
                "to the database of your data, or use Session(twophase=True)"
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


def _rows(connection: sa.Connection) -> list[Row]:
    state = _state(connection)
    return [] if state is None else state.rows


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


def _waiting(session: Session, root: SessionTransaction) -> list[Row]:
    """All rows of the session, in the order of ``add``."""
    rows = list(_on_session.get(root, ()))
    for connection in _open_connections(session):
        state = _state(connection)
        if state is not None:
            rows += state.of(session)
    rows.sort(key=_BY_NUMBER)
    return rows


def _drop(session: Session, gone: Callable[[Row], bool], root: SessionTransaction | None = None) -> None:
    root = root or session.get_transaction()
    if root is not None and root in _on_session:
        _on_session[root] = [row for row in _on_session[root] if not gone(row)]
    for connection in _connections.get(session, ()):
        rows = _rows(connection)
        rows[:] = [row for row in rows if row.session is None or row.session() is not session or not gone(row)]


def _settle(session: Session, root: SessionTransaction) -> None:
    """Put each row onto the connection that it commits with. Before the commit that is a guess: the only connection may
    have been that of a replica, and the leader's came later."""
    held = _open_connections(session)
    if root not in _on_session and len(held) == 1 and held[0].get_transaction() in _written and not session.twophase:
        return  # as nearly always
    chosen: dict[tuple[sa.Table, int], sa.Connection] = {}
    moves: dict[sa.Connection, list[Row]] = {}
    for row in _waiting(session, root):
        key = (row.table, id(row.bind_arguments))
        if key not in chosen:
            chosen[key] = connection_for(session, row.table, row.bind_arguments)
        moves.setdefault(chosen[key], []).append(row)
    _drop(session, lambda row: True)
    _on_session.pop(root, None)
    for connection, rows in moves.items():
        _append(connection, rows)


def _insert(connection: sa.Connection, session: Session | None = None) -> None:
    """Insert what is staged on this connection and belongs to this commit; forget it only once that succeeded."""
    state = _state(connection)
    if state is None or not state.rows:
        return
    mine = [row for row in state.rows if not row.unflushed or (row.session is not None and row.session() is session)]
    if session is None:
        for row in state.rows:
            owner = row.session() if row.unflushed and row.session is not None else None
            if owner is not None and (root := owner.get_transaction()) is not None:
                _on_session.setdefault(root, []).append(row)
        state.rows[:] = mine
    _execute(connection, mine, state.rows)


def _execute(connection: sa.Connection, rows: list[Row], staged: list[Row] | None = None) -> None:
    by_table: dict[sa.Table, list[Row]] = {}
    for row in rows:
        by_table.setdefault(row.table, []).append(row)
    for table, its in by_table.items():
        # a list of parameters, not .values([...]): that costs 74 µs a message to compile
        connection.execute(table.insert(), [row.parameters for row in its])
        if staged is not None:
            done = set(its)
            staged[:] = [row for row in staged if row not in done]
        for callback in inserted:
            callback(its)


def _root(transaction: SessionTransaction) -> SessionTransaction:
    while transaction.parent is not None:
        transaction = transaction.parent
    return transaction


def _nested(session: Session) -> tuple[weakref.ref[SessionTransaction], ...]:
    """The open savepoints of the session, innermost first."""
    found = []
    transaction = session.get_nested_transaction()
    while transaction is not None:
        if transaction.nested:
            found.append(weakref.ref(transaction))
        transaction = transaction.parent
    return tuple(found)


def _open_connections(session: Session) -> list[sa.Connection]:
    """The connections that the session's transaction holds."""
    return [c for c in _connections.get(session, ()) if not c.closed and c.get_transaction() is not None]


def _likely_connection(
    session: Session, table: sa.Table, bind_arguments: Mapping[str, Any] | None
) -> sa.Connection | None:
    """Where a message belongs as far as can be said without asking for a connection."""
    held = _open_connections(session)
    if bind_arguments is None:
        if len(held) < 2:
            return held[0] if held else None
        writers = [connection for connection in held if connection.get_transaction() in _written]
        if len(writers) == 1:
            return writers[0]
    bind = _bind(session, table, bind_arguments)
    return None if bind is None else _through(held, bind)


def _bind(
    session: Session, table: sa.Table, bind_arguments: Mapping[str, Any] | None
) -> sa.Engine | sa.Connection | None:
    # An UPDATE, since the routing recipe of SQLAlchemy's documentation takes that for a write, and INSERT only in a flush.
    arguments = {"clause": sa.update(table)} if bind_arguments is None else dict(bind_arguments)
    try:
        return arguments.get("bind") or session.get_bind(**arguments)
    except sa.exc.UnboundExecutionError as error:
        if bind_arguments is None:
            return None
        raise TransactionError(f"bind_arguments resolve to no database: {error}") from error


def _through(held: list[sa.Connection], bind: sa.Engine | sa.Connection) -> sa.Connection | None:
    """The connection among these that goes to the same database."""
    pool = bind.engine.pool  # an engine with other execution options shares it
    return next((c for c in held if c is bind or c.engine.pool is pool), None)


def _refuse_unfit(connection: sa.Connection) -> None:
    if connection.closed or connection.invalidated:
        raise TransactionError("the connection is closed or lost: add the message while its transaction is open")
    transaction = connection.get_transaction()
    if transaction is not None and (not transaction.is_active or transaction in _prepared):
        raise TransactionError(
            "the connection's transaction is not active (it failed, was prepared or has ended): begin a new one"
        )
    _refuse_autocommit(connection)


def _refuse_autocommit(bind: sa.Connection | sa.Engine) -> None:
    level = bind.get_execution_options().get("isolation_level")
    if level is None:
        # create_engine(isolation_level=…) is kept here only, without a public name; asking the DBAPI instead would take
        # SQLite's documented "isolation_level = None plus our own BEGIN" for autocommit
        level = getattr(bind.dialect, "_on_connect_isolation_level", None)
    if level is None and bind.dialect.name == "postgresql" and isinstance(bind, sa.Connection):
        if getattr(bind.connection.dbapi_connection, "autocommit", False):  # connect_args={"autocommit": True}
            level = "AUTOCOMMIT"
    if level == "AUTOCOMMIT":
        raise TransactionError(
            "the connection is in autocommit mode, so a message could not commit together with your data: "
            "use a connection or engine with another isolation_level"
        )


# ---------------------------------------------------------------- what sessions tell us


def _after_begin(session: Session, transaction: SessionTransaction, connection: sa.Connection) -> None:
    held = _connections.setdefault(session, [])
    if not any(c is connection for c in held):
        held.append(connection)
    if transaction.nested:
        # The savepoint exists from here on, though what belongs to it may have been staged before.
        for row in _rows(connection):
            if any(nested() is transaction for nested in row.nested):
                row.stamp = _on_transaction[connection.get_transaction()].clock
        return
    rows = _on_session.pop(transaction, [])
    here, elsewhere = [], []
    for row in rows:
        ...


