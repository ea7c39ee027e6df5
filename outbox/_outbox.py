"""`Outbox`: the tables, and what an application does with them in its own transaction."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias, overload

import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.util import ScopedRegistry

from outbox import _transactions as transactions
from outbox import encoding, staging
from outbox._message import (
    ABSENT,
    VERSION_HEADER,
    Declaration,
    Key,
    Message,
    _Absent,
    bucket_of,
    check_content_type,
    check_headers,
    check_topic,
    check_type,
    declaration,
    key_text,
    message_id,
    new_id,
)
from outbox.dialects import clock, insert_if_absent
from outbox.errors import ConfigurationError, EncodingError
from outbox.tables import CONSUMER_LENGTH, Tables, tables_for

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

Where: TypeAlias = "Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any] | sa.Connection"


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
        prefix: str = "outbox_",
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
        staging.install()

    def __repr__(self) -> str:
        return f"Outbox(schema={self.tables.schema!r}, prefix={self.tables.prefix!r})"

    @property
    def metadata(self) -> sa.MetaData:
        return self.tables.metadata

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

        ``add(where, topic, payload, …)``, or ``add(where, event)`` for an object whose class is declared with ``@event``.
        The call is the same for sync and async sessions, without ``await``.

        On a session the message is staged, and inserted as the last statement before the commit, after every lock of the
        transaction: so messages of one key are delivered in the order in which their transactions took the entity's
        lock. It goes through the connection that the transaction holds; where that holds several, ``bind_arguments``
        (as for `Session.connection`) say which. On a Core ``Connection`` it is inserted at once: call it after the
        statements that lock.

        ``payload``: bytes go as they are, None is a tombstone, anything else is encoded here and now. ``key``: str, int
        or UUID; an explicit None raises, since it is mostly an id that was not flushed yet. ``deliver_at``: an aware
        datetime, or a timedelta from now.

        Returns the `Message`, with its ``id`` and without ``position``. Raises `EncodingError` (payload, key, topic or
        headers), `TransactionError` (no open transaction), `TypeError` (no session or connection): nothing is staged
        then. A process that dies before the commit leaves nothing; after it the row is there.
        """
        target = _resolve(where)
        if payload is ABSENT:
            declared = _declared(topic)
            if key is not ABSENT or type is not None or content_type is not None:
                raise TypeError(
                    f"add(…, {topic.__class__.__name__}): topic, key and type come from its @event declaration"
                )
            built = self._build_event(topic, declared, headers, deliver_at, id)
        else:
            built = self._build(topic, payload, key, type, headers, content_type, deliver_at, id)
        _put(target, [built], bind_arguments)
        return built[2]

    def add_all(
        self, where: Where, messages: Iterable[object], *, bind_arguments: Mapping[str, Any] | None = None
    ) -> list[Message]:
        """Add many messages at once: objects of declared classes, `Message` objects, or mappings of `add`'s arguments
        (``{"topic": …, "payload": …, "key": …}``). All of them or, if one cannot be encoded, none."""
        target = _resolve(where)
        built: list[staging.Built] = []
        for message in messages:
            if type(message) is dict or (isinstance(message, Mapping) and declaration(type(message)) is None):
                if not _REQUIRED <= message.keys() <= _ARGUMENTS:
                    raise TypeError(
                        f"add_all: a mapping needs 'topic' and 'payload' and may have {sorted(_ARGUMENTS)}; got "
                        f"{sorted(map(str, message))}"
                    )
                built.append(self._build(**message))
            elif isinstance(message, Message):
                built.append(self._build_message(message))
            else:
                built.append(self._build_event(message, _declared(message), None, None, None))
        if built:
            _put(target, built, bind_arguments)
        return [message for _, _, message in built]

    def staged(self, where: Where) -> list[Message]:
        """The messages that wait for the commit of this session, in order. Empty on a Connection: there they are rows."""
        target = _resolve(where)
        return staging.staged(target) if isinstance(target, Session) else []

    def cancel(
        self,
        where: Session | scoped_session[Any] | sa.Connection,
        id: uuid.UUID,
        *,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> bool:
        """Take back a message that is not due yet (``deliver_at``), in the caller's transaction. True if it was still
        there: then it is never sent, if that transaction commits. A message staged in this transaction goes too.

        Sync only; async: ``await session.run_sync(outbox.cancel, id)``.
        """
        target = _resolve(where, sync_only="cancel")
        if not isinstance(id, uuid.UUID):
            raise TypeError(f"cancel takes the message's id, a UUID, not {id.__class__.__name__}")
        if isinstance(target, Session) and staging.discard(target, lambda message: message.id != id):
            return True
        scheduled = self.tables.scheduled
        connection = _connection(target, scheduled, bind_arguments)
        return connection.execute(sa.delete(scheduled).where(scheduled.c.id == id)).rowcount > 0

    def claim(
        self,
        where: Session | scoped_session[Any] | sa.Connection,
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

        Sync only; async: ``await session.run_sync(outbox.claim, "billing", id)``. An ``AsyncSession`` given directly
        raises `TypeError`, because a forgotten ``await`` would be true for ever. On an autocommit connection it raises
        `TransactionError`: the row could not commit together with the effect.
        """
        target = _resolve(where, sync_only="claim")
        if not isinstance(consumer, str) or not 0 < len(consumer) <= CONSUMER_LENGTH or "\x00" in consumer:
            raise ConfigurationError(f"consumer {consumer!r}: a name of 1 to {CONSUMER_LENGTH} characters")
        id = _message_id(message_id)
        if not isinstance(cycle, int) or cycle < 0:
            raise TypeError(f"claim: cycle={cycle!r}; it is the number in the header outbox-cycle, 0 without one")
        inbox = self.tables.inbox
        connection = _connection(target, inbox, bind_arguments)
        if cycle:
            replay = (
                sa.update(inbox)
                .where(
                    inbox.c.consumer == consumer,
                    inbox.c.message_id == id,
                    inbox.c.outcome == "dead",
                    inbox.c.cycle == cycle,
                )
                .values(outcome="done", processed_at=clock())
            )
            return connection.execute(replay).rowcount == 1
        row = {"consumer": consumer, "message_id": id, "outcome": "done"}
        return connection.execute(insert_if_absent(inbox, connection.dialect.name), row).rowcount == 1

    # ------------------------------------------------------------ building rows

    def _build_event(
        self,
        event: object,
        declared: Declaration,
        headers: Mapping[str, str] | None,
        deliver_at: dt.datetime | dt.timedelta | None,
        id: uuid.UUID | None,
    ) -> staging.Built:
        key: Any = ABSENT if declared.key is None else declared.key(event)
        return self._build(declared.topic, event, key, declared.type, headers, None, deliver_at, id, declared.version)

    def _build(
        self,
        topic: str,
        payload: Any,
        key: Key | _Absent | None = ABSENT,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
        deliver_at: dt.datetime | dt.timedelta | None = None,
        id: uuid.UUID | None = None,
        version: int = 1,
    ) -> staging.Built:
        topic = check_topic(topic)
        if id is not None and not isinstance(id, uuid.UUID):
            raise EncodingError(f"message for {topic!r}: id is a {id.__class__.__name__}; it must be a UUID")
        checked = {} if headers is None else check_headers(headers, topic)
        if version != 1:
            checked[VERSION_HEADER] = str(version)
        text = key_text(key, topic)
        body, content_type = encoding.encode(payload, topic, check_content_type(content_type, topic), self.codec)
        return self._built(
            Message(
                id=id or new_id(),
                topic=topic,
                payload=body,
                key=text,
                type=check_type(type, topic),
                content_type=content_type,
                headers=checked,
                deliver_at=None if deliver_at is None else _instant(deliver_at, topic),
            )
        )

    def _build_message(self, message: Message) -> staging.Built:
        if message.payload is not None and not isinstance(message.payload, bytes):
            raise EncodingError(
                f"message for {message.topic!r}: the payload of a Message is bytes or None, not "
                f"{message.payload.__class__.__name__}; give a mapping of add's arguments to have it encoded"
            )
        headers = message.headers
        version = headers.get(VERSION_HEADER) if isinstance(headers, Mapping) else None
        if version is not None:  # a declared message, staged or received before: what its payload is
            headers = {name: value for name, value in headers.items() if name != VERSION_HEADER}
        # checked like any other, and with the content type that it has: None stays None
        checked = self._build(
            message.topic,
            message.payload,
            ABSENT if message.key is None else message.key,
            message.type,
            headers,
            message.content_type,
            message.deliver_at,
            message.id,
        )[2]
        if version is not None:
            checked = replace(checked, headers={**checked.headers, VERSION_HEADER: version})
        return self._built(replace(checked, content_type=message.content_type))

    def _built(self, message: Message) -> staging.Built:
        parameters: dict[str, Any] = {
            "id": message.id,
            "bucket": bucket_of(message.key, message.id),
            "topic": message.topic,
            "key": message.key,
            "type": message.type,
            "payload": message.payload,
            "content_type": message.content_type,
            "headers": encoding.dump_headers(message.headers) if message.headers else None,
        }
        if message.deliver_at is None:
            return self.tables.message, parameters, message
        parameters["deliver_at"] = message.deliver_at
        return self.tables.scheduled, parameters, message


_REQUIRED: Final = {"topic", "payload"}
_ARGUMENTS: Final = {"topic", "payload", "key", "type", "headers", "content_type", "deliver_at", "id"}


def _message_id(value: uuid.UUID | str) -> uuid.UUID:
    return message_id(value)


def _put(target: Session | sa.Connection, built: list[staging.Built], bind_arguments: Mapping[str, Any] | None) -> None:
    if isinstance(target, Session):
        staging.stage(target, built, bind_arguments)
    else:
        staging.insert_at_once(target, built)


def _connection(
    target: Session | sa.Connection, table: sa.Table, bind_arguments: Mapping[str, Any] | None
) -> sa.Connection:
    if isinstance(target, Session):
        return transactions.connection_for(target, table, bind_arguments)
    transactions.refuse_unfit(target)
    return target


def _instant(value: dt.datetime | dt.timedelta, topic: str) -> dt.datetime:
    try:
        if isinstance(value, dt.timedelta):
            return dt.datetime.now(dt.UTC) + value
        if not isinstance(value, dt.datetime):
            raise EncodingError(
                f"message for {topic!r}: deliver_at is a {value.__class__.__name__}; an aware datetime or a timedelta"
            )
        if value.tzinfo is None or value.utcoffset() is None:
            raise EncodingError(
                f"message for {topic!r}: deliver_at has no time zone; use datetime.now(UTC) + … or a timedelta"
            )
        return value.astimezone(dt.UTC)
    except OverflowError:
        raise EncodingError(f"message for {topic!r}: deliver_at is out of range") from None


def _declared(event: object) -> Declaration:
    """What was declared for this object's class; else a TypeError that says what was forgotten."""
    if isinstance(event, str):
        raise TypeError(f"add(…, {event!r}): the payload is missing, as in add(session, {event!r}, {{…}}, key=…)")
    if isinstance(event, type):
        hint = "an instance of it" if declaration(event) else "an instance of a class declared with @event"
        raise TypeError(f"add(…, {event.__name__}): this is the class itself; add takes {hint}")
    declared = declaration(type(event))
    if declared is None:
        raise TypeError(
            f"add(…, {type(event).__name__} object): its class is not declared; decorate it with "
            "@event(topic, type=…), or give topic and payload"
        )
    return declared


def _resolve(where: Any, sync_only: str | None = None) -> Session | sa.Connection:
    """The sync session or connection behind whatever an application holds, without importing sqlalchemy.ext.asyncio."""
    if isinstance(where, (Session, sa.Connection)):
        return where
    if isinstance(where, scoped_session):
        found: Session = where()
        return found
    registry = getattr(where, "registry", None)
    if isinstance(registry, ScopedRegistry):  # async_scoped_session
        where = registry()
    sync_session = getattr(where, "sync_session", None)
    if isinstance(sync_session, Session):
        if sync_only:
            raise TypeError(
                f"outbox.{sync_only} is sync: with an AsyncSession write await session.run_sync(outbox.{sync_only}, …)"
            )
        return sync_session
    if hasattr(where, "sync_connection"):
        name = sync_only or "add"
        raise TypeError(
            f"an AsyncConnection needs an await for the insert: write await connection.run_sync(outbox.{name}, …)"
        )
    raise TypeError(
        f"{type(where).__name__} is no session or connection: pass a Session, AsyncSession, scoped session or Connection "
        "whose transaction the message belongs to"
    )


__all__ = ["Outbox", "Where"]
