"""The database's clock jumps, forwards and back: leases run out too soon or too late, and nothing is lost."""

from __future__ import annotations

import asyncio
import datetime as dt
import random

import psycopg
import pytest
import sqlalchemy as sa

from outbox import Outbox
from outbox.relay import Relay
from tests.relay.database import Database
from tests.relay.running import QUICK, eventually, running
from tests.relay.scripted import Scripted

HOUR = 3600

# Found before the real one, since the search path of new sessions names this schema first.
SHADOW = """
    create schema shadow;
    create table shadow.jump (seconds float8 not null);
    insert into shadow.jump values (0);
    create function shadow.clock_timestamp() returns timestamptz volatile language sql as
        $$ select pg_catalog.clock_timestamp() + make_interval(secs => seconds) from shadow.jump $$;
    create function shadow.statement_timestamp() returns timestamptz stable language sql as
        $$ select pg_catalog.statement_timestamp() + make_interval(secs => seconds) from shadow.jump $$;
"""


class Clock:
    """The clock of this database."""

    def __init__(self, url: str) -> None:
        self._url = url
        name = sa.make_url(url).database
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(SHADOW)
            connection.execute(f'alter database "{name}" set search_path = shadow, pg_catalog, public')  # type: ignore[arg-type]

    def jump(self, seconds: float) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute("update shadow.jump set seconds = seconds + %s", [seconds])


@pytest.fixture
def database(on_postgresql: Database) -> Database:
    return on_postgresql


@pytest.fixture
def clock(database: Database) -> Clock:
    found = Clock(database.url)
    database.engine.dispose()  # its connections know no shadow
    return found


async def test_nothing_is_lost_while_two_relays_send(database: Database, clock: Clock) -> None:
    rng = random.Random(7)
    broker = Scripted()
    ids: list[str] = []
    async with (
        running(Relay(Outbox(), database=database.url, transport=broker, lease=1.0, limits=QUICK)),
        running(Relay(Outbox(), database=database.url, transport=broker, lease=1.0, limits=QUICK)),
    ):
        for _ in range(30):
            ids += database.add(*(f"k{rng.randrange(10)}" for _ in range(5)))
            if rng.random() < 0.4:
                clock.jump(rng.choice([-HOUR, -5, 5, HOUR]))
            await asyncio.sleep(rng.random() * 0.1)
        await eventually(lambda: database.count() == 0)
    assert sorted(set(broker.ids())) == sorted(ids)


async def test_what_is_scheduled_comes_when_the_clock_says_so_and_once(database: Database, clock: Clock) -> None:
    broker = Scripted()
    outbox = database.outbox
    with sa.orm.Session(database.engine) as session, session.begin():
        outbox.add(session, "orders", {}, key="later", deliver_at=dt.timedelta(seconds=60))
    async with running(Relay(outbox, database=database.url, transport=broker, lease=1.0, limits=QUICK)):
        clock.jump(-HOUR)
        database.add("now")
        await eventually(lambda: broker.keys() == ["now"])
        clock.jump(HOUR + 61)
        await eventually(lambda: broker.keys() == ["now", "later"])
        await eventually(lambda: database.count() == database.count("scheduled") == 0)


async def test_a_dead_relays_share_is_taken_over_although_its_leases_end_in_the_far_future(
    database: Database, clock: Clock
) -> None:
    dead, broker = Scripted(), Scripted()
    relay = Relay(Outbox(), database=database.url, transport=dead, lease=1.0, limits=QUICK)
    task = asyncio.create_task(relay.arun(asyncio.Event()))
    await eventually(relay.started.is_set)
    with psycopg.connect(database.url, autocommit=True) as connection:
        left = connection.execute("select bucket, owner, expires_at from outbox_lease").fetchall()
        beat = connection.execute("select owner, host, version, heartbeat_at from outbox_relay").fetchall()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # as a SIGKILL leaves it
        for bucket, owner, end in left:
            connection.execute(
                "update outbox_lease set owner = %s, expires_at = %s where bucket = %s", [owner, end, bucket]
            )
        for row in beat:
            connection.execute(
                "insert into outbox_relay (owner, host, version, heartbeat_at) values (%s, %s, %s, %s)", row
            )
    clock.jump(-HOUR)
    ids = database.add(*(f"k{n}" for n in range(50)))
    async with running(Relay(Outbox(), database=database.url, transport=broker, lease=1.0, limits=QUICK)):
        await eventually(lambda: database.count() == 0)
    assert sorted(broker.ids()) == sorted(ids)
