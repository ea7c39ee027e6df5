"""A relay's life: its start, with everything there or not; its stop, with everything in flight or not."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from collections.abc import AsyncIterator

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from outbox import ConfigurationError, Outbox, SchemaMismatch, StoreUnavailable, Unavailable
from outbox.dialects import clock
from outbox.relay import Relay, _relay, leases
from outbox.stores.engine import sync_engine_for
from outbox.transport import Outcome
from tests.relay.conftest import ON_EACH
from tests.relay.database import Database, row
from tests.relay.faulty import faulty_stores, gone
from tests.relay.proxy import Proxy
from tests.relay.running import eventually, relay, running
from tests.relay.scripted import Scripted
from tests.relay.test_flow import flow_of

# ------------------------------------------------------------ stopping


async def test_a_stop_finishes_what_is_in_flight_and_gives_the_leases_back(database: Database) -> None:
    ids = database.add(*["k"] * 30)
    broker = Scripted()
    broker.answering.clear()
    asyncio.get_running_loop().call_later(0.6, broker.answering.set)
    async with running(relay(database, broker)):
        await eventually(lambda: len(broker.stored) == 30)
        database.add("k")
    assert broker.ids()[:30] == ids
    assert database.count() <= 1
    assert all(row.owner is None for row in database.rows("lease"))
    assert database.count("relay") == 0
    assert broker.log == ["connect", "close"]


async def test_a_stop_ends_after_its_time_and_leaves_what_is_in_flight_to_be_sent_again(database: Database) -> None:
    ids = database.add("k")
    broker = Scripted()
    broker.answering.clear()
    loop = asyncio.get_running_loop()
    async with running(relay(database, broker, drain_timeout=0.3)):
        await eventually(lambda: broker.stored)
        begun = loop.time()
    assert 0.2 < loop.time() - begun < 3
    assert broker.log == ["connect", "abort"]
    assert database.count() == 1
    assert all(row.owner is None for row in database.rows("lease"))
    again = Scripted()
    await relay(database, again).adrain()
    assert again.ids() == ids


async def test_a_stop_while_the_broker_is_away_is_quick(database: Database) -> None:
    database.add("k")
    broker = Scripted(lambda row, tries: Outcome.unavailable("down"))
    loop = asyncio.get_running_loop()
    async with running(relay(database, broker)):
        await eventually(lambda: broker.calls)
        begun = loop.time()
    assert loop.time() - begun < 2
    assert database.count() == 1


# ------------------------------------------------------------ draining


async def test_a_drain_sends_what_is_there_and_can_be_repeated(database: Database) -> None:
    broker = Scripted()
    found = relay(database, broker)
    for _ in range(3):
        ids = database.add("a", "b")
        assert (await found.adrain()).sent == 2
        assert broker.ids()[-2:] == ids
    assert (await found.adrain()).sent == 0


@ON_EACH
async def test_a_drain_sends_what_was_scheduled_and_is_due(database: Database) -> None:
    now = dt.datetime.now(dt.UTC)
    due, later = row("a"), row("b")
    scheduled = database.tables.scheduled
    database.execute(sa.insert(scheduled).values(due | {"deliver_at": now - dt.timedelta(seconds=5)}))
    database.execute(sa.insert(scheduled).values(later | {"deliver_at": now + dt.timedelta(hours=1)}))
    broker = Scripted()
    assert (await relay(database, broker).adrain()).sent == 1
    assert broker.ids() == [str(due["id"])]
    assert database.count("scheduled") == 1


@ON_EACH
async def test_a_drain_tries_what_is_parked_and_due(database: Database) -> None:
    failing = Scripted(lambda row, tries: Outcome.retry("no"))
    async with running(relay(database, failing)):
        ids = database.add("k")
        await eventually(lambda: database.count("parked") == 1)
    database.execute(sa.update(database.tables.parked).values(next_attempt_at=clock(-1)))
    broker = Scripted()
    assert (await relay(database, broker).adrain()).sent == 1
    assert broker.ids() == ids


async def test_a_drain_says_that_the_broker_or_a_topic_is_away_and_keeps_the_rest(database: Database) -> None:
    database.add("a", "b", topic="up")
    database.add("a", topic="down")
    broker = Scripted(
        lambda row, tries: Outcome.unavailable("no such topic", scope="topic") if row.topic == "down" else None
    )
    with pytest.raises(Unavailable, match="no such topic"):
        await asyncio.wait_for(relay(database, broker).adrain(), 10)
    assert [row.topic for row in broker.stored] == ["up", "up"]
    assert database.count() == 1
    broker = Scripted(lambda row, tries: Outcome.unavailable("down"))
    with pytest.raises(Unavailable, match="down"):
        await asyncio.wait_for(relay(database, broker).adrain(), 10)
    assert database.count() == 1


@pytest.mark.parametrize("what", ["_renew", "look", "read", "settle"])
async def test_a_drain_ends_where_the_database_answers_and_refuses(
    what: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only one, for example: nobody who waits for the drain waits for ever."""
    monkeypatch.setattr(_relay, "PATIENCE", 0.5)
    database.add("k")
    with faulty_stores(monkeypatch) as stores:
        found = relay(database, Scripted())
        draining = asyncio.create_task(found.adrain())
        await eventually(lambda: stores)
        stores[0].before = lambda name: gone(name) if name == what else None
        with pytest.raises(StoreUnavailable, match=what):
            await asyncio.wait_for(draining, 10)
    assert database.count() == (0 if what == "look" else 1)


async def test_a_database_that_refuses_a_dead_letter_ends_the_drain_and_leaks_nothing(
    on_postgresql: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_relay, "PATIENCE", 1.0)
    table = on_postgresql.tables.dead_letter.fullname
    with on_postgresql.engine.begin() as connection:
        connection.exec_driver_sql(f"alter table {table} add constraint never check (attempts < 0)")
    on_postgresql.add("k", payload=b"PAYLOAD")
    with pytest.raises(StoreUnavailable, match="never"):
        await asyncio.wait_for(relay(on_postgresql, Scripted(lambda row, tries: Outcome.reject("no"))).adrain(), 15)
    assert on_postgresql.count() == 1
    assert "PAYLOAD" not in caplog.text


async def test_what_the_database_refuses_again_and_again_is_said_once(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing right was a line every two seconds, all night; its end and a new trouble are seen none the less."""
    with faulty_stores(monkeypatch) as stores:
        async with running(relay(database, Scripted())):
            await eventually(lambda: stores)
            stores[0].before = gone
            tried = len(stores[0].seen)
            await eventually(lambda: stores[0].seen[tried:].count("_renew") >= 4)
            stores[0].before = lambda name: None
            database.add("k")
            await eventually(lambda: database.count() == 0)
    said = [text for text in caplog.messages if "the test's fault: _renew" in text]
    assert said == ["the relay has a problem, and tries again: the test's fault: _renew"]


def test_a_drain_needs_no_event_loop(on_sqlite: Database) -> None:
    on_sqlite.add("k")
    found = Relay(on_sqlite.outbox, database=on_sqlite.url, transport="memory://drained")
    assert found.drain().sent == 1
    assert found.drain().sent == 0


# ------------------------------------------------------------ starting


async def test_tables_that_are_not_there_are_said_at_the_start(on_postgresql: Database) -> None:
    for other in (Outbox(prefix="other_"), Outbox(schema="elsewhere")):
        found = Relay(other, database=on_postgresql.url, transport=Scripted())
        with pytest.raises(SchemaMismatch):
            await found.arun(asyncio.Event())
        with pytest.raises(SchemaMismatch):
            async with found:
                pass


async def test_settings_that_are_wrong_are_said_at_the_start(
    on_sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUTBOX_TRANSPORT", raising=False)
    with pytest.raises(ConfigurationError, match="lease"):
        relay(on_sqlite, "memory:", lease=0.1)
    for transport, said in ((None, "OUTBOX_TRANSPORT"), ("nothing://", "no such transport")):
        with pytest.raises(ConfigurationError, match=said):
            async with relay(on_sqlite, transport):
                pass
        with pytest.raises(ConfigurationError, match=said):
            await relay(on_sqlite, transport).arun(asyncio.Event())


async def test_database_and_transport_come_from_the_environment(
    on_sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE", on_sqlite.url)
    monkeypatch.setenv("OUTBOX_TRANSPORT", "memory://from-the-environment")
    on_sqlite.add("k")
    assert (await Relay(on_sqlite.outbox).adrain()).sent == 1


async def test_an_engine_that_is_given_stays_the_callers(on_postgresql: Database) -> None:
    url = sa.make_url(on_postgresql.url).set(drivername="postgresql+psycopg")
    on_async = create_async_engine(url)
    for engine in (sync_engine_for(on_postgresql.url), on_async):
        on_postgresql.add("k")
        assert (await relay(on_postgresql, Scripted(), database=engine).adrain()).sent == 1
        if isinstance(engine, sa.Engine):
            with engine.connect() as connection:
                assert connection.scalar(sa.text("select 1")) == 1
            engine.dispose()
    async with on_async.connect() as connection:
        assert await connection.scalar(sa.text("select 1")) == 1
    await on_async.dispose()


async def test_it_has_started_once_it_owns_buckets_and_has_reached_the_broker(database: Database) -> None:
    broker = Scripted()
    broker.may_connect.clear()
    found = relay(database, broker)
    async with running(found):
        await eventually(lambda: found._flow is not None and len(flow_of(found).leases.epochs) == 64)
        assert not found.started.is_set()
        broker.may_connect.set()
        await asyncio.wait_for(found.started.wait(), 5)


# ------------------------------------------------------------ the database, away


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Database:
    found: Database = request.getfixturevalue(f"on_{request.param}")
    return found


@pytest.fixture
async def proxy(server: Database) -> AsyncIterator[Proxy]:
    found = Proxy(server.url)
    yield found
    await found.close()


async def test_a_database_away_at_the_start_is_waited_for(server: Database, proxy: Proxy) -> None:
    ids = server.add("k")
    broker = Scripted()
    async with running(relay(server, broker, database=proxy.url)):
        await asyncio.sleep(0.5)
        await proxy.start()
        await eventually(lambda: broker.ids() == ids)
        await eventually(lambda: server.count() == 0)


async def test_a_stop_ends_the_wait_for_a_database(server: Database, proxy: Proxy) -> None:
    loop = asyncio.get_running_loop()
    async with running(relay(server, Scripted(), database=proxy.url)):
        await asyncio.sleep(0.3)
        begun = loop.time()
    assert loop.time() - begun < 1.5


async def test_who_waits_for_the_start_is_told_after_some_seconds(
    server: Database, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_relay, "PATIENCE", 0.3)
    found = relay(server, Scripted(), database=proxy.url)
    with pytest.raises(StoreUnavailable):
        await found.adrain()
    with pytest.raises(StoreUnavailable):
        async with found:
            pass


async def test_a_database_that_goes_away_in_the_middle_costs_duplicates_at_most(server: Database, proxy: Proxy) -> None:
    await proxy.start()
    broker = Scripted()
    ids: list[str] = []
    async with running(relay(server, broker, database=proxy.url, lease=1)):
        for round in range(4):
            for _ in range(5):
                ids += server.add(*[f"k{n}" for n in range(8)])
                await asyncio.sleep(0.01)
            if round % 2:
                proxy.reset()
            else:
                proxy.refuse()
                await asyncio.sleep(0.3)
                await proxy.start()
            await eventually(lambda: server.count() == 0)
    assert set(broker.ids()) == set(ids)
    for key in range(8):
        of_key = ids[key::8]
        assert [id for id in broker.first_ids() if id in set(of_key)] == of_key


async def test_a_database_that_hangs_is_survived(server: Database, proxy: Proxy) -> None:
    await proxy.start()
    broker = Scripted()
    found = relay(server, broker, database=proxy.url, lease=1)
    async with running(found):
        ids = server.add("a")
        await eventually(lambda: broker.ids() == ids)
        proxy.hold()
        ids += server.add("a")
        await eventually(lambda: not flow_of(found).leases.epochs)
        proxy.release()
        await eventually(lambda: server.count() == 0)
    assert broker.first_ids() == ids


# ------------------------------------------------------------ beside an application


async def test_beside_an_application_it_sends_and_stops_with_the_block(database: Database) -> None:
    broker = Scripted()
    async with relay(database, broker) as found:
        ids = database.add("k")
        await eventually(lambda: broker.ids() == ids)
        assert found.counts.sent == 1
    assert database.count() == 0
    assert all(row.owner is None for row in database.rows("lease"))


async def test_beside_an_application_its_death_is_logged_and_the_application_goes_on(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Scripted()
    broker.connects = lambda times: ConfigurationError("no such user")
    async with relay(database, broker) as found:
        assert found._task is not None
        await eventually(found._task.done)
        await asyncio.sleep(0)
    assert [record.levelname for record in caplog.records if "has died" in record.message] == ["CRITICAL"]


# ------------------------------------------------------------ what nobody foresaw


async def test_an_error_that_nobody_foresaw_is_logged_with_its_trace_and_the_relay_goes_on(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Scripted()
    found = relay(database, broker, lease=1)
    failures = {"renew": 0, "move": 0}
    renew, move = leases.Leases.renew, _relay.move_due

    async def renewing(self: leases.Leases, *args: object, **options: object) -> None:
        failures["renew"] += 1
        if failures["renew"] in (2, 3, 4):
            raise KeyError("the renewal")
        await renew(self, *args, **options)  # type: ignore[arg-type]

    def moving(*args: object) -> int:
        failures["move"] += 1
        if failures["move"] in (2, 3, 4):
            raise KeyError("what is due")
        return move(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(leases.Leases, "renew", renewing)
    monkeypatch.setattr(_relay, "move_due", moving)
    async with running(found):
        await eventually(lambda: failures["renew"] > 5 and failures["move"] > 5)
        ids = database.add("k")
        await eventually(lambda: broker.ids() == ids)
    traced = [record for record in caplog.records if record.exc_info and record.levelno >= logging.ERROR]
    assert {str(record.exc_info[1]) for record in traced if record.exc_info} == {"'the renewal'", "'what is due'"}
