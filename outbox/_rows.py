"""Staged rows, and where they are: on the **connection's root transaction**, and on the session's root transaction while
that has no connection. They end with it.

Rows kept in ``session.info`` were lost, or sent though rolled back, on nine of the ways a session can end: tests/staging/
has all of them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session, SessionTransaction

from outbox import _transactions as transactions
from outbox._message import Message
from outbox.errors import TransactionError

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


class Staged:
    """The rows of one root transaction of a connection.

    ``clock`` counts its savepoints: a row's stamp says after which savepoint it was staged, so that rolling one back on
    the Core connection, which no session sees, takes exactly the rows staged since.
    """

    __slots__ = ("by_ddl", "clock", "committed", "inserting", "rows", "savepoints", "undone", "unflushed")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.savepoints: dict[str, int] = {}
        self.clock = 0
        self.unflushed = False  # some of the rows may be
        self.committed = False  # by a statement that SQLAlchemy does not take for a commit
        self.by_ddl = False  # and that was not COMMIT itself
        self.inserting = False
        self.undone = False  # by the database, when these rows were inserted


on_transaction: weakref.WeakKeyDictionary[sa.RootTransaction, Staged] = weakref.WeakKeyDictionary()
on_session: weakref.WeakKeyDictionary[SessionTransaction, list[Row]] = weakref.WeakKeyDictionary()


def staged_on(connection: sa.Connection) -> Staged | None:
    """What is staged on the connection's transaction, if anything ever was."""
    transaction = None if connection.closed else connection.get_transaction()
    return None if transaction is None else on_transaction.get(transaction)


def rows_on(connection: sa.Connection) -> list[Row]:
    state = staged_on(connection)
    return [] if state is None else state.rows


def append(connection: sa.Connection, rows: list[Row]) -> None:
    """Put rows onto the connection's transaction. Raises `TransactionError` where there is none."""
    transaction = connection.get_transaction()
    if transaction is None:
        raise TransactionError("the connection has no open transaction that the message could belong to")
    state = on_transaction.get(transaction)
    if state is None:
        state = on_transaction[transaction] = Staged()
    for row in rows:
        row.stamp = state.clock
        state.unflushed |= row.unflushed
    state.rows += rows


def waiting(session: Session, root: SessionTransaction) -> list[Row]:
    """All rows of the session, in the order of ``add``."""
    rows = list(on_session.get(root, ()))
    for connection in transactions.held(session):
        rows += [row for row in rows_on(connection) if row.of(session)]
    rows.sort(key=_BY_NUMBER)
    return rows


def drop(session: Session, root: SessionTransaction, gone: Callable[[Row], bool]) -> None:
    """Forget those rows of the session."""
    if root in on_session:
        on_session[root] = [row for row in on_session[root] if not gone(row)]
    for connection in transactions.held(session):
        rows = rows_on(connection)
        rows[:] = [row for row in rows if not (row.of(session) and gone(row))]


def _alike(rows: list[Row]) -> list[list[Row]]:
    """The rows by what decides through which connection they go, in the order of ``add``."""
    groups: dict[tuple[sa.Table, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.table, id(row.bind_arguments)), []).append(row)
    return list(groups.values())


def attach(session: Session, root: SessionTransaction) -> None:
    """Put rows that waited for a connection onto theirs, if it is there by now."""
    placed = []
    for rows in _alike(on_session.get(root, [])):
        connection = transactions.likely_connection(session, rows[0].table, rows[0].bind_arguments)
        if connection is not None:
            transactions.refuse_unfit(connection)
            placed.append((connection, rows))
    for connection, rows in placed:
        append(connection, rows)
    done = {row for _, rows in placed for row in rows}
    if done:
        on_session[root] = [row for row in on_session[root] if row not in done]
        if not on_session[root]:
            del on_session[root]


def settle(session: Session, root: SessionTransaction) -> None:
    """Put each row onto the connection that it commits with. Before the commit that is a guess: the only connection may
    have been a replica's, and the leader's came later."""
    connections = transactions.held(session)
    sole = root not in on_session and len(connections) == 1 and not session.twophase
    if sole and transactions.has_written(connections[0]):
        return  # as nearly always
    moves: dict[sa.Connection, list[Row]] = {}
    for rows in _alike(waiting(session, root)):
        connection = transactions.connection_for(session, rows[0].table, rows[0].bind_arguments)
        moves.setdefault(connection, []).extend(rows)
    on_session.pop(root, None)
    drop(session, root, lambda row: True)
    for connection, rows in moves.items():
        append(connection, sorted(rows, key=_BY_NUMBER))
