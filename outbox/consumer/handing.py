"""A message handed to a consumer's handlers in a transaction of the caller's: `Consumer.handle`, `outbox.testing.drain`."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session, scoped_session

from outbox._message import Message, declaration
from outbox._outbox import Outbox
from outbox.consumer.effect import outgoing
from outbox.consumer.handlers import Handlers
from outbox.errors import TransactionError


def handle(outbox: Outbox, consumer: str, handlers: Handlers, first: object, second: object) -> bool:
    """Claim and handle; False where the inbox has it already, or it is ignored. One of the two is the session:
    ``run_sync`` passes it first."""
    message, where = (second, first) if _is_session(first) else (first, second)
    session = _session(where)
    message = message if isinstance(message, Message) else _message(outbox, message)
    handler = handlers.find(message.topic, message.type)
    if handler is None:
        if handlers.unknown == "ignore":
            return False
        raise handlers.missing(message)
    payload = handler.decode(message, outbox.codec)
    if not outbox.claim(session, consumer, message.id):
        return False
    if not handler.is_async:
        result = handler.call(payload, message, session, handlers.provide)
    else:
        result = _await(handler.acall(payload, message, _async_session(session, handler.session), handlers.provide))
    messages = outgoing(result, handler.name)
    if messages:
        outbox.add_all(session, messages)
    return True


def _message(outbox: Outbox, event: object) -> Message:
    """What `Outbox.add` would make of it, encoded as it would travel."""
    if declaration(type(event)) is None:
        raise TypeError(
            f"handle() takes an object whose class is declared with @event, or a Message; not a {type(event).__name__}"
        )
    return outbox._rows.one(event)[2]


def _is_session(value: object) -> bool:
    return isinstance(value, (Session, scoped_session)) or hasattr(value, "sync_session")


def _session(where: object) -> Session:
    if isinstance(where, Session):
        return where
    if isinstance(where, scoped_session):
        found: Session = where()
        return found
    if hasattr(where, "sync_session"):
        raise TypeError("handle() is sync: with an AsyncSession write await session.run_sync(consumer.handle, message)")
    raise TypeError(f"handle() takes a Session whose transaction the effect belongs to, not a {type(where).__name__}")


def _async_session(session: Session, wanted: str | None) -> Any:
    if wanted != "async":
        return None
    from sqlalchemy.ext.asyncio import async_session

    found = async_session(session)
    if found is None:
        raise TransactionError(
            "this handler takes an AsyncSession: call it as await session.run_sync(consumer.handle, message) on one"
        )
    return found


def _await(coroutine: Any) -> Any:
    """Await in sync code that runs under ``run_sync``."""
    from sqlalchemy.exc import MissingGreenlet
    from sqlalchemy.util import await_only

    try:
        return await_only(coroutine)
    except MissingGreenlet:
        coroutine.close()
        raise TransactionError(
            "this handler is async: call it as await session.run_sync(consumer.handle, message) on an AsyncSession"
        ) from None
