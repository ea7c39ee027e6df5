"""A replica that takes no writes: everybody says so and what to do, nothing is lost, and once it is promoted all go on."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import outbox_migrations
from outbox.errors import StoreUnavailable
from outbox.relay import Relay
from outbox.relay.schedule import move_due
from outbox.stores import open_store
from outbox.stores.engine import sync_engine_for
from outbox.transports import memory
from tests.consumer.billing import Billing, Charge, OrderPlaced, charge, outbox, placed, running, until
from tests.relay.database import Database
from tests.relay.running import QUICK, eventually
from tests.relay.running import running as relay_running
from tests.relay.scripted import Scripted
from tests.services import MariadbServer, PostgresqlServer
from tests.services.mariadb import connected
from tests.services.waiting import wait_until

SAID = "this server takes no writes: it is a replica"


@pytest.fixture
def billing(postgresql: PostgresqlServer) -> Iterator[Billing]:
    """On the primary."""
    url, name = postgresql.create_database(), uuid.uuid4().hex
    outbox_migrations.migrate(engine := sync_engine_for(url))
    engine.dispose()
    found = Billing(url, f"memory://{name}")
    yield found
    found.close()
    memory.forget(name)
    postgresql.drop_database(url)


@pytest.fixture
def replica(billing: Billing, standby: PostgresqlServer) -> str:
    """The URL of the same database on the standby, which has caught up."""
    url = urlunsplit(urlsplit(billing.url)._replace(netloc=urlsplit(standby.url).netloc))
    with billing.engine.connect() as connection:
        end = connection.exec_driver_sql("select pg_current_wal_lsn()").scalar()
    with psycopg.connect(standby.url, autocommit=True) as connection:
        replayed = "select pg_last_wal_replay_lsn() >= %s::pg_lsn"
        assert wait_until(lambda: connection.execute(replayed, [end]).fetchone() == (True,), 30)
    return url


def run_outbox(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "outbox", *arguments], capture_output=True, text=True, timeout=60)


def promote(standby: PostgresqlServer) -> None:
    with psycopg.connect(standby.url, autocommit=True) as connection:
        assert connection.execute("select pg_promote()").fetchone() == (True,)


async def test_a_relay_says_so_sends_nothing_and_goes_on_once_it_is_promoted(
    billing: Billing, replica: str, standby: PostgresqlServer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = sync_engine_for(replica)
    with Session(billing.engine) as session, session.begin():
        outbox.add_all(session, [OrderPlaced(n) for n in range(20)])
    broker = Scripted()
    found = Relay(outbox, database=replica, transport=broker, limits=QUICK)
    async with relay_running(found):
        await eventually(lambda: SAID in caplog.text)
        assert "read-only transaction" in caplog.text
        assert broker.stored == []
        promote(standby)
        await eventually(lambda: len(broker.stored) == 20)
        await eventually(lambda: count(engine, billing.tables.message) == 0)
    assert sorted(broker.keys()) == sorted(str(n) for n in range(20))
    engine.dispose()


async def test_a_consumer_says_so_spends_no_attempt_and_goes_on_once_it_is_promoted(
    billing: Billing, replica: str, standby: PostgresqlServer, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = billing.consumer(database=replica)
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        await billing.publish(*(placed(n) for n in range(5)))
        await until(lambda: SAID in (consumer.state.database or ""))
        assert SAID in caplog.text
        promote(standby)
        await until(lambda: consumer.state.counts.handled == 5)
    engine = sync_engine_for(replica)
    assert count(engine, sa.table("charges")) == 5
    assert count(engine, billing.tables.attempt) == count(engine, billing.tables.dead_letter) == 0
    engine.dispose()


def test_adding_and_claiming_fail_in_the_transaction_that_does_it(billing: Billing, replica: str) -> None:
    engine = sync_engine_for(replica)
    with Session(engine) as session:
        outbox.add(session, OrderPlaced(1))
        with pytest.raises(sa.exc.InternalError, match="read-only transaction"):
            session.commit()
        session.rollback()
        assert session.scalar(sa.select(sa.func.count(Charge.id))) == 0
        session.commit()  # nothing of it is left
        with pytest.raises(sa.exc.InternalError, match="read-only transaction"):
            outbox.claim(session, "billing", uuid.uuid4())
    engine.dispose()


def test_commands_that_write_say_what_to_do_and_those_that_ask_work(
    billing: Billing, replica: str, tmp_path: Path
) -> None:
    elsewhere = urlunsplit(urlsplit(replica)._replace(path="/postgres"))  # where nothing is yet
    for result in (
        run_outbox("migrate", "--database", elsewhere),
        run_outbox("relay", "--drain", "--database", replica, "--transport", f"local://{tmp_path / 'broker.db'}"),
    ):
        assert result.returncode == 3
        assert SAID in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
    result = run_outbox("status", "--json", "--database", replica)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["pending"] == 0


async def test_a_mariadb_that_is_read_only_is_one_too(killable_mariadb: MariadbServer) -> None:
    url = killable_mariadb.create_database()
    with connected(killable_mariadb.url) as root:
        user = f"u_{uuid.uuid4().hex[:12]}"
        root.execute(f"CREATE USER {user}@'127.0.0.1'")
        root.execute(f"GRANT ALL ON {urlsplit(url).path[1:]}.* TO {user}@'127.0.0.1'")
        database = Database(url).create()
        database.add("a")
        root.execute("SET GLOBAL read_only = ON")
        try:
            store = open_store(url.replace("root@", f"{user}@"), database.tables)
            rows = await store.read(None, (), (), 10)
            for write in (lambda: store.settle(rows), lambda: store.run(lambda c: move_due(c, database.tables, 1))):
                with pytest.raises(StoreUnavailable, match=SAID):
                    await write()
            await store.close()
        finally:
            root.execute("SET GLOBAL read_only = OFF")
        assert database.count() == 1
        root.execute(f"DROP USER {user}@'127.0.0.1'")
    database.close()
    killable_mariadb.drop_database(url)


def count(engine: sa.Engine, table: sa.FromClause) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
