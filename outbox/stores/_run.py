"""SQLAlchemy work for an async caller, and raw connections out of the user's engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from outbox.errors import StoreUnavailable

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")


class Runner:
    """Runs functions of a sync connection: in a thread for an `Engine`, by ``run_sync`` for an `AsyncEngine`."""

    def __init__(self, engine: sa.Engine | AsyncEngine) -> None:
        self.engine = engine
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="outbox-store")

    async def run(self, work: Callable[[sa.Connection], T]) -> T:
        """Run ``work`` in a transaction and commit. Raises `StoreUnavailable` for what is the database's fault."""
        try:
            if isinstance(self.engine, sa.Engine):
                return await asyncio.get_running_loop().run_in_executor(self._threads, self._in_transaction, work)
            async with self.engine.begin() as connection:
                return await connection.run_sync(work)
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError, OSError) as error:
            raise unavailable(self.engine, error) from error
        except sa.exc.DBAPIError as error:
            if error.connection_invalidated:
                raise unavailable(self.engine, error) from error
            raise

    def _in_transaction(self, work: Callable[[sa.Connection], T]) -> T:
        assert isinstance(self.engine, sa.Engine)
        with self.engine.begin() as connection:
            return work(connection)

    async def raw_psycopg(self) -> psycopg.AsyncConnection[Any]:
        """A connection for psycopg's async interface, made as the engine makes its own: whatever its ``creator``,
        ``connect_args`` and ``do_connect`` say (IAM logins) holds here too."""
        import psycopg

        try:
            if isinstance(self.engine, sa.Engine):
                return await asyncio.get_running_loop().run_in_executor(self._threads, self._borrow, self.engine)
            if self.engine.dialect.driver == "psycopg":
                raw = await self.engine.raw_connection()
                connection: psycopg.AsyncConnection[Any] = raw.driver_connection  # type: ignore[assignment]
                raw.detach()
                return connection
            # asyncpg speaks another interface: the same server, through psycopg
            url = self.engine.url.set(drivername="postgresql+psycopg")
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._borrow, sa.create_engine(url, poolclass=sa.NullPool)
            )
        except (sa.exc.DBAPIError, sa.exc.TimeoutError, psycopg.Error, OSError) as error:
            raise unavailable(self.engine, error) from error

    @staticmethod
    def _borrow(engine: sa.Engine) -> psycopg.AsyncConnection[Any]:
        import psycopg

        if engine.dialect.driver != "psycopg":
            engine = sa.create_engine(engine.url.set(drivername="postgresql+psycopg"), poolclass=sa.NullPool)
        raw = engine.raw_connection()
        sync: psycopg.Connection[Any] = raw.driver_connection  # type: ignore[assignment]
        raw.detach()
        sync.rollback()
        connection: psycopg.AsyncConnection[Any] = psycopg.AsyncConnection(sync.pgconn)
        # both wrap one libpq connection; kept together, so that the first is not taken for forgotten while the second works
        connection._outbox_made_by = sync  # type: ignore[attr-defined]
        return connection

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def unavailable(engine: sa.Engine | AsyncEngine, error: BaseException) -> StoreUnavailable:
    """What happened, in one line, without the statement, its parameters or a password."""
    cause = getattr(error, "orig", None) or error
    text = str(cause).strip().splitlines()
    what = text[0] if text else type(cause).__name__
    hint = ""
    if "readonly database" in what:
        hint = "; the file or its folder is not writable for this user"
    elif "database is locked" in what:
        hint = "; another process has held SQLite's write lock longer than the busy timeout (another relay, a long transaction)"
    return StoreUnavailable(f"{engine.url.render_as_string(hide_password=True)}: {what}{hint}")
