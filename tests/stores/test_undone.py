"""A transaction of the relay's that the database has undone, for no fault of it, is done again."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa

from outbox.errors import StoreUnavailable
from outbox.relay import Relay
from outbox.stores import open_store
from outbox.stores._run import TRIES
from outbox.stores.engine import database_url
from outbox.transport import Outcome
from tests.relay.database import Database
from tests.relay.running import QUICK, eventually, running
from tests.relay.scripted import Scripted
from tests.services.waiting import wait_until


@pytest.fixture(params=["postgresql", "mariadb"])
def database(request: pytest.FixtureRequest) -> Database:
    found: Database = request.getfixturevalue(f"on_{request.param}")
    return found


def raised(database: Database, bucket: int) -> sa.Update:
    lease = database.tables.lease
    return sa.update(lease).where(lease.c.bucket == bucket).values(epoch=lease.c.epoch + 1)


class Deadlock:
    """Another transaction, which locks the second bucket first and outlives the deadlock with who locks the first first."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.tries = 0

    def work(self, connection: sa.Connection) -> None:
        self.tries += 1
        if self.tries > 1:
            connection.execute(raised(self._database, 1))
            return
        held, about = threading.Event(), threading.Event()

        def other() -> None:
            with self._database.engine.begin() as rival:
                if rival.dialect.name == "postgresql":
                    rival.execute(sa.text("set local deadlock_timeout = '30s'"))
                for bucket in (2, 3):  # InnoDB undoes whoever has changed less
                    rival.execute(raised(self._database, bucket))
                held.set()
                assert about.wait(10)
                rival.execute(raised(self._database, 1))

        thread = threading.Thread(target=other)
        thread.start()
        try:
            assert held.wait(10)
            connection.execute(raised(self._database, 1))
            about.set()
            if connection.dialect.name == "postgresql":  # where whoever looks after the other waits is the victim
                wait_until(self._rival_waits, 10)
                connection.execute(sa.text("set local deadlock_timeout = '20ms'"))
            connection.execute(raised(self._database, 2))
        finally:
            about.set()
            self._thread = thread

    def _rival_waits(self) -> bool:
        waiting = (
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        )
        with self._database.engine.connect() as connection:
            return connection.scalar(sa.text(waiting)) == 1

    def join(self) -> None:
        self._thread.join(10)


@pytest.mark.parametrize("kind", ["as its URL says", "sync"])
async def test_the_victim_of_a_deadlock(database: Database, kind: str) -> None:
    url = database_url(database.url) if kind == "sync" else database.url
    store = open_store(url, database.tables)
    deadlock = Deadlock(database)
    await store.run(deadlock.work)
    deadlock.join()
    assert deadlock.tries == 2
    assert [row.epoch for row in database.rows("lease")[:5]] == [0, 2, 1, 1, 0]
    await store.close()


async def test_what_could_not_be_serialized(on_postgresql: Database) -> None:
    store = open_store(on_postgresql.url, on_postgresql.tables)
    tries = 0

    def work(connection: sa.Connection, until: int) -> None:
        nonlocal tries
        # the relay's own are READ COMMITTED, where this cannot be
        connection.execute(sa.text("set transaction isolation level serializable"))
        connection.execute(sa.select(on_postgresql.tables.lease)).all()
        tries += 1
        if tries < until:
            on_postgresql.execute(raised(on_postgresql, 1))
        connection.execute(raised(on_postgresql, 1))

    await store.run(lambda c: work(c, 3))
    assert tries == 3
    assert on_postgresql.rows("lease")[1].epoch == 3
    tries = 0
    with pytest.raises(StoreUnavailable, match="could not serialize"):
        await store.run(lambda c: work(c, 100))
    assert tries == TRIES  # not for ever
    await store.close()


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_relays_on_an_engine_of_that_isolation_send_everything(on_postgresql: Database, isolation: Any) -> None:
    engine = sa.create_engine(database_url(on_postgresql.url), isolation_level=isolation)
    failing: set[str] = set()

    def script(row: Any, tries: int) -> Outcome | None:
        if row.key == "k1" and tries < 1 and not failing:
            failing.add(row.id)
        return Outcome.retry("not now") if row.id in failing and tries < 1 else None

    broker = Scripted(script)
    ids = on_postgresql.add(*(f"k{n % 7}" for n in range(200)))
    async with running(Relay(on_postgresql.outbox, database=engine, transport=broker, limits=QUICK)) as relay:
        await eventually(lambda: len(broker.stored) == 200)
        await eventually(lambda: on_postgresql.count() == on_postgresql.count("parked") == 0)
    engine.dispose()
    assert relay.counts.dead == 0
    assert sorted(broker.ids()) == sorted(ids)
