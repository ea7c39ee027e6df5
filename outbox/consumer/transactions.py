"""Where a consumer's sessions come from, and how its transactions run: sync ones in threads, async ones on the loop."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from outbox._refusals import is_full
from outbox._transactions import connection_for
from outbox.consumer.binding import Handler
from outbox.consumer.effect import DatabaseTrouble, Effect, NoRoom, guarded
from outbox.consumer.threads import Threads
from outbox.errors import ConfigurationError, OutboxError, StoreUnavailable
from outbox.stores.engine import (
    Database,
    async_engine_for,
    async_transaction,
    is_engine,
    require_file,
    sync_engine_for,
    transaction,
)

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

T = TypeVar("T")

CLOSE: Final = 2.0  # seconds for what is under way beside the handlers
SPARE_THREADS: Final = 3  # for what is written beside the handlers: attempts, dead letters, replays


class Transactions:
    """``sessions`` is what the user gave as ``session=``, ``around`` what each transaction runs within; ``table`` is the one
    of ours that a session with several databases is asked for."""

    def __init__(
        self,
        consumer: str,
        table: sa.Table,
        database: Database | None,
        sessions: Any,
        around: Callable[[], Any] | None,
        concurrency: int,
    ) -> None:
        self._consumer = consumer
        self._table = table
        self._database = database
        self._given = sessions
        self._around = around
        self._connections = concurrency + SPARE_THREADS
        self._threads = Threads(self._connections, f"outbox-{consumer}")
        self._engine: sa.Engine | None = None
        self._async_engine: AsyncEngine | None = None
        self._sync_sessions: Callable[[], Session] | None = None
        self._async_sessions: Callable[[], AsyncSession] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # ------------------------------------------------------------ opening

    def open(self, handlers: Iterable[Handler]) -> None:
        """Find out who gets what. Raises `ConfigurationError` for a handler that this database cannot serve, and
        `StoreUnavailable` for an SQLite file that is not there. Connects to nothing."""
        self._loop = asyncio.get_running_loop()
        handlers = list(handlers)
        if self._given is not None:
            if _is_async_factory(self._given):
                self._async_sessions = self._given
            else:
                self._sync_sessions = self._given
        if self._database is not None or self._given is None:
            self._open_engines(handlers)
        for handler in handlers:
            whose = f"consumer {self._consumer!r}, handler {handler.name}"
            if handler.session == "async" and self._async_sessions is None:
                raise ConfigurationError(
                    f"{whose}: argument {_session_argument(handler)!r} is an AsyncSession, but {self._what()} is sync: give "
                    "Consumer a database URL, an AsyncEngine or an async_sessionmaker, or write def instead of async def"
                )
            if not handler.is_async and self._sync_sessions is None:
                raise ConfigurationError(
                    f"{whose} is sync, but {self._what()} is async: give Consumer a database URL, an Engine or a "
                    "sessionmaker, or write async def"
                )

    def _open_engines(self, handlers: list[Handler]) -> None:
        """Engines for the kinds of sessions that are missing and wanted. Of a URL there can be both; an engine is of one."""
        # No ping before each message: a dead connection is found out by the claim, and costs no attempt.
        wants_async = self._async_sessions is None and any(handler.session == "async" for handler in handlers)
        wants_sync = self._sync_sessions is None and any(handler.session != "async" for handler in handlers)
        if is_engine(self._database):
            if isinstance(self._database, sa.Engine):
                wants_sync, wants_async = True, False
            else:
                wants_sync, wants_async = False, True
        else:
            require_file(self._database)  # later, one that is gone is waited for
        if wants_async:
            engine = async_engine_for(self._database, pool_size=self._connections, pre_ping=False)
            self._async_engine = engine
            if self._async_sessions is None:
                from sqlalchemy.ext.asyncio import AsyncSession

                self._async_sessions = lambda: AsyncSession(engine, expire_on_commit=False)
        if wants_sync or not wants_async:
            sync_engine = self._engine = sync_engine_for(self._database, pool_size=self._connections, pre_ping=False)
            if self._sync_sessions is None:
                self._sync_sessions = lambda: Session(sync_engine)

    def _what(self) -> str:
        if self._given is not None:
            return f"session= (a {type(self._given).__name__})"
        return f"database= (a {type(self._database).__name__})"

    async def close(self) -> None:
        """Let go of the connections that were made here."""
        await self._threads.close(CLOSE)
        if not is_engine(self._database):
            if self._async_engine is not None:
                await self._async_engine.dispose()
            if self._engine is not None:
                self._engine.dispose()
        self._engine = self._async_engine = self._sync_sessions = self._async_sessions = None

    # ------------------------------------------------------------ beside the handlers

    async def run(self, work: Callable[[sa.Connection], T]) -> T:
        """Run ``work`` in a transaction of its own, and commit. Raises `DatabaseTrouble` for whatever goes wrong: these
        statements are ours, so it is never a message's fault."""
        try:
            if self._engine is not None:
                return await self._threads.run(self._run_on_engine, work)
            if self._async_engine is not None:
                async with async_transaction(self._async_engine) as connection:
                    return await connection.run_sync(work)
            if self._sync_sessions is not None:
                return await self._threads.run(self._run_in_session, work)
            return await self._run_in_async_session(work)
        except StoreUnavailable as error:
            raise DatabaseTrouble from error
        except (OutboxError, DatabaseTrouble):
            raise
        except Exception as error:
            raise DatabaseTrouble from error

    def _run_on_engine(self, work: Callable[[sa.Connection], T]) -> T:
        assert self._engine is not None
        with transaction(self._engine) as connection:
            return work(connection)

    def _run_in_session(self, work: Callable[[sa.Connection], T]) -> T:
        with self._within(), self._session() as session:
            result = work(connection_for(session, self._table))
            session.commit()
            return result

    async def _run_in_async_session(self, work: Callable[[sa.Connection], T]) -> T:
        async with self._awithin(), self._asession() as session:
            result = await session.run_sync(lambda sync: work(connection_for(sync, self._table)))
            await session.commit()
            return result

    # ------------------------------------------------------------ handlers

    async def handle(self, effect: Effect, payload: Any, provide: dict[str, Any]) -> bool:
        """Claim, handler, commit: all of it or nothing. False: it was done already. Raises `DatabaseTrouble` where the
        database failed, else whatever the handler raised."""
        if effect.handler.is_async and self._async_sessions is not None:
            return await self._handle_async(effect, payload, provide)
        return await self._threads.run(self._handle_sync, effect, payload, provide)

    def _handle_sync(self, effect: Effect, payload: Any, provide: dict[str, Any]) -> bool:
        handler, message = effect.handler, effect.incoming.message
        with self._within(), self._session() as session:
            with _before_the_handler():
                if not session.in_transaction():
                    session.begin()
                free = effect.claim(session)
                if not free:
                    session.commit()
                    return False
            with _database_perhaps(effect):
                with guarded(session):
                    if handler.is_async:
                        # no async session to be had: the handler runs on the loop, this thread keeps the transaction
                        assert self._loop is not None
                        result = asyncio.run_coroutine_threadsafe(
                            handler.acall(payload, message, None, provide), self._loop
                        ).result()
                    else:
                        result = handler.call(payload, message, session, provide)
                if not effect.complete(session, result):
                    session.rollback()
                    return False
                session.commit()
                return True

    async def _handle_async(self, effect: Effect, payload: Any, provide: dict[str, Any]) -> bool:
        async with self._awithin(), self._asession() as session:
            with _before_the_handler():
                if not session.in_transaction():
                    await session.begin()
                free = await session.run_sync(effect.claim)
                if not free:
                    await session.commit()
                    return False
            with _database_perhaps(effect):
                with guarded(session.sync_session):
                    result = await effect.handler.acall(payload, effect.incoming.message, session, provide)
                if not await session.run_sync(effect.complete, result):
                    await session.rollback()
                    return False
                await session.commit()
                return True

    # ------------------------------------------------------------ sessions

    @contextlib.contextmanager
    def _session(self) -> Iterator[Session]:
        factory = self._sync_sessions
        assert factory is not None
        with _before_the_handler():
            session = factory()
        try:
            yield session
        finally:
            # close() rolls back whatever was not committed
            if isinstance(factory, scoped_session):
                factory.remove()
            else:
                session.close()

    @contextlib.asynccontextmanager
    async def _asession(self) -> AsyncIterator[AsyncSession]:
        factory: Any = self._async_sessions
        with _before_the_handler():
            session: AsyncSession = factory()
        try:
            yield session
        finally:
            if hasattr(factory, "remove"):
                await factory.remove()
            else:
                await session.close()

    @contextlib.contextmanager
    def _within(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._around is not None:
                with _before_the_handler():
                    stack.enter_context(self._around())
            yield

    @contextlib.asynccontextmanager
    async def _awithin(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if self._around is not None:
                with _before_the_handler():
                    context = self._around()
                    if hasattr(context, "__aenter__"):
                        await stack.enter_async_context(context)
                    else:
                        stack.enter_context(context)
            yield


def check_sessions(consumer: str, sessions: Any) -> None:
    """Raises `ConfigurationError` for a ``session=`` that makes no sessions."""
    if sessions is None or isinstance(sessions, (sessionmaker, scoped_session)) or _is_async_factory(sessions):
        return
    if isinstance(sessions, Session) or not callable(sessions) or inspect.iscoroutinefunction(sessions):
        raise ConfigurationError(
            f"consumer {consumer!r}: session= is a {type(sessions).__name__}; it must be a sessionmaker, an "
            "async_sessionmaker or a scoped session (db.session): each message gets a session of its own"
        )


def _is_async_factory(sessions: Any) -> bool:
    module = sys.modules.get("sqlalchemy.ext.asyncio")
    return module is not None and isinstance(sessions, (module.async_sessionmaker, module.async_scoped_session))


def _session_argument(handler: Handler) -> str:
    return next(slot.name for slot in handler.slots if slot.gets == "session")


# ---------------------------------------------------------------- whose fault it is


@contextlib.contextmanager
def _before_the_handler() -> Iterator[None]:
    """Whatever goes wrong before the handler is called, no message is to blame: no connection to be had, a read-only
    replica after a fail-over, tables that are gone, an app context that cannot be made."""
    try:
        yield
    except Exception as error:
        raise DatabaseTrouble from error


@contextlib.contextmanager
def _database_perhaps(effect: Effect) -> Iterator[None]:
    """Around handler and commit. The database is to blame where **our** connection was lost, and where SQLite's one write
    lock was not to be had, and where a disk is full; not for what a handler meets elsewhere, nor for what its own statements
    deserve."""
    try:
        yield
    except DatabaseTrouble:
        raise
    except Exception as error:
        lost = effect.connection is not None and effect.connection.invalidated
        code = _sqlite_code(error)
        if code == sqlite3.SQLITE_FULL or any(is_full(one) for one in _behind(error)):
            raise NoRoom from error
        if lost or code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise DatabaseTrouble from error
        raise


def _sqlite_code(error: BaseException | None) -> int | None:
    """The error of SQLite's that is behind this one, if any is."""
    for one in _behind(error):
        if isinstance(one, sqlite3.OperationalError):
            return int(getattr(one, "sqlite_errorcode", 0)) & 0xFF
    return None


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what SQLAlchemy has wrapped, what it was raised for, and so on."""
    seen = 0
    while error is not None and seen < 20:
        yield error
        error, seen = getattr(error, "orig", None) or error.__cause__ or error.__context__, seen + 1
