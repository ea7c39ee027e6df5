"""What goes through: in order, once, and gone from the table after the acknowledgement and not before."""

from __future__ import annotations

import asyncio
import random

import pytest

from outbox.errors import StoreUnavailable
from outbox.relay import Limits, Relay
from outbox.relay.flow import Flow
from outbox.relay.routes import Route
from tests.relay.database import Database
from tests.relay.faulty import faulty_stores, gone
from tests.relay.running import QUICK, eventually, relay, running
from tests.relay.scripted import Scripted

PIPELINES = pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "lanes"])


def flow_of(found: Relay) -> Flow:
    assert found._flow is not None
    return found._flow


def _is_empty(route: Route) -> bool:
    return not route.publishing and not route.lanes and not route._rows and not route._bytes


def is_empty(found: Relay) -> bool:
    flow = flow_of(found)
    return not flow._in_flight and not flow._acked and all(_is_empty(route) for route in flow.routes)


@PIPELINES
async def test_what_is_committed_is_sent_in_order_and_removed(database: Database, pipeline: bool) -> None:
    keys = [f"k{n % 7}" for n in range(500)]
    ids = database.add(*keys, *[None] * 20)
    broker = Scripted(pipeline=pipeline)
    broker.delay = lambda: random.random() * 0.02
    found = relay(database, broker, limits=Limits(batch=50, window=200, poll=0.01))
    drained = await found.adrain()
    assert (drained.sent, drained.parked, drained.dead) == (520, 0, 0)
    assert sorted(broker.ids()) == sorted(ids)
    for of_key in set(keys):
        assert [row.id for row in broker.stored if row.key == of_key] == [
            id for id, key in zip(ids, keys, strict=False) if key == of_key
        ]
    assert database.count() == 0
    assert is_empty(found)


async def test_without_a_pipeline_a_message_waits_for_its_predecessors_acknowledgement(database: Database) -> None:
    database.add("a", "a", "b")
    broker = Scripted(pipeline=False)
    broker.answering.clear()
    async with running(relay(database, broker)):
        await eventually(lambda: broker.keys() == ["a", "b"])
        await asyncio.sleep(0.1)
        assert broker.keys() == ["a", "b"]
        broker.answering.set()
        await eventually(lambda: broker.keys() == ["a", "b", "a"])


async def test_with_a_pipeline_messages_of_a_key_are_in_flight_together(database: Database) -> None:
    database.add("a")
    broker = Scripted()
    broker.answering.clear()
    async with running(relay(database, broker)):
        await eventually(lambda: broker.keys() == ["a"])
        database.add("a")
        await eventually(lambda: len(broker.calls) == 2)
        broker.answering.set()


async def test_nothing_is_removed_before_the_broker_has_acknowledged_it(database: Database) -> None:
    database.add("a", "b")
    broker = Scripted()
    broker.answering.clear()
    found = relay(database, broker)
    async with running(found):
        await eventually(lambda: broker.keys() == ["a", "b"])
        await asyncio.sleep(0.1)
        assert database.count() == 2
        broker.answering.set()
        await eventually(lambda: database.count() == 0)
        await eventually(lambda: is_empty(found))
    assert broker.keys() == ["a", "b"]


async def test_the_window_bounds_what_is_in_memory_by_rows(database: Database) -> None:
    database.add(*["k"] * 100)
    broker = Scripted()
    broker.answering.clear()
    async with running(relay(database, broker, limits=Limits(batch=10, window=30, poll=0.01))):
        await eventually(lambda: sum(map(len, broker.calls)) == 30)
        await asyncio.sleep(0.1)
        assert sum(map(len, broker.calls)) == 30
        broker.answering.set()
        await eventually(lambda: len(broker.stored) == 100)


async def test_the_window_bounds_what_is_in_memory_by_bytes(database: Database) -> None:
    database.add(*["k"] * 60, payload=b"x" * 100_000)
    broker = Scripted()
    broker.answering.clear()
    async with running(relay(database, broker, limits=Limits(batch=10, window_bytes=2_000_000, poll=0.01))):
        await eventually(lambda: sum(map(len, broker.calls)) >= 15)
        await asyncio.sleep(0.1)
        assert sum(map(len, broker.calls)) <= 30
        broker.answering.set()
        await eventually(lambda: len(broker.stored) == 60)


async def test_a_message_larger_than_the_window_goes_alone(database: Database) -> None:
    database.add("a", "b", payload=b"x" * 500_000)
    drained = await relay(database, Scripted(), limits=Limits(window_bytes=100_000, poll=0.01)).adrain()
    assert drained.sent == 2


@PIPELINES
async def test_a_settle_that_fails_sends_again_and_loses_nothing(
    database: Database, pipeline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = database.add(*[f"k{n % 3}" for n in range(60)])
    broker = Scripted(pipeline=pipeline)
    failures = iter([gone("settle"), gone("settle"), KeyError("not foreseen")])
    with faulty_stores(monkeypatch) as stores:
        found = relay(database, broker)
        async with running(found):
            await eventually(lambda: stores)
            stores[0].before = lambda what: next(failures, None) if what == "settle" else None
            await eventually(lambda: database.count() == 0)
            await eventually(lambda: is_empty(found))
    assert set(broker.ids()) == set(ids)
    assert broker.first_ids() == ids or not pipeline


async def test_a_database_that_refuses_deletes_does_not_make_a_storm_of_duplicates(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.add("a")
    broker = Scripted()
    with faulty_stores(monkeypatch) as stores:
        async with running(relay(database, broker)):
            await eventually(lambda: stores)
            stores[0].before = lambda what: gone("permission denied") if what == "settle" else None
            await asyncio.sleep(1.5)
            assert 1 <= len(broker.stored) <= 6
            stores[0].before = lambda what: None
            await eventually(lambda: database.count() == 0)


async def test_a_read_that_fails_is_tried_again_and_nothing_is_lost(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Scripted()
    reads = iter([gone("read"), None, ValueError("not foreseen"), StoreUnavailable("again")] * 3)
    with faulty_stores(monkeypatch) as stores:
        async with running(relay(database, broker)):
            await eventually(lambda: stores)
            stores[0].before = lambda what: next(reads, None) if what == "read" else None
            ids = [id for n in range(20) for id in database.add(f"k{n % 4}")]
            await eventually(lambda: database.count() == 0)
    assert broker.first_ids() == ids


async def test_rows_that_come_while_the_table_is_polled_are_sent_soon(database: Database) -> None:
    broker = Scripted()
    async with running(relay(database, broker, limits=QUICK)):
        for n in range(10):
            await asyncio.to_thread(database.add, f"k{n}")
            await eventually(lambda n=n: len(broker.stored) == n + 1, 5)  # type: ignore[misc]


async def test_a_nudge_ends_the_pause_also_when_it_comes_during_a_read(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Scripted()
    with faulty_stores(monkeypatch) as stores:
        found = relay(database, broker, limits=Limits(poll=30.0))
        async with running(found):
            await eventually(lambda: stores and stores[0].seen.count("read") > 2)

            def commit_after_the_read(what: str) -> None:
                if what == "read" and not database.count():
                    database.add("a")
                    flow_of(found).wake()

            stores[0].after = commit_after_the_read
            flow_of(found).wake()
            await eventually(lambda: broker.keys()[:1] == ["a"], 5)  # once it is settled, the next read adds another


@PIPELINES
async def test_late_commits_do_not_invert_a_key(on_postgresql: Database, pipeline: bool) -> None:
    """Of one key, each begun after the previous one was committed; of others, open meanwhile."""
    database = on_postgresql
    broker = Scripted(pipeline=pipeline)
    ids: list[str] = []
    async with running(relay(database, broker)):
        for n in range(15):
            with database.open_transaction() as slow:
                ids += database.add("slow", connection=slow)
                database.add(*["quick"] * 3)
                await eventually(lambda n=n: broker.keys().count("quick") == 3 * n + 3)  # type: ignore[misc]
            ids += database.add("slow")
        await eventually(lambda: database.count() == 0)
    assert [row.id for row in broker.stored if row.key == "slow"] == ids
