"""What a test's code added to the outbox, seen as it is inserted: no relay, no second connection."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.sql.elements import SavepointClause

from outbox import encoding, staging
from outbox._message import Message, declaration
from outbox._outbox import Outbox
from outbox.errors import ConfigurationError
from outbox.staging import Row

T = TypeVar("T")


class Captured:
    """The messages that were inserted since, in that order, without those that were rolled back. What is staged in a
    session that has not committed is not among them: `Outbox.staged` shows that."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._entries: list[_Entry] = []

    @property
    def all(self) -> list[Message]:
        return [entry.message for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Message]:
        return iter(self.all)

    def __repr__(self) -> str:
        return f"<captured: {_listed(self.all)}>"

    def topic(self, topic: str) -> list[Message]:
        """The messages of a topic."""
        return [message for message in self.all if message.topic == topic]

    def of(self, event: type[T]) -> list[T]:
        """The messages of a declared class, decoded. Raises `DecodingError`, as a consumer of that class would."""
        declared = declaration(event)
        if declared is None:
            raise ConfigurationError(f"{event.__name__} is not declared: decorate it with @event(topic, type=…)")
        return [
            encoding.decode(message.payload, message.content_type, event, self._outbox.codec)
            for message in self.all
            if (message.topic, message.type) == (declared.topic, declared.type)
        ]

    def one(self, event: type[T]) -> T:
        """The only message of a declared class, decoded. Raises AssertionError where there is none, or more than one."""
        found = self.of(event)
        if len(found) != 1:
            raise AssertionError(f"{len(found)} messages are {event.__name__}, not one; captured: {_listed(self.all)}")
        return found[0]


class _Entry:
    """A captured message, and the connection whose rollback would take it away: None once that has committed."""

    __slots__ = ("connection", "message")

    def __init__(self, message: Message, connection: sa.Connection | None) -> None:
        self.message = message
        self.connection = connection


@contextmanager
def capture(outbox: Outbox) -> Iterator[Captured]:
    """``with capture(outbox) as sent:`` collects what is added to this outbox meanwhile, in any thread, session or event
    loop of this process, by sync and async code. It works inside a fixture that rolls everything back (a connection with
    an outer transaction, and ``Session(bind=connection, join_transaction_mode="create_savepoint")``): what counts there is
    the session's commit. What went through a driver's own connection stays captured if that is rolled back: it does not
    tell.
    """
    captured = Captured(outbox)
    watch = _Watch(outbox, captured._entries)
    staging.inserted.append(watch.inserted)
    listeners: list[tuple[str, Callable[..., None]]] = [
        ("after_execute", watch.executed),
        ("commit", watch.committed),
        ("rollback", watch.rolled_back),
        ("rollback_savepoint", watch.savepoint_rolled_back),
    ]
    for name, listener in listeners:
        sa.event.listen(sa.Engine, name, listener)
    try:
        yield captured
    finally:
        for name, listener in listeners:
            sa.event.remove(sa.Engine, name, listener)
        staging.inserted.remove(watch.inserted)


class _Watch:
    """Follows the connections that messages are inserted through."""

    def __init__(self, outbox: Outbox, entries: list[_Entry]) -> None:
        self._tables = (outbox.tables.message, outbox.tables.scheduled)
        self._entries = entries
        self._inserting = threading.local()
        # of each connection: how much was captured when a savepoint began
        self._savepoints: weakref.WeakKeyDictionary[sa.Connection, dict[str, set[_Entry]]] = weakref.WeakKeyDictionary()

    def executed(self, connection: sa.Connection, statement: Any, *rest: Any) -> None:
        if isinstance(statement, sa.Insert):
            if statement.table in self._tables:
                # followed at once, in the same thread, by `inserted`
                self._inserting.connection = connection
        elif isinstance(statement, SavepointClause):
            # the event of that name comes before the savepoint has one
            self._savepoints.setdefault(connection, {})[statement.ident] = set(self._entries)

    def inserted(self, rows: list[Row]) -> None:
        connection = getattr(self._inserting, "connection", None)
        self._entries += [_Entry(row.message, connection) for row in rows if row.table in self._tables]
        self._inserting.connection = None

    def committed(self, connection: sa.Connection) -> None:
        for entry in self._entries:
            if entry.connection is connection:
                entry.connection = None

    def rolled_back(self, connection: sa.Connection) -> None:
        self._entries[:] = [entry for entry in self._entries if entry.connection is not connection]

    def savepoint_rolled_back(self, connection: sa.Connection, name: str, context: None) -> None:
        before = self._savepoints.get(connection, {}).get(name, set())
        self._entries[:] = [entry for entry in self._entries if entry.connection is not connection or entry in before]


def _listed(messages: list[Message]) -> str:
    if not messages:
        return "nothing"
    return ", ".join(f"{message.topic}/{message.type or '(no type)'} key={message.key}" for message in messages)
