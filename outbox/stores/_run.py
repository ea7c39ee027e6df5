"""SQLAlchemy work for an async caller, and raw connections out of the user's engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import sqlalchemy as sa

from outbox._refusals import is_undone, words
from outbox.errors import StoreUnavailable
from outbox.stores import pooler
from outbox.stores.engine import async_transaction, transaction

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")

READ_ONLY: Final = (
    "this server takes no writes: it is a replica, or was the primary before a fail-over. Give the address of the primary "
    "(PostgreSQL: several hosts and target_session_attrs=read-write find it)"
)
GRANTS: Final = "`outbox migrate --grants` prints what each use of the tables needs"
RIGHTS: Final = ("permission denied for", "command denied to user", "must be owner of")
TRIES: Final = 5
GRACE: Final = 1.0  # seconds that a cancelled call waits for its thread


class Runner:
    """Runs functions of a sync connection: in a thread for an `Engine`, by ``run_sync`` for an `AsyncEngine`.

    ``ours``: the engine was made for this store, which disposes of it.
    """

    def __init__(self, engine: sa.Engine | AsyncEngine, *, ours: bool = False) -> None:
        self.engine = engine
        self._ours = ours
        # what work raises that asks the driver itself, past SQLAlchemy
        self._driver_error: type[Exception] = engine.dialect.loaded_dbapi.Error
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="outbox-store")

    async def run(self, work: Callable[[sa.Connection], T], tries: int = TRIES) -> T:
        """Run ``work`` in a transaction and commit; again, up to ``tries`` times in all, where the database chose it as the
        victim of a deadlock, or could not serialize it. Raises `StoreUnavailable` for whatever the database refuses: what the
        driver says itself quotes rows and parameters, which no log may show."""
        try:
            while True:
                try:
                    return await self._run(work)
                except sa.exc.DBAPIError as error:
                    # a deadlock's victim: the database has undone all of it, so it is done again
                    tries -= 1
                    if not tries or error.orig is None or not is_undone(error.orig):
                        raise
        except (sa.exc.DBAPIError, sa.exc.TimeoutError, OSError, self._driver_error) as error:
            raise unavailable(self.engine, error) from error

    async def _run(self, work: Callable[[sa.Connection], T]) -> T:
        if isinstance(self.engine, sa.Engine):
            return await self._in_thread(self._in_transaction, work)
        async with async_transaction(self.engine) as connection:
            return await connection.run_sync(work)

    async def _in_thread(
        self, work: Callable[..., T], *arguments: Any, discard: Callable[[T], object] = lambda _: None
    ) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # The thread goes on all the same, and what is done next (giving the leases back) must not come before it.
            future.add_done_callback(lambda f: f.cancelled() or f.exception() or discard(f.result()))
            await asyncio.wait([future], timeout=GRACE)
            raise

    def _in_transaction(self, work: Callable[[sa.Connection], T]) -> T:
        assert isinstance(self.engine, sa.Engine)
        with transaction(self.engine) as connection:
            return work(connection)

    async def raw_psycopg(self) -> psycopg.AsyncConnection[Any]:
        """A connection for psycopg's async interface, in autocommit mode, made as the engine makes its own: whatever its
        ``creator``, ``connect_args`` and ``do_connect`` say (IAM logins) holds here too. Its ``prepare_threshold`` is None
        where the engine says so, and behind a pooler."""
        import psycopg

        try:
            if isinstance(self.engine, sa.Engine):
                connection = await self._in_thread(_borrow, self.engine, discard=_finish)
            elif self.engine.dialect.driver == "psycopg":
                raw = await self.engine.raw_connection()
                connection = raw.driver_connection  # type: ignore[assignment]
                raw.detach()
                await connection.rollback()
            else:  # asyncpg speaks another interface: the same server, through psycopg
                connection = await self._in_thread(_borrow, self.engine.sync_engine, discard=_finish)
            try:
                await connection.set_autocommit(True)
                await pooler.prepare_nothing_behind(connection)
            except BaseException:
                connection.pgconn.finish()
                raise
            return connection
        except (sa.exc.DBAPIError, sa.exc.TimeoutError, psycopg.Error, OSError) as error:
            raise unavailable(self.engine, error) from error

    async def raw(self) -> Any:
        """A connection of the engine's driver, made as the engine makes its own, and no longer the pool's. What is executed
        on it goes through `raw_execute`."""
        try:
            if isinstance(self.engine, sa.Engine):
                return await self._in_thread(_detached, self.engine, discard=self._discard)
            raw = await self.engine.raw_connection()
            connection = raw.driver_connection
            raw.detach()
            return connection
        except (sa.exc.DBAPIError, sa.exc.TimeoutError, OSError) as error:
            raise unavailable(self.engine, error) from error

    async def raw_execute(self, connection: Any, sql: str) -> tuple[Sequence[Sequence[Any]], int]:
        """One statement without parameters, on a connection that `raw` made: its rows, and how many it touched. In a thread
        for a sync driver. Raises what the driver raises."""
        if isinstance(self.engine, sa.Engine):
            return await self._in_thread(_execute, connection, sql)
        async with connection.cursor() as cursor:
            await cursor.execute(sql)
            return (await cursor.fetchall() if cursor.description else ()), cursor.rowcount

    async def raw_close(self, connection: Any) -> None:
        """Close a connection that `raw` made, without a word to the server: its state may be any."""
        if isinstance(self.engine, sa.Engine):
            await self._in_thread(self._discard, connection)
        else:
            connection.close()

    def _discard(self, connection: Any) -> None:
        with suppress(Exception):  # it is broken already
            self.engine.dialect.do_terminate(connection)

    def is_drivers(self, error: BaseException) -> bool:
        """Whether the driver or the network raised this."""
        dbapi = self.engine.dialect.dbapi
        return isinstance(error, (OSError, sa.exc.DBAPIError)) or (dbapi is not None and isinstance(error, dbapi.Error))

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._ours:
            if isinstance(self.engine, sa.Engine):
                self.engine.dispose()
            else:
                await self.engine.dispose()


def _detached(engine: sa.Engine) -> Any:
    raw = engine.raw_connection()
    connection = raw.driver_connection
    raw.detach()
    return connection


def _execute(connection: Any, sql: str) -> tuple[Sequence[Sequence[Any]], int]:
    cursor = connection.cursor()
    try:
        cursor.execute(sql)
        return (cursor.fetchall() if cursor.description else ()), cursor.rowcount
    finally:
        cursor.close()


def _borrow(engine: sa.Engine) -> psycopg.AsyncConnection[Any]:
    import psycopg

    if engine.dialect.driver != "psycopg":
        engine = sa.create_engine(_for_psycopg(engine.url), poolclass=sa.NullPool)
    raw = engine.raw_connection()
    sync: psycopg.Connection[Any] = raw.driver_connection  # type: ignore[assignment]
    raw.detach()
    sync.rollback()
    if sync.prepare_threshold is not None:
        # in the pool it may have prepared statements, whose names the new wrapper would give out again
        sync.execute("deallocate all")
        sync.rollback()
    connection: psycopg.AsyncConnection[Any] = psycopg.AsyncConnection(sync.pgconn)
    connection.prepare_threshold = sync.prepare_threshold
    # Both wrap one libpq connection, which closes once: with the second, the first is closed too. Kept together, so that
    # the first is not taken for forgotten while the second works.
    connection._outbox_made_by = sync  # type: ignore[attr-defined]
    return connection


def _finish(connection: psycopg.AsyncConnection[Any]) -> None:
    connection.pgconn.finish()


def _for_psycopg(url: sa.URL) -> sa.URL:
    """The URL of another driver as psycopg reads it: asyncpg's ``ssl`` is libpq's ``sslmode``, its own options go."""
    query = dict(url.query)
    if "ssl" in query:
        query["sslmode"] = query.pop("ssl")
    for name in [name for name in query if name.startswith("prepared_statement")]:
        del query[name]
    return url.set(drivername="postgresql+psycopg", query=query)


class Scope:
    """What a store's last read looked for. A read that looks for more finds rows below where reading would go on."""

    def __init__(self) -> None:
        self._buckets: frozenset[int] | None = None
        self._without_topics: frozenset[str] = frozenset()

    def grows(self, buckets: Collection[int] | None, without_topics: Collection[str]) -> bool:
        wanted = None if buckets is None else frozenset(buckets)
        left_out = frozenset(without_topics)
        more = (self._buckets is not None and (wanted is None or not wanted <= self._buckets)) or not (
            left_out >= self._without_topics
        )
        self._buckets, self._without_topics = wanted, left_out
        return more


def unavailable(engine: sa.Engine | AsyncEngine, error: BaseException, rights: str | None = None) -> StoreUnavailable:
    """What happened, in one line, without the statement, its parameters or a password. ``rights``: what to do where a right
    is missing, if the grants of use are not it."""
    cause = getattr(error, "orig", None) or error
    what = words(cause) or type(cause).__name__
    # without its query, which may hold a password too
    return StoreUnavailable(
        f"{engine.url.set(query={}).render_as_string(hide_password=True)}: {what}{advice(what, rights)}"
    )


# Of what a driver says to what can be done: for messages only, nothing is decided by it.
_ADVICE: Final = {
    "readonly database": "the file or its folder is not writable for this user",
    "database is locked": "another process (a long transaction, a relay) held SQLite's write lock past the busy timeout",
    "read-only transaction": READ_ONLY,
    "during recovery": READ_ONLY,
    "--read-only": READ_ONLY,
    "prepared statement ": pooler.ADVICE,
    "permission denied for": GRANTS,
    "command denied to user": GRANTS,
}


def advice(what: str, rights: str | None = None) -> str:
    """What to do about an error, where its text says that: to be put behind it."""
    if rights is not None and any(text in what for text in RIGHTS):
        return f"; {rights}"
    return next((f"; {advice}" for text, advice in _ADVICE.items() if text in what), "")
