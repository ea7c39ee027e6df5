"""Everything behind a PgBouncer of the old kind, in transaction mode, whose backends take turns: applications add through
both drivers, two relays send, consumers handle, and on no backend anything of a session is left."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import outbox_migrations
from outbox import Consumer, Message, Outbox, event
from outbox.relay import Relay
from outbox.stores.engine import sync_engine_for
from outbox.transports import memory
from tests.relay.running import QUICK, eventually, running
from tests.services import PgbouncerServer, PostgresqlServer

TRANSACTIONS = 40  # of each way in
PSYCOPG: dict[str, Any] = {"prepare_threshold": None}
ASYNCPG: dict[str, Any] = {"statement_cache_size": 0, "prepared_statement_cache_size": 0}


outbox = Outbox(sa.MetaData())
effects = sa.Table("effect", outbox.metadata, sa.Column("n", sa.Integer), sa.Column("way", sa.Text))
entity = sa.Table("entity", outbox.metadata, sa.Column("way", sa.Text, primary_key=True), sa.Column("n", sa.Integer))


@event("orders", type="order.placed", key="way")
@dataclass
class Placed:
    way: str
    n: int


@pytest.fixture
def url(pgbouncer: PgbouncerServer, postgresql: PostgresqlServer) -> Iterator[str]:
    direct = postgresql.create_database()
    yield pgbouncer.through(direct)
    postgresql.drop_database(direct)


def run_outbox(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "outbox", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def migrate(url: str) -> None:
    run_outbox("migrate", "--database", url)
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), connect_args=PSYCOPG)
    with engine.begin() as connection:
        outbox.metadata.create_all(connection, [effects, entity])
    engine.dispose()


# ------------------------------------------------------------ ways in


def add_by_psycopg(url: str, way: str) -> None:
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), connect_args=PSYCOPG)
    for n in range(TRANSACTIONS):
        with Session(engine) as session, session.begin():
            outbox.add(session, Placed(way, n))
            session.execute(sa.select(sa.func.count()).select_from(entity))
    engine.dispose()


async def add_by_asyncpg(url: str, way: str) -> None:
    engine = create_async_engine(sa.make_url(url).set(drivername="postgresql+asyncpg"), connect_args=ASYNCPG)
    for n in range(TRANSACTIONS):
        async with AsyncSession(engine) as session, session.begin():
            outbox.add(session, Placed(way, n))
    await engine.dispose()


async def add_by_raw_asyncpg(url: str, way: str) -> None:
    connection = await asyncpg.connect(url, statement_cache_size=0)
    for n in range(TRANSACTIONS):
        async with connection.transaction():
            await outbox.aadd(connection, Placed(way, n))
    await connection.close()


def add_by_raw_psycopg(url: str, way: str) -> None:
    with psycopg.connect(url, prepare_threshold=None) as connection:
        for n in range(TRANSACTIONS):
            outbox.add(connection, Placed(way, n))
            connection.commit()


# ------------------------------------------------------------ tests


async def test_migrating_leaves_nothing_on_a_session(url: str, pgbouncer: PgbouncerServer) -> None:
    engine = sync_engine_for(url)
    for version in range(1, outbox_migrations.LATEST + 1):
        outbox_migrations.migrate(engine, to=version)
    engine.dispose()
    assert pgbouncer.left_on_sessions(url) == []


async def test_everything_works_behind_it_and_leaves_nothing_on_a_session(url: str, pgbouncer: PgbouncerServer) -> None:
    migrate(url)
    broker = f"memory://{uuid.uuid4().hex}"
    sync = Consumer("sync", outbox, database=url, transport=broker)
    asynchronous = Consumer("async", outbox, database=url, transport=broker)

    @sync.on(Placed)
    def handle(placed: Placed, session: Session) -> None:
        session.execute(sa.insert(effects).values(n=placed.n, way=f"sync {placed.way}"))

    @asynchronous.on(Placed)
    async def ahandle(placed: Placed, session: AsyncSession, message: Message) -> None:
        await session.execute(sa.insert(effects).values(n=placed.n, way=f"async {placed.way}"))

    ways = {
        "psycopg": lambda: asyncio.to_thread(add_by_psycopg, url, "psycopg"),
        "asyncpg": lambda: add_by_asyncpg(url, "asyncpg"),
        "raw psycopg": lambda: asyncio.to_thread(add_by_raw_psycopg, url, "raw psycopg"),
        "raw asyncpg": lambda: add_by_raw_asyncpg(url, "raw asyncpg"),
    }
    relays = [Relay(outbox, database=url, transport=broker, limits=QUICK, lease=2.0) for _ in range(2)]
    expected = len(ways) * TRANSACTIONS
    async with running(relays[0]), running(relays[1]), sync, asynchronous:
        await asyncio.gather(*(add() for add in ways.values()))
        await eventually(lambda: sum(relay.counts.sent for relay in relays) >= expected, 60)
        for consumer in (sync, asynchronous):
            await eventually(lambda c=consumer: c.state.counts.handled >= expected, 60)
    memory.forget(broker.removeprefix("memory://"))

    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), connect_args=PSYCOPG)
    with engine.connect() as connection:
        found = Counter((way, n) for way, n in connection.execute(sa.select(effects.c.way, effects.c.n)))
    engine.dispose()
    assert found == {(f"{kind} {way}", n): 1 for kind in ("sync", "async") for way in ways for n in range(TRANSACTIONS)}
    status = json.loads(run_outbox("status", "--json", "--database", url))
    assert status["pending"] == status["parked"] == status["dead_letters"] == 0
    assert pgbouncer.left_on_sessions(url) == []
