"""How messages reach the transaction: staged by ``add``, inserted together after the last flush before commit.

Why last: a position taken before the entity's row lock inverts the key's order under concurrency, and a flush may insert
the message before it updates the entity. Taken last, every lock of the transaction is held already, so for one entity
position order = lock order = commit order.

When they are inserted, twice over: in the session's ``before_commit``, after a flush, and in the engine's ``commit`` and
two-phase events, which also see what later listeners add and commits that go through the Connection.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from outbox import _transactions as transactions
from outbox._insert import AT_ONCE, insert
from outbox._message import Message
from outbox._refusals import advised
from outbox._rows import Built, Row, Staged, append, attach, drop, on_session, rows_on, settle, staged_on, waiting
from outbox.errors import TransactionError

log = logging.getLogger("outbox.staging")

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
        on_session.setdefault(root, []).extend(rows)
    else:
        append(connection, rows)


def staged(session: Session) -> list[Message]:
    """What waits for this session's commit, in the order of ``add``."""
    root = session.get_transaction()
    return [] if root is None else [row.message for row in waiting(session, root)]


def discard(session: Session, keep: Callable[[Message], bool]) -> int:
    """Take staged messages back before they were inserted; returns how many."""
    root = session.get_transaction()
    if root is None:
        return 0
    before = len(waiting(session, root))
    drop(session, root, lambda row: not keep(row.message))
    return before - len(waiting(session, root))


def insert_now(session: Session) -> None:
    """Flush, then insert what this session has staged, without committing: what ``before_commit`` does."""
    root = session.get_transaction()
    if root is None or not (root in on_session or any(rows_on(c) for c in transactions.held(session))):
        return
    session.flush()
    settle(session, root)
    for connection in transactions.held(session):
        _insert(connection, session)


def insert_at_once(connection: sa.Connection, messages: Sequence[Built]) -> None:
    """Insert on a Core connection, in its transaction (begun if need be). Raises `TransactionError`."""
    transactions.refuse_unfit(connection)
    _execute(connection, [Row(built) for built in messages])


def _begin(session: Session) -> SessionTransaction:
    if not session.autobegin:
        raise TransactionError("the session has no transaction (autobegin=False): call session.begin() first")
    try:
        return session.begin()
    except sa.exc.InvalidRequestError as error:
        raise TransactionError(f"the session cannot begin a transaction: {error}") from error


# ---------------------------------------------------------------- inserting


def _insert(connection: sa.Connection, session: Session | None = None) -> None:
    """Insert what is staged on this connection; forget it only once that succeeded. In the name of no session, that is
    for a commit that may have gone past it, rows stay with the changes that are not flushed."""
    state = staged_on(connection)
    if state is None:
        return
    if state.undone:
        raise TransactionError(
            "the database rolled back this transaction when its messages were inserted: nothing of it can be committed. "
            "Roll back, and do it again"
        )
    if not state.rows:
        return
    if state.unflushed and session is None:
        for row in [row for row in state.rows if row.unflushed]:
            owner = row.session() if row.session is not None else None
            root = owner.get_transaction() if owner is not None else None
            if root is None or root not in _committing:
                state.rows.remove(row)
                if root is not None:
                    on_session.setdefault(root, []).append(row)
    state.inserting = True
    try:
        _execute(connection, state.rows)
    finally:
        state.inserting = False


def _execute(connection: sa.Connection, rows: list[Row]) -> None:
    """Insert the rows, one table after the other, and take them off the list: what a failure leaves is still there."""
    while rows:
        table = rows[0].table
        its = [row for row in rows if row.table is table]
        done: set[Row] = set()
        try:
            for start in range(0, len(its), AT_ONCE):
                batch = its[start : start + AT_ONCE]
                with advised():
                    insert(connection, table, [row.parameters for row in batch])
                done.update(batch)
                for callback in inserted:
                    callback(batch)
        finally:
            rows[:] = [row for row in rows if row not in done]


# ---------------------------------------------------------------- what sessions tell


def _after_begin(session: Session, transaction: SessionTransaction, connection: sa.Connection) -> None:
    transactions.join(session, connection)
    if not transaction.nested:
        attach(session, transaction)
        return
    # Only now is there a SAVEPOINT; what belongs to it may have been staged before.
    state = staged_on(connection)
    if state is not None:
        for row in state.rows:
            if row.within(transaction):
                row.stamp = state.clock


def _after_flush_postexec(session: Session, context: Any) -> None:
    for connection in transactions.held(session):
        state = staged_on(connection)
        if state is not None and state.unflushed:
            for row in state.rows:
                row.unflushed = row.unflushed and not row.of(session)
            state.unflushed = any(row.unflushed for row in state.rows)
    root = session.get_transaction()
    if root is not None and root in on_session:
        for row in on_session[root]:
            row.unflushed = False
        attach(session, root)


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
    elif root in on_session and not transactions.held(session):
        # The event comes once when a savepoint is released, and twice when its root commits and it is still open: then
        # it never comes for the root, and a root without connection has no other commit. So it gets a connection.
        nested = session.get_nested_transaction()
        if nested is not None and nested not in _announced:
            _announced.add(nested)
            return
        row = on_session[root][0]
        with suppress(TransactionError):
            transactions.connection_for(session, row.table, row.bind_arguments)


def _after_commit(session: Session) -> None:
    nested = session.get_nested_transaction()
    if nested is not None:
        _released.add(nested)
        return
    root = session.get_transaction()
    left = on_session.pop(root, None) if root is not None else None
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
        drop(session, transaction, lambda row: row.unflushed)
        on_session.pop(transaction, None)
        transactions.part(session)
    elif transaction.nested and transaction not in _released:
        drop(session, transactions.root_of(transaction), lambda row: row.within(transaction))


# ---------------------------------------------------------------- what engines tell


# SQLAlchemy takes a transaction for ended whose commit has failed, and sends no rollback: it is still open where the failure
# is that of our insert, and whoever has the connection next would commit the data without its messages.


def _commit(connection: sa.Connection) -> None:
    try:
        _insert(connection)
    except BaseException:
        with suppress(Exception):
            connection.dialect.do_rollback(connection.connection)
        raise


def _prepare_twophase(connection: sa.Connection, xid: Any) -> None:
    _insert(connection)
    transactions.note_prepared(connection)


def _commit_twophase(connection: sa.Connection, xid: Any, is_prepared: bool) -> None:
    if is_prepared:
        return
    try:
        _insert(connection)
    except BaseException:
        with suppress(Exception):
            connection.dialect.do_rollback_twophase(connection, xid, is_prepared=False)
        raise


def _rollback(connection: sa.Connection) -> None:
    state = staged_on(connection)
    rows = [] if state is None else [row for row in state.rows if not row.unflushed]
    if state is None or not rows:
        return
    if state.committed or (transactions.has_written(connection) and transactions.no_transaction_is_open(connection)):
        why = "raw COMMIT text or on the DBAPI connection, not by its session"
        if transactions.was_committed_by_a_savepoint(connection):
            why = "SQLite, with its first savepoint (docs/guide.md, SQLite)"
        elif state.by_ddl:
            why = "MySQL, which commits before DDL (docs/guide.md, MySQL and MariaDB)"
        _report_lost(rows, f"the transaction was ended by {why}")


def _savepoint(connection: sa.Connection, name: None) -> None:
    transactions.savepoint_begins(connection)  # its name is known once it is executed


def _release_savepoint(connection: sa.Connection, name: str, context: None) -> None:
    if transactions.savepoint_ends(connection):
        _insert(connection)
        transactions.committed_by_a_savepoint(connection)


def _rollback_savepoint(connection: sa.Connection, name: str, context: None) -> None:
    transactions.savepoint_ends(connection)
    state = staged_on(connection)
    if state is not None:
        # a savepoint from before anything was staged here has no entry: everything came after it
        since = state.savepoints.get(_savepoint_name(name), 0)
        state.rows[:] = [row for row in state.rows if row.stamp < since]


def _after_cursor_execute(
    connection: sa.Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> None:
    word, rest = transactions.see_statement(connection, statement, context)
    if not word:
        return
    state = staged_on(connection)
    if state is None:
        return
    if word == "SAVEPOINT":
        state.clock += 1
        state.savepoints[_savepoint_name(rest)] = state.clock
    elif transactions.commits(connection, word, rest):
        _note_committed(state, word)
    elif (savepoint := transactions.rolls_back(word, rest)) is not None:
        _roll_back(connection, state, savepoint)


def _handle_error(context: sa.engine.ExceptionContext) -> None:
    connection = context.connection
    state = staged_on(connection) if connection is not None and not context.is_disconnect else None
    if connection is None or state is None or not state.rows or state.committed:
        return
    if transactions.undone_by_error(connection, context.original_exception):
        state.undone = state.inserting
        _roll_back(connection, state)
        return
    word, rest = transactions.first_word(context.statement or "")
    if transactions.commits(connection, word, rest) and word not in ("COMMIT", "END"):
        _note_committed(state, word)


def _note_committed(state: Staged, word: str) -> None:
    state.committed = any(not row.unflushed for row in state.rows)
    state.by_ddl = word not in ("COMMIT", "END")


def _roll_back(connection: sa.Connection, state: Staged, savepoint: str = "") -> None:
    """By the database or raw text: takes what was staged since, and leaves what is not flushed to the next commit."""
    since = 0
    if savepoint:
        since = state.savepoints.get(_savepoint_name(savepoint), 0)
    else:
        transactions.forget_writes(connection)
    state.rows[:] = [row for row in state.rows if row.unflushed or row.stamp < since]


def _savepoint_name(text: str) -> str:
    """The first word, as a database that folds names reads it."""
    return text.partition("/")[0].strip().strip('"`').casefold()


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
        (sa.Engine, "handle_error", _handle_error),
        (sa.Engine, "savepoint", _savepoint),
        (sa.Engine, "release_savepoint", _release_savepoint),
        (sa.Engine, "rollback_savepoint", _rollback_savepoint),
        (sa.Engine, "rollback", _rollback),
        (sa.Engine, "commit", _commit),
        (sa.Engine, "prepare_twophase", _prepare_twophase),
        (sa.Engine, "commit_twophase", _commit_twophase),
    ):
        event.listen(target, name, listener)


__all__ = ["Built", "Row", "discard", "insert_at_once", "insert_now", "inserted", "install", "stage", "staged"]
