"""One way to one database each: how it is filled, what its bare driver does, and what holds a snapshot of it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiosqlite
import asyncmy
import psycopg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks import relay
from outbox import Outbox
from outbox.store import Store
from outbox.stores import mysql as mysql_store
from outbox.stores import open_store
from outbox.stores import postgresql as postgresql_store
from outbox.stores import sqlite as sqlite_store
from outbox.stores.engine import sync_engine_for

BATCH = 1000  # rows of one read

outbox = Outbox()


class Bench(ABC):
    """One way to one database. ``reference``: what the bare driver is called in figures."""

    name: str
    reference: str

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = sync_engine_for(url, create=True)
        outbox.metadata.create_all(self.engine)

    @abstractmethod
    def fill(self, rows: int) -> None:
        """That many rows of about 380 bytes, and nothing else; as if they had been there for a while."""

    @abstractmethod
    def bare(self, rows: int) -> float:
        """Seconds that the bare driver takes to read and remove them."""

    @abstractmethod
    def snapshot(self) -> Any:
        """A context in which another session holds a snapshot of the table."""

    @contextmanager
    def store(self) -> Iterator[Callable[[Callable[[Store], Awaitable[float]]], float]]:
        """What runs work with a store whose connections are made."""

        async def run(work: Callable[[Store], Awaitable[float]]) -> float:
            store = open_store(self.url, outbox.tables)
            try:
                return await work(store)
            finally:
                await store.close()

        yield lambda work: asyncio.run(run(work))

    def close(self) -> None:
        self.engine.dispose()


class OnPostgresql(Bench):
    name, reference = "postgresql", "bare_psycopg_async"

    def fill(self, rows: int) -> None:
        relay.fill(self.engine, "orders", 1000, rows)

    def bare(self, rows: int) -> float:
        return asyncio.run(self._bare(rows))

    async def _bare(self, rows: int) -> float:
        table = "outbox_message"
        read = postgresql_store.READ.format(message=table).format(and_="")
        settle = postgresql_store.SETTLE_RANGES.format(message=table) + postgresql_store.RANGE
        async with await psycopg.AsyncConnection.connect(
            self.url.replace("+psycopg", ""), autocommit=True, prepare_threshold=None
        ) as connection:
            cursor = connection.cursor(binary=True)
            start, last, left = time.perf_counter(), 0, rows
            while left:
                await cursor.execute(read, {"start": last, "limit": BATCH})  # type: ignore[arg-type]
                found = await cursor.fetchall()
                last = found[-1][0]
                await cursor.execute(settle, (found[0][0], last))  # type: ignore[arg-type]
                left -= cursor.rowcount
            return time.perf_counter() - start

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        with self.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            connection.exec_driver_sql("select count(*) from outbox_message")
            yield


FILL_MARIADB = """
insert into outbox_message (id, bucket, topic, `key`, type, payload, content_type, headers)
select lower(insert(insert(insert(insert(concat('018f3c1e7c1a7000', lpad(hex(seq), 16, '0')), 9, 0, '-'), 14, 0, '-'), 19, 0,
       '-'), 24, 0, '-')), mod(mod(seq, 1000), 64), 'orders', concat('k', mod(seq, 1000)), 'order.placed',
       repeat('x', 200), 'application/json',
       '{{"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}}'
from seq_1_to_{rows}
"""


class OnMariadb(Bench):
    name, reference = "mariadb", "bare_asyncmy"

    def fill(self, rows: int) -> None:
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("truncate table outbox_message")
            connection.exec_driver_sql(FILL_MARIADB.format(rows=rows))
            connection.exec_driver_sql("analyze table outbox_message").all()

    def bare(self, rows: int) -> float:
        return asyncio.run(self._bare(rows))

    async def _bare(self, rows: int) -> float:
        read = mysql_store.READ.format(message="outbox_message", where="true", limit=BATCH)
        url = sa.make_url(self.url)
        connection = await asyncmy.connect(
            host=url.host, port=url.port, user=url.username, password=url.password or "", db=url.database,
            charset="utf8mb4", autocommit=True,
        )  # fmt: skip
        try:
            async with connection.cursor() as cursor:
                for statement in (*mysql_store.QUIETLY, mysql_store.LISTS_STAY_LISTS):
                    await cursor.execute(statement)
                start, left = time.perf_counter(), rows
                while left:
                    await cursor.execute(read)
                    found = await cursor.fetchall()
                    await cursor.execute(
                        mysql_store.SETTLE.format(
                            message="outbox_message",
                            positions=",".join([str(row[0]) for row in found]),
                            ids="'" + "','".join([row[1] for row in found]) + "'",
                        )
                    )
                    left -= cursor.rowcount
                return time.perf_counter() - start
        finally:
            connection.close()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        with self.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            connection.exec_driver_sql("select count(*) from outbox_message")
            yield


FILL_SQLITE = """
insert into outbox_message (id, bucket, topic, key, type, payload, content_type, headers)
with recursive numbers (n) as (select 1 union all select n + 1 from numbers where n < {rows})
select printf('018f3c1e7c1a7000%016x', n), (n % 1000) % 64, 'orders', 'k' || (n % 1000), 'order.placed',
       cast(printf('%.200c', 'x') as blob), 'application/json',
       '{{"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}}'
from numbers
"""


class OnSqlite(Bench):
    name, reference = "sqlite", "bare_sqlite3"
    wal = 0.0
    """MB of the write-ahead log at the end of the last snapshot: it cannot be begun anew while that is held."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "outbox.db"
        super().__init__(f"sqlite:///{self.file}")

    def fill(self, rows: int) -> None:
        connection = sqlite3.connect(self.file, isolation_level=None)
        connection.execute("delete from outbox_message")
        connection.execute(FILL_SQLITE.format(rows=rows))
        connection.execute("pragma wal_checkpoint(truncate)")
        connection.close()

    def statements(self) -> tuple[str, str]:
        table = "outbox_message"
        return sqlite_store.READ.format(message=table, and_=""), sqlite_store.SETTLE.format(message=table)

    def bare(self, rows: int) -> float:
        read, settle = self.statements()
        connection = sqlite3.connect(self.file, isolation_level=None)
        try:
            return _drain(connection, read, settle, rows)
        finally:
            connection.close()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        connection = sqlite3.connect(self.file, isolation_level=None)
        connection.execute("begin")
        connection.execute("select count(*) from outbox_message").fetchall()
        try:
            yield
        finally:
            self.wal = self.file.with_name(self.file.name + "-wal").stat().st_size / 1e6
            connection.close()


def _drain(connection: sqlite3.Connection, read: str, settle: str, rows: int) -> float:
    start, last, left = time.perf_counter(), 0, rows
    while left:
        found = connection.execute(read, (last, BATCH)).fetchall()
        last = found[-1][0]
        left -= connection.execute(settle, (json.dumps([row[0] for row in found]),)).rowcount
    return time.perf_counter() - start


class OnSqliteFromAThread(OnSqlite):
    """The same file, the driver called as an event loop must: in another thread, a call for each statement."""

    name, reference = "sqlite", "bare_sqlite3_from_a_thread"

    def bare(self, rows: int) -> float:
        return asyncio.run(self._bare(rows))

    async def _bare(self, rows: int) -> float:
        read, settle = self.statements()
        connection = sqlite3.connect(self.file, isolation_level=None, check_same_thread=False)
        try:
            start, last, left = time.perf_counter(), 0, rows
            while left:
                found = await asyncio.to_thread(lambda last=last: connection.execute(read, (last, BATCH)).fetchall())
                last, these = found[-1][0], (json.dumps([row[0] for row in found]),)
                left -= await asyncio.to_thread(lambda these=these: connection.execute(settle, these).rowcount)
            return time.perf_counter() - start
        finally:
            connection.close()


class OnAiosqlite(OnSqlite):
    name, reference = "aiosqlite", "bare_aiosqlite"

    def bare(self, rows: int) -> float:
        return asyncio.run(self._bare(rows))

    async def _bare(self, rows: int) -> float:
        read, settle = self.statements()
        async with aiosqlite.connect(self.file, isolation_level=None) as connection:
            start, last, left = time.perf_counter(), 0, rows
            while left:
                found = list(await connection.execute_fetchall(read, (last, BATCH)))
                last = found[-1][0]
                async with connection.execute(settle, (json.dumps([row[0] for row in found]),)) as cursor:
                    left -= cursor.rowcount
            return time.perf_counter() - start

    @contextmanager
    def store(self) -> Iterator[Callable[[Callable[[Store], Awaitable[float]]], float]]:
        async def run(work: Callable[[Store], Awaitable[float]]) -> float:
            engine = create_async_engine(self.url.replace("sqlite:", "sqlite+aiosqlite:"))
            store = open_store(engine, outbox.tables)
            try:
                return await work(store)
            finally:
                await store.close()
                await engine.dispose()

        yield lambda work: asyncio.run(run(work))
