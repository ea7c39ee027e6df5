"""One message's transaction: claim, handler, outgoing messages. Written once, over a sync session; an async caller goes
through ``run_sync``.

Inbox row, effects and outgoing messages commit together or not at all. On databases with more than one writer the claim
comes first, so that of two processes the second waits and the handler runs once. **On SQLite it is read first and written
last**: written first it would hold the only write lock while the handler works.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session, SessionTransaction

from outbox._message import Message, declaration
from outbox._outbox import Outbox
from outbox._transactions import connection_for, undone_by_error
from outbox.consumer.attempts import Attempts
from outbox.consumer.binding import Handler
from outbox.consumer.incoming import Incoming
from outbox.dialects import MYSQL
from outbox.errors import TransactionError


class DatabaseTrouble(Exception):
    """The database failed, not the message: its cause says how. No attempt is spent."""


class NoRoom(DatabaseTrouble):
    """A disk is full, which no message is to blame for, however often it is tried."""


class Effect:
    """``claim`` when the transaction has begun, then the handler, then ``complete``; then the caller commits."""

    def __init__(self, outbox: Outbox, attempts: Attempts, incoming: Incoming, handler: Handler) -> None:
        self.outbox = outbox
        self.attempts = attempts
        self.incoming = incoming
        self.handler = handler
        self.connection: sa.Connection | None = None
        self.claimed = False
        self._root: SessionTransaction | None = None

    def claim(self, session: Session) -> bool:
        """Whether the message is to be handled. False: it is done, or a dead letter; what is left of it in ``attempt`` is
        deleted, so the caller commits all the same."""
        self._root = session.get_transaction()
        connection = self.connection = connection_for(session, self.outbox.tables.inbox)
        if connection.dialect.name == "sqlite":
            _begin_at_savepoint(connection)
            free = self._is_free(connection)
        else:
            free = self._claim(session)
        if not free and self.incoming.has_attempt_row:
            self.attempts.forget(connection, self.incoming)
        self.claimed = free
        _undone.discard(connection)
        return free

    def complete(self, session: Session, result: Any) -> bool:
        """After the handler: what it returned is added, and on SQLite the claim is written. False: another process was
        quicker, roll back. Raises `TransactionError` where the handler ended the transaction, TypeError for a result that
        is no message."""
        if self.connection in _undone:
            raise TransactionError(
                f"handler {self.handler.name} went on after an error with which the database had rolled back the whole "
                "transaction (a deadlock), the inbox row with it. Let such an exception through: the message is tried again"
            )
        if session.get_transaction() is not self._root or self._root is None or not self._root.is_active:
            raise TransactionError(
                f"handler {self.handler.name} ended the transaction (rollback, close or remove on its session), so effect "
                "and inbox row cannot commit together. Raise an exception to undo everything; begin_nested() undoes a part"
            )
        messages = outgoing(result, self.handler.name)
        if messages:
            self.outbox.add_all(session, messages)
        connection = connection_for(session, self.outbox.tables.inbox)
        if connection.dialect.name == "sqlite":
            session.flush()
            if not self._claim(session):
                return False
        if self.incoming.replay:
            self.attempts.handled_now(connection, self.incoming)
        if self.incoming.has_attempt_row:
            self.attempts.forget(connection, self.incoming)
        return True

    def _claim(self, session: Session) -> bool:
        cycle = self.incoming.cycle if self.incoming.replay else 0
        return self.outbox.claim(session, self.attempts.consumer, self.incoming.message.id, cycle=cycle)

    def _is_free(self, connection: sa.Connection) -> bool:
        inbox = self.outbox.tables.inbox
        query = sa.select(inbox.c.outcome, inbox.c.cycle).where(
            inbox.c.consumer == self.attempts.consumer, inbox.c.message_id == self.incoming.message.id
        )
        row = connection.execute(query).one_or_none()
        if self.incoming.replay:
            return row is not None and row.outcome == "dead" and row.cycle == self.incoming.cycle
        return row is None


def outgoing(result: Any, handler: str) -> list[object]:
    """What a handler returned, as messages: a declared one, a `Message`, a list or other iterable of them, or None.
    Raises TypeError for anything else."""
    if result is None:
        return []
    if _is_message(result):
        return [result]
    if isinstance(result, Iterable) and not isinstance(result, (str, bytes, dict)):
        messages = list(result)
        if all(_is_message(message) for message in messages):
            return messages
    raise TypeError(
        f"handler {handler} returned a {type(result).__name__}; it may return an object whose class is declared with @event, "
        "a Message, a list of them, or None"
    )


def _is_message(value: object) -> bool:
    return isinstance(value, Message) or declaration(type(value)) is not None


# ---------------------------------------------------------------- sessions that handlers must not commit

_guarded: weakref.WeakSet[Session] = weakref.WeakSet()


@contextmanager
def guarded(session: Session) -> Iterator[None]:
    """While the handler has the session, its commit is an error: what it wrote afterwards would not be in the transaction
    of its inbox row."""
    _guarded.add(session)
    try:
        yield
    finally:
        _guarded.discard(session)


def _before_commit(session: Session) -> None:
    if session in _guarded and not session.in_nested_transaction():
        raise TransactionError(
            "a handler does not commit its session: the consumer does, together with the inbox row. Use flush() to see "
            "generated values, begin_nested() for a part that may fail"
        )


# ---------------------------------------------------------------- what MySQL rolls back by itself

_undone: weakref.WeakSet[sa.Connection] = weakref.WeakSet()


def _handle_error(context: sa.engine.ExceptionContext) -> None:
    """InnoDB ends a deadlock by rolling back one transaction as a whole, and what its owner executes after that begins a
    new one: a handler that swallows the error would commit half an effect, without its inbox row."""
    connection = context.connection
    if connection is None or context.is_disconnect or connection.dialect.name not in MYSQL:
        return
    if undone_by_error(connection, context.original_exception):
        _undone.add(connection)


# ---------------------------------------------------------------- SQLite's savepoints

_begins_at_savepoint: weakref.WeakSet[sa.Connection] = weakref.WeakSet()


def _begin_at_savepoint(connection: sa.Connection) -> None:
    _begins_at_savepoint.add(connection)


def _savepoint(connection: sa.Connection, name: str) -> None:
    """Python's sqlite3 begins a transaction with the first write, not with a SAVEPOINT; the release of one outside a
    transaction is a commit, which would part the effect from its inbox row."""
    if connection in _begins_at_savepoint and not _in_transaction(connection):
        connection.exec_driver_sql("BEGIN")


def _in_transaction(connection: sa.Connection) -> bool:
    raw: Any = connection.connection.driver_connection
    # aiosqlite keeps the property too
    return bool(getattr(raw, "in_transaction", True))


def install() -> None:
    """Listen to every session and connection of the process; once."""
    if not sa.event.contains(Session, "before_commit", _before_commit):
        sa.event.listen(Session, "before_commit", _before_commit)
        # before staging looks at it: with a BEGIN in front its release is no commit
        sa.event.listen(sa.Engine, "savepoint", _savepoint, insert=True)
        sa.event.listen(sa.Engine, "handle_error", _handle_error)
