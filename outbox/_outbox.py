"""`Outbox`: the tables, and what an application does with them in its own transaction."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, overload

import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import _ddl, _statements, encoding, staging
from outbox._awaited import Awaited
from outbox._building import Builder
from outbox._message import ABSENT, Key, Message, _Absent
from outbox._where import AsyncWhere, SyncWhere, Where, awork, put, resolve, resolve_async, run, session_of
from outbox.errors import ConfigurationError
from outbox.tables import PREFIX, Tables, tables_for


class Outbox:
    """The outbox of one database: its tables, and ``add``.

    ``metadata``: yours, so that Alembic's autogenerate and ``create_all`` see the tables; None makes one of its own.
    ``schema``, ``prefix``: where the tables are; the schema defaults to the metadata's. A second ``Outbox`` on the same
    metadata with the same names is the same tables. ``codec``: how payloads become bytes, JSON by default.

    Raises `ConfigurationError` for a schema or prefix that is no identifier.
    """

    def __init__(
        self,
        metadata: sa.MetaData | None = None,
        *,
        schema: str | None = None,
        prefix: str = PREFIX,
        codec: encoding.Codec | None = None,
    ) -> None:
        given: object = metadata
        if given is not None and not isinstance(given, sa.MetaData):
            name = getattr(given, "__name__", type(given).__name__)
            has_one = isinstance(getattr(given, "metadata", None), sa.MetaData)
            raise ConfigurationError(
                f"Outbox() takes a MetaData, not {name}" + (f"; did you mean {name}.metadata?" if has_one else "")
            )
        self.tables: Tables = tables_for(metadata if metadata is not None else sa.MetaData(), schema, prefix)
        self.codec: encoding.Codec = codec or encoding.DEFAULT
        self._rows = Builder(self.tables, self.codec)
        staging.install()

    def __repr__(self) -> str:
        return f"Outbox(schema={self.tables.schema!r}, prefix={self.tables.prefix!r})"

    @property
    def metadata(self) -> sa.MetaData:
        return self.tables.metadata

    def ddl(self, dialect: str) -> str:
        """The tables as an SQL script for ``"postgresql"``, ``"mysql"``, ``"mariadb"`` or ``"sqlite"``: what ``create_all``
        would execute, with the rows that the tables begin with. To be run once, by the database's own client or in a
        migration of another framework; it begins and commits no transaction. Raises `ConfigurationError`."""
        return _ddl.script(self.tables, dialect)

    @overload
    def add(
        self,
        where: Where,
        topic: str,
        payload: Any,
        *,
        key: Key | _Absent = ABSENT,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
        deliver_at: dt.datetime | dt.timedelta | None = None,
        id: uuid.UUID | None = None,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> Message: ...

    @overload
    def add(
        self,
        where: Where,
        event: object,
        /,
        *,
        headers: Mapping[str, str] | None = None,
        deliver_at: dt.datetime | dt.timedelta | None = None,
        id: uuid.UUID | None = None,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> Message: ...

    def add(
        self,
        where: Where,
        topic: Any,
        payload: Any = ABSENT,
        *,
        key: Any = ABSENT,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
        deliver_at: dt.datetime | dt.timedelta | None = None,
        id: uuid.UUID | None = None,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> Message:
        """Add a message to the transaction of ``where``; it is sent if and only if that commits.

        ``add(where, topic, payload, …)``, or ``add(where, event)`` for an object whose class is declared with ``@event``;
        as the payload of another topic such an object keeps its type and key, unless others are given.
        The call is the same for sync and async sessions, without ``await``, and for a driver's own sync connection:
        psycopg, psycopg2, sqlite3, PyMySQL, mysqlclient, and Django's. An async connection takes `aadd`.

        On a session the message is staged, and inserted as the last statement before the commit, after every lock of the
        transaction: so messages of one key are delivered in the order in which their transactions took the entity's
        lock. It goes through the connection that the transaction holds; where that holds several, ``bind_arguments``
        (as for `Session.connection`) say which. On a connection it is inserted at once: call it after the statements
        that lock.

        ``payload``: bytes go as they are, None is a tombstone, anything else is encoded here and now. ``key``: str, int
        or UUID; an explicit None raises, since it is mostly an id that was not flushed yet. ``deliver_at``: an aware
        datetime, or a timedelta from now.

        Returns the `Message`, with its ``id`` and without ``position``. Raises `EncodingError` (payload, key, topic or
        headers), `TransactionError` (no open transaction, autocommit), `TypeError` (no session or connection): nothing is
        staged then; a driver's own errors come as they are. A process that dies before the commit leaves nothing; after
        it the row is there.
        """
        target = resolve(where, "add")
        built = self._rows.one(
            topic,
            payload,
            key=key,
            type=type,
            headers=headers,
            content_type=content_type,
            deliver_at=deliver_at,
            id=id,
        )
        put(target, [built], bind_arguments)
        return built[2]

    def add_all(
        self, where: Where, messages: Iterable[object], *, bind_arguments: Mapping[str, Any] | None = None
    ) -> list[Message]:
        """Add many messages at once: objects of declared classes, `Message` objects, or mappings of `add`'s arguments
        (``{"topic": …, "payload": …, "key": …}``). All of them or, if one cannot be encoded, none."""
        target = resolve(where, "add_all")
        built = self._rows.many(messages)
        if built:
            put(target, built, bind_arguments)
        return [message for _, _, message in built]

    def staged(self, where: Where | AsyncWhere) -> list[Message]:
        """The messages that wait for the commit of this session, in order. Empty on a connection: there they are rows."""
        session = session_of(where)
        return [] if session is None else staging.staged(session)

    def cancel(
        self,
        where: SyncWhere,
        id: uuid.UUID,
        *,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> bool:
        """Take back a message that is not due yet (``deliver_at``), in the caller's transaction. True if it was still
        there: then it is never sent, if that transaction commits. A message staged in this transaction goes too.

        Sync only; async: `acancel`, or ``await session.run_sync(outbox.cancel, id)``.
        """
        target = resolve(where, "cancel", sync_only=True)
        statement = _statements.cancel(self.tables, id)
        if isinstance(target, Session) and staging.discard(target, lambda message: message.id != id):
            return True
        return run(target, statement, bind_arguments) > 0

    def claim(
        self,
        where: SyncWhere,
        consumer: str,
        message_id: uuid.UUID | str,
        *,
        cycle: int = 0,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> bool:
        """Write the inbox row of a message into the transaction of its effect. True: do the effect; False: it is done
        already (or a dead letter), skip it.

        One ``INSERT … ON CONFLICT DO NOTHING``: of two transactions at once, the second waits for the first to end.
        ``message_id``: a UUID or its text; other text is mapped to a UUID. ``cycle`` > 0 claims a replay of a dead letter.

        Sync only; async: `aclaim`, or ``await session.run_sync(outbox.claim, "billing", id)``. An ``AsyncSession`` given
        directly raises `TypeError`, because a forgotten ``await`` would be true for ever. On an autocommit connection it
        raises `TransactionError`: the row could not commit together with the effect.
        """
        target = resolve(where, "claim", sync_only=True)
        return run(target, _statements.claim(self.tables, consumer, message_id, cycle), bind_arguments) == 1

    # ------------------------------------------------------------ the same with an await

    @overload
    def aadd(
        self,
        where: AsyncWhere,
        topic: str,
        payload: Any,
        *,
        key: Key | _Absent = ABSENT,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
        deliver_at: dt.datetime | dt.timedelta | None = None,
        id: uuid.UUID | None = None,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, Message]: ...

    @overload
    def aadd(
        self,
        where: AsyncWhere,
        event: object,
        /,
        *,
        headers: Mapping[str, str] | None = None,
        deliver_at: dt.datetime | dt.timedelta | None = None,
        id: uuid.UUID | None = None,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, Message]: ...

    def aadd(
        self,
        where: Any,
        topic: Any,
        payload: Any = ABSENT,
        *,
        bind_arguments: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Coroutine[Any, Any, Message]:
        """`add` with ``await``, for an async driver's own connection: asyncpg, psycopg, aiosqlite, asyncmy,
        Tortoise's; also for an ``AsyncConnection`` or ``AsyncSession``. The message is inserted at once (a session stages
        it): call it after the statements that lock.

        What `add` raises, it raises without the await for the message, and when awaited for the transaction. **Without
        the await nothing is written**, and the transaction commits without its message: type checkers find that
        (mypy's unused-coroutine, pyright's reportUnusedCoroutine), Python warns, and the log has an error with the
        message's id.
        """
        target = resolve_async(where, "aadd")
        built = self._rows.one(topic, payload, **arguments)

        async def insert() -> Message:
            await awork(target, [built], lambda sync: put(sync, [built], bind_arguments))
            return built[2]

        return Awaited(insert(), "aadd", f"message {built[2].id} for {built[2].topic!r} is not written")

    def aadd_all(
        self, where: AsyncWhere, messages: Iterable[object], *, bind_arguments: Mapping[str, Any] | None = None
    ) -> Coroutine[Any, Any, list[Message]]:
        """`add_all` with ``await``, as `aadd`."""
        target = resolve_async(where, "aadd_all")
        built = self._rows.many(messages)

        async def insert() -> list[Message]:
            if built:
                await awork(target, built, lambda sync: put(sync, built, bind_arguments))
            return [message for _, _, message in built]

        return Awaited(insert(), "aadd_all", f"{len(built)} messages are not written")

    def acancel(
        self, where: AsyncWhere, id: uuid.UUID, *, bind_arguments: Mapping[str, Any] | None = None
    ) -> Coroutine[Any, Any, bool]:
        """`cancel` with ``await``, for what `aadd` takes."""
        target = resolve_async(where, "acancel")
        statement = _statements.cancel(self.tables, id)

        async def delete() -> bool:
            found = await awork(target, statement, lambda sync: self.cancel(sync, id, bind_arguments=bind_arguments))
            return bool(found)

        return Awaited(delete(), "acancel", f"message {id} is sent when it is due")

    def aclaim(
        self,
        where: AsyncWhere,
        consumer: str,
        message_id: uuid.UUID | str,
        *,
        cycle: int = 0,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, bool]:
        """`claim` with ``await``, for what `aadd` takes. Without the await its result is neither true nor false: asking
        raises `TypeError`."""
        target = resolve_async(where, "aclaim")
        statement = _statements.claim(self.tables, consumer, message_id, cycle)

        async def claim() -> bool:
            return bool(await awork(target, statement, lambda sync: run(sync, statement, bind_arguments)))

        return Awaited(claim(), "aclaim", f"message {message_id} is not claimed for {consumer!r}")


__all__ = ["Outbox", "Where"]
