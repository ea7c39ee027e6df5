"""How messages reach the transaction: staged by ``add``, inserted as one statement after the last flush before commit.

Why last: a position taken before the entity's row lock inverts the key's order under concurrency, and a flush may insert
the message before it updates the entity. Taken last, every lock of the transaction is held already, so for one entity
position order = lock order = commit order.

Where staged rows live: on the **connection's root transaction**, and on the session's root transaction while that has
no connection. They end with it. (Rows kept in ``session.info`` were lost, or sent though rolled back, on nine of the ways
a session can end: tests/staging/ has all of them.)

When they are inserted, twice over: in the session's ``before_commit``, after a flush, and in the engine's ``commit`` and
two-phase events, which also see what later listeners add and commits that go through the Connection.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from operator import attrgetter
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from outbox import _transactions as transactions
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

    __slots__ = (
        "bind_arguments",
        "message",
        "nested",
        "number",
        "parameters",
        "session",
        "stamp",
        "table",
        "unflushed",
    )

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

    def of(self, session: Session) -> bool:
        return self.session is not None and self.session() is session

    def within(self, savepoint: SessionTransaction) -> bool:
        return any(nested() is savepoint for nested in self.nested)


class _Staged:
    """The rows of one root transaction of a connection.

    ``clock`` counts its savepoints: a row's stamp says after which savepoint it was staged, so that rolling one back on
    the Core connection, which no session sees, takes exactly the rows staged since.
    """

    __slots__ = ("clock", "committed", "rows", "savepoints", "unflushed")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.savepoints: dict[str, int] = {}
        self.clock = 0
        self.unflushed = False  # some of the rows may be
        self.committed = False  # by a COMMIT that SQLAlchemy does not take for one


_on_transaction: weakref.WeakKeyDictionary[sa.RootTransaction, _Staged] = weakref.WeakKeyDictionary()
_on_session: weakref.WeakKeyDictionary[SessionTransaction, list[Row]] = weakref.WeakKeyDictionary()
_committing: weakref.WeakSet[SessionTransaction] = weakref.WeakSet()
_announced: weakref.WeakSet[SessionTransaction] = weakref.WeakSet()
_released: weakref.WeakSet[SessionTransaction] = weakref.WeakSet()

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
    table = messages[0][0]
    connection = transactions.likely_connection(session, table, bind_arguments)
    if connection is None and root in _committing:
        # by a listener that comes after ours; within the commit a connection may be asked for
        connection = transactions.connection_for(session, table, bind_arguments)
    if connection is not None:
        transactions.refuse_unfit(connection)
    elif isinstance(session.bind, sa.Engine):
        transactions.refuse_autocommit(session.bind)
    reference, nested = weakref.ref(session), transactions.savepoints_of(session)
    unflushed = bool(session.new or session.dirty or session.deleted)
    rows = [Row(built, reference, nested, bind_arguments, unflushed) for built in messages]
    if connection is None:
        _on_session.setdefault(root, []).extend(rows)
    else:
        _append(connection, rows)


def staged(session: Session) -> list[Message]:
    """What waits for this session's commit, in the order of ``add``."""
    root = session.get_transaction()
    return [] if root is None else [row.message for row in _waiting(session, root)]


def discard(session: Session, keep: Callable[[Message], bool]) -> int:
    """Take staged messages back before they were inserted; returns how many."""
    root = session.get_transaction()
    if root is None:
        return 0
    before = len(_waiting(session, root))
    _drop(session, root, lambda row: not keep(row.message))
    return before - len(_waiting(session, root))


def insert_now(session: Session) -> None:
    """Flush, then insert what this session has staged, without committing: what ``before_commit`` does."""
    root = session.get_transaction()
    if root is None or not (root in _on_session or any(_rows(c) for c in transactions.held(session))):
        return
    session.flush()
    _settle(session, root)
    for connection in transactions.held(session):
        _insert(connection, session)


def insert_at_once(connection: sa.Connection, messages: Sequence[Built]) -> None:
    """Insert on a Core connection, in its transaction (begun if need be). Raises `TransactionError`."""
    transactions.refuse_unfit(connection)
    _execute(connection, [Row(built) for built in messages])


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
        state.unflushed |= row.unflushed
    state.rows += rows


def _waiting(session: Session, root: SessionTransaction) -> list[Row]:
    """All rows of the session, in the order of ``add``."""
    rows = list(_on_session.get(root, ()))
    for connection in transactions.held(session):
        rows += [row for row in _rows(connection) if row.of(session)]
    rows.sort(key=_BY_NUMBER)
    return rows


def _drop(session: Session, root: SessionTransaction, gone: Callable[[Row], bool]) -> None:
    """Forget those rows of the session."""
    if root in _on_session:
        _on_session[root] = [row for row in _on_session[root] if not gone(row)]
    for connection in transactions.held(session):
        rows = _rows(connection)
        rows[:] = [row for row in rows if not (row.of(session) and gone(row))]


def _alike(rows: list[Row]) -> list[list[Row]]:
    """The rows by what decides through which connection they go, in the order of ``add``."""
    groups: dict[tuple[sa.Table, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.table, id(row.bind_arguments)), []).append(row)
    return list(groups.values())


def _attach(session: Session, root: SessionTransaction) -> None:
    """Put rows that waited for a connection onto theirs, if it is there by now."""
    placed = []
    for rows in _alike(_on_session.get(root, [])):
        connection = transactions.likely_connection(session, rows[0].table, rows[0].bind_arguments)
        if connection is not None:
            transactions.refuse_unfit(connection)
            placed.append((connection, rows))
    for connection, rows in placed:
        _append(connection, rows)
    done = {row for _, rows in placed for row in rows}
    if done:
        _on_session[root] = [row for row in _on_session[root] if row not in done]
        if not _on_session[root]:
            del _on_session[root]


def _settle(session: Session, root: SessionTransaction) -> None:
    """Put each row onto the connection that it commits with. Before the commit that is a guess: the only connection may
    have been a replica's, and the leader's came later."""
    connections = transactions.held(session)
    sole = root not in _on_session and len(connections) == 1 and not session.twophase
    if sole and transactions.has_written(connections[0]):
        return  # as nearly always
    moves: dict[sa.Connection, list[Row]] = {}
    for rows in _alike(_waiting(session, root)):
        connection = transactions.connection_for(session, rows[0].table, rows[0].bind_arguments)
        moves.setdefault(connection, []).extend(rows)
    _on_session.pop(root, None)
    _drop(session, root, lambda row: True)
    for connection, rows in moves.items():
        _append(connection, sorted(rows, key=_BY_NUMBER))


def _insert(connection: sa.Connection, session: Session | None = None) -> None:
    """Insert what is staged on this connection; forget it only once that succeeded. In the name of no session, that is
    for a commit that may have gone past it, rows stay with the changes that are not flushed."""
    state = _state(connection)
    if state is None or not state.rows:
        return
    if state.unflushed and session is None:
        for row in [row for row in state.rows if row.unflushed]:
            owner = row.session() if row.session is not None else None
            root = owner.get_transaction() if owner is not None else None
            if root is None or root not in _committing:
                state.rows.remove(row)
                if root is not None:
                    _on_session.setdefault(root, []).append(row)
    _execute(connection, state.rows)


@lru_cache(maxsize=64)
def _insert_into(table: sa.Table) -> sa.Insert:
    return table.insert().inline()  # nobody asks for the position: without RETURNING one message costs 60 µs less


def _execute(connection: sa.Connection, rows: list[Row]) -> None:
    """Insert the rows and take them off the list, one statement a table."""
    while rows:
        table = rows[0].table
        its = [row for row in rows if row.table is table]
        # a list of parameters, not .values([...]): that costs 74 µs a message to compile
        connection.execute(_insert_into(table), [row.parameters for row in its])
        rows[:] = [row for row in rows if row.table is not table]
        for callback in inserted:
            callback(its)


# ---------------------------------------------------------------- what sessions tell


def _after_begin(session: Session, transaction: SessionTransaction, connection: sa.Connection) -> None:
    transactions.join(session, connection)
    if not transaction.nested:
        _attach(session, transaction)
        return
    # Only now is there a SAVEPOINT; what belongs to it may have been staged before.
    state = _state(connection)
    if state is not None:
        for row in state.rows:
            if row.within(transaction):
                row.stamp = state.clock


def _after_flush_postexec(session: Session, context: Any) -> None:
    for connection in transactions.held(session):
        state = _state(connection)
        if state is not None and state.unflushed:
            for row in state.rows:
                row.unflushed = row.unflushed and not row.of(session)
            state.unflushed = any(row.unflushed for row in state.rows)
    root = session.get_transaction()
    if root is not None and root in _on_session:
        for row in _on_session[root]:
            row.unflushed = False
        _attach(session, root)


def _before_commit(session: Session) -> None:
    root = session.get_transaction()
    if root is None:
        return
    if not session.in_nested_transaction():
        _committing.add(root)
        try:
            insert_now(session)
        except BaseException:
            _committing.discard(root)
            raise
    elif root in _on_session and not transactions.held(session):
        # The event comes once when a savepoint is released, and twice when its root commits and it is still open: then
        # it never comes for the root, and a root without connection has no other commit. So it gets a connection.
        nested = session.get_nested_transaction()
        if nested is not None and nested not in _announced:
            _announced.add(nested)
            return
        row = _on_session[root][0]
        with suppress(TransactionError):
            transactions.connection_for(session, row.table, row.bind_arguments)


def _after_commit(session: Session) -> None:
    nested = session.get_nested_transaction()
    if nested is not None:
        _released.add(nested)
        return
    root = session.get_transaction()
    left = _on_session.pop(root, None) if root is not None else None
    if left and not transactions.has_held(session):
        raise TransactionError(
            f"{len(left)} messages were not inserted, since the session cannot tell which database they belong to: pass "
            "bind_arguments to add. Nothing else was in this transaction"
        )
    if left:
        _report_lost(left, "the session committed before it could tell through which of its connections they go")


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        # A connection given from outside goes on after the session: its owner's commit inserts what is staged there,
        # except beside changes that were never flushed and are gone now.
        _drop(session, transaction, lambda row: row.unflushed)
        _on_session.pop(transaction, None)
        transactions.part(session)
    elif transaction.nested and transaction not in _released:
        _drop(session, transactions.root_of(transaction), lambda row: row.within(transaction))


# ---------------------------------------------------------------- what engines tell


def _commit(connection: sa.Connection) -> None:
    _insert(connection)


def _prepare_twophase(connection: sa.Connection, xid: Any) -> None:
    _insert(connection)
    transactions.note_prepared(connection)


def _commit_twophase(connection: sa.Connection, xid: Any, is_prepared: bool) -> None:
    if not is_prepared:
        _insert(connection)


def _rollback(connection: sa.Connection) -> None:
    state = _state(connection)
    rows = [] if state is None else [row for row in state.rows if not row.unflushed]
    if state is None or not rows:
        return
    if state.committed or (transactions.has_written(connection) and transactions.no_transaction_is_open(connection)):
        _report_lost(
            rows, "the transaction was ended by raw COMMIT text or on the DBAPI connection, not by its session"
        )


def _savepoint(connection: sa.Connection, name: None) -> None:
    transactions.savepoint_begins(connection)  # its name is known once it is executed


def _release_savepoint(connection: sa.Connection, name: str, context: None) -> None:
    if transactions.savepoint_ends(connection):
        _insert(connection)


def _rollback_savepoint(connection: sa.Connection, name: str, context: None) -> None:
    transactions.savepoint_ends(connection)
    state = _state(connection)
    if state is not None:
        # a savepoint from before anything was staged here has no entry: everything came after it
        since = state.savepoints.get(name, 0)
        state.rows[:] = [row for row in state.rows if row.stamp < since]


def _after_cursor_execute(
    connection: sa.Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> None:
    verb, name = transactions.see_statement(connection, statement, context)
    if verb in ("SAVEPOINT", "COMMIT", "END"):
        state = _state(connection)
        if state is not None and verb == "SAVEPOINT":
            state.clock += 1
            state.savepoints[name] = state.clock
        elif state is not None:
            state.committed = any(not row.unflushed for row in state.rows)


def _report_lost(rows: list[Row], why: str) -> None:
    log.error(
        "%d staged messages were not inserted and will not be sent, though their data may be committed: %s. Message ids: %s",
        len(rows),
        why,
        ", ".join(str(row.message.id) for row in rows[:10]),
    )


_installed = False


def install() -> None:
    """Listen to every session and engine of the process; once. A transaction costs some 13 µs more, a statement 1 µs."""
    global _installed
    if _installed:
        return
    _installed = True
    for target, name, listener in (
        (Session, "after_begin", _after_begin),
        (Session, "after_flush_postexec", _after_flush_postexec),
        (Session, "before_commit", _before_commit),
        (Session, "after_commit", _after_commit),
        (Session, "after_transaction_end", _after_transaction_end),
        (sa.Engine, "after_cursor_execute", _after_cursor_execute),
        (sa.Engine, "savepoint", _savepoint),
        (sa.Engine, "release_savepoint", _release_savepoint),
        (sa.Engine, "rollback_savepoint", _rollback_savepoint),
        (sa.Engine, "rollback", _rollback),
        (sa.Engine, "commit", _commit),
        (sa.Engine, "prepare_twophase", _prepare_twophase),
        (sa.Engine, "commit_twophase", _commit_twophase),
    ):
        event.listen(target, name, listener)
