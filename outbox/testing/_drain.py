"""Delivery inside a test's transaction: from the outbox's table straight to a consumer's handlers."""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session

from outbox import encoding, staging
from outbox._message import Message
from outbox._outbox import Outbox
from outbox._transactions import connection_for
from outbox.consumer import Consumer

PAGE = 500  # rows


class Drained(NamedTuple):
    """What `drain` did, in messages. ``skipped`` were handled before (by this consumer's inbox); ``others`` are of topics
    or types that it has no handler for."""

    handled: int
    skipped: int
    others: int


@overload
def drain(
    outbox: Outbox, session: Session | scoped_session[Any], *, to: Consumer
) -> Drained: ...  # drain(outbox, session, to=billing)


@overload
def drain(
    outbox: Session, session: Outbox, *, to: Consumer
) -> Drained: ...  # await session.run_sync(drain, outbox, to=billing)


def drain(outbox: Any, session: Any, *, to: Consumer) -> Drained:
    """Deliver what this session's transaction holds to the handlers of a consumer, on the session's own connection, in
    order; also what those handlers add. Commits nothing, removes nothing from the outbox: another consumer can be drained
    to after this one, and a second call delivers only what is new.

    What is staged is flushed and inserted first. An exception of a handler comes through, undecodable payloads as
    `DecodingError`. Async: ``await session.run_sync(drain, outbox, to=billing)``, which runs async handlers too.
    """
    if isinstance(session, Outbox):
        outbox, session = session, outbox
    if isinstance(session, scoped_session):
        session = session()
    if not isinstance(session, Session):
        hint = ": write await session.run_sync(drain, outbox, to=…)" if hasattr(session, "sync_session") else ""
        raise TypeError(f"drain() takes a Session, not a {type(session).__name__}{hint}")
    handled = skipped = others = position = 0
    while True:
        staging.insert_now(session)
        rows = _after(outbox, session, position)
        if not rows:
            return Drained(handled, skipped, others)
        for row in rows:
            position = row.position
            message = _message(row)
            if not to.handles(message):
                others += 1
            elif to.handle(message, session):
                handled += 1
            else:
                skipped += 1


def _after(outbox: Outbox, session: Session, position: int) -> list[Any]:
    message = outbox.tables.message
    query = sa.select(message).where(message.c.position > position).order_by(message.c.position).limit(PAGE)
    return list(connection_for(session, message).execute(query).all())


def _message(row: Any) -> Message:
    return Message(
        id=row.id,
        topic=row.topic,
        payload=row.payload,
        key=row.key,
        type=row.type,
        content_type=row.content_type,
        headers=encoding.load_headers(row.headers),
        created_at=row.created_at,
        position=row.position,
    )
