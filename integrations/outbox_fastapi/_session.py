"""A session for one request."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, overload

from sqlalchemy.orm import Session, sessionmaker

from outbox import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    AsyncSessionT = TypeVar("AsyncSessionT", bound=AsyncSession)

SessionT = TypeVar("SessionT", bound=Session)


@overload
def session_dependency(sessions: async_sessionmaker[AsyncSessionT]) -> Callable[[], AsyncIterator[AsyncSessionT]]: ...


@overload
def session_dependency(sessions: sessionmaker[SessionT]) -> Callable[[], Iterator[SessionT]]: ...


def session_dependency(sessions: Any) -> Callable[[], Any]:
    """A dependency that gives each request a session, and commits it when the path operation has returned:

    ``session: Annotated[AsyncSession, Depends(get_session, scope="function")]``

    **Write** ``scope="function"``: then the commit comes before the response is sent, and one that fails (a deferred
    constraint, a serialization failure, a database that is gone) is a 500. FastAPI's default scope ends after the response:
    the client would have its 200 for an order, and a message, that were rolled back.

    An exception out of the path operation, `HTTPException` too, rolls back; returning a response of whatever status
    commits. Committing in between is allowed: what comes after it is another transaction. A streamed body is produced
    after the session was closed.

    ``sessions``: a ``sessionmaker`` or ``async_sessionmaker``; the session is of that kind. Raises `ConfigurationError`
    for anything else.
    """
    asyncio = sys.modules.get("sqlalchemy.ext.asyncio")  # nobody has an async_sessionmaker without it
    if asyncio is not None and isinstance(sessions, asyncio.async_sessionmaker):
        return _async_dependency(sessions)
    if isinstance(sessions, sessionmaker):
        return _dependency(sessions)
    raise ConfigurationError(
        f"session_dependency() takes a sessionmaker or an async_sessionmaker, not a {type(sessions).__name__}"
    )


# Closing a session rolls back too, but not after a commit that SQLite has refused (a deferred foreign key): its connection
# would go back to the pool with the transaction still open, and whoever got it next would be in it.


def _dependency(sessions: sessionmaker[SessionT]) -> Callable[[], Iterator[SessionT]]:
    def get_session() -> Iterator[SessionT]:
        with sessions() as session:
            try:
                yield session
                session.commit()
            except BaseException:
                session.rollback()
                raise

    return get_session


def _async_dependency(sessions: async_sessionmaker[AsyncSessionT]) -> Callable[[], AsyncIterator[AsyncSessionT]]:
    async def get_session() -> AsyncIterator[AsyncSessionT]:
        async with sessions() as session:
            try:
                yield session
                await session.commit()
            except BaseException:
                await session.rollback()
                raise

    return get_session
