"""Who sends what: shared evenly, handed over without loss or disorder, taken over from the dead, refused to the late."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest
import sqlalchemy as sa

from outbox.dead_letters.record import Failure
from outbox.dialects import clock
from outbox.errors import LeaseLost, StoreUnavailable
from outbox.relay import Limits, Relay, parking
from outbox.relay.leases import Leases
from outbox.stores import open_store
from outbox.transport import Outcome
from tests.relay.conftest import ON_EACH
from tests.relay.database import Database
from tests.relay.faulty import faulty_stores
from tests.relay.running import QUICK, eventually, relay, running
from tests.relay.scripted import Scripted
from tests.relay.test_flow import flow_of

FEW = Limits(batch=20, window=60, poll=0.01, backoff=QUICK.backoff)


def shares(database: Database) -> list[int]:
    """How many buckets each owner has, sorted; those without an owner are left out."""
    owners = Counter(row.owner for row in database.rows("lease") if row.owner is not None)
    return sorted(owners.values())


def cannot_renew(found: Relay) -> None:
    """Its leases run out, and it is not told."""

    async def refused(*args: object, **options: object) -> None:
        raise StoreUnavailable("the test's fault")

    flow_of(found).leases.renew = refused  # type: ignore[method-assign]


def expire(database: Database) -> None:
    """As if the lease time had passed without a renewal."""
    lease, relays = database.tables.lease, database.tables.relay
    database.execute(sa.update(lease).values(expires_at=clock(-1)))
    database.execute(sa.update(relays).values(heartbeat_at=clock(-60)))


@ON_EACH
async def test_relays_share_the_buckets_evenly_within_seconds(database: Database) -> None:
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        for expected in ([64], [32, 32], [20, 22, 22]):
            begun = loop.time()
            await stack.enter_async_context(running(relay(database, Scripted(), lease=3)))
            await eventually(lambda expected=expected: shares(database) == expected)  # type: ignore[misc]
            assert loop.time() - begun < 5
    assert shares(database) == []
    assert database.count("relay") == 0


@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "lanes"])
async def test_buckets_change_hands_without_loss_or_disorder_and_without_duplicates(
    database: Database, pipeline: bool
) -> None:
    """Under load, with one shared log: what a relay gave back is not in its memory any more."""
    first, second = Scripted(pipeline=pipeline), Scripted(pipeline=pipeline)
    second.stored = first.stored
    for broker in (first, second):
        broker.delay = lambda: random.random() * 0.01
    ids: list[str] = []
    over = asyncio.Event()

    async def write() -> None:
        while not over.is_set():
            ids.extend(await asyncio.to_thread(database.add, *[f"k{random.randrange(50)}" for _ in range(20)]))

    writing = asyncio.create_task(write())
    async with running(relay(database, first, lease=4, limits=FEW)):
        await eventually(lambda: len(first.stored) > 100)
        for _ in range(2):
            seen = len(second.calls)
            async with running(relay(database, second, lease=4, limits=FEW)):
                await eventually(lambda: shares(database) == [32, 32])
                await eventually(lambda seen=seen: len(second.calls) > seen + 5)  # type: ignore[misc]
        over.set()
        await writing
        await eventually(lambda: database.count() == 0)
    assert sorted(first.ids()) == sorted(ids)
    wanted, found = {}, {}  # type: dict[Any, list[int]], dict[Any, list[int]]
    for row in sorted(first.stored, key=lambda row: row.position):
        wanted.setdefault(row.key, []).append(row.position)
    for row in first.stored:
        found.setdefault(row.key, []).append(row.position)
    assert found == wanted


@ON_EACH
async def test_a_dead_relays_share_is_taken_over_when_its_lease_has_run_out(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "outbox.relay")
    dead = Leases(open_store(database.url, database.tables), 1.0)
    await dead.renew()
    assert len(dead.epochs) == 64
    ids = database.add(*[f"k{n}" for n in range(100)])
    broker = Scripted()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with running(relay(database, broker, lease=1)):
        await eventually(lambda: database.count() == 0)
        assert 0.3 < loop.time() - begun < 5
    assert broker.first_ids() == ids == broker.ids()
    waits = [text for text in caplog.messages if text.startswith("owns no bucket yet")]
    assert len(waits) == 1
    assert re.search(rf"held by {dead.owner} \(64 for [01] s\)$", waits[0])
    await dead.store.close()


@ON_EACH
async def test_a_relay_that_was_paused_changes_nothing_of_what_another_took_over(database: Database) -> None:
    ids = database.add("k", "k", "other")
    store = open_store(database.url, database.tables)
    paused = Leases(store, 1.0)
    await paused.renew()
    rows = await store.read(None, (), (), 10)
    expire(database)
    taker = Leases(store, 1.0)
    await taker.renew()
    assert set(taker.epochs) == set(range(64))
    tables, fence = database.tables, paused.fence
    failure = Failure("rejected")
    for attempt in (
        lambda c: parking.park(c, tables, fence, rows[0], [rows[1]], "no", 1.0),
        lambda c: parking.park(c, tables, fence, None, [rows[2]]),
        lambda c: parking.dead(c, tables, fence, rows[0], failure),
        lambda c: parking.sent(c, tables, fence, rows[:2]),
        lambda c: parking.failed_again(c, tables, fence, rows[0], "no", 1.0),
    ):
        with pytest.raises(LeaseLost, match="another relay's now"):
            await store.run(attempt)
    assert [str(row.id) for row in database.rows("message")] == ids
    assert database.count("parked") == database.count("dead_letter") == 0
    await paused.renew()
    assert paused.epochs == {}
    await store.close()


@ON_EACH
async def test_the_same_owner_with_an_old_epoch_is_refused_too(database: Database) -> None:
    store = open_store(database.url, database.tables)
    leases = Leases(store, 1.0)
    await leases.renew()
    lease = database.tables.lease
    database.execute(sa.update(lease).values(epoch=lease.c.epoch + 1))
    with pytest.raises(LeaseLost):
        await store.run(lambda c: leases.fence(c, {3}))
    await store.close()


@ON_EACH
async def test_parked_keys_are_known_before_anything_of_a_new_bucket_is_read(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Scripted(lambda row, tries: Outcome.retry("no") if row.key == "k" else None)
    async with running(relay(database, failing, limits=Limits(poll=0.01, attempts=1000))):
        ids = database.add("k")
        await eventually(lambda: database.count("parked") == 1)
    ids += database.add("k")
    broker = Scripted()
    reads: list[bool] = []
    with faulty_stores(monkeypatch) as stores:
        found = relay(database, broker)
        async with running(found):
            await eventually(lambda: stores)

            def look(what: str) -> None:
                if what == "read":
                    reads.append("k" in {key for _, _, key in flow_of(found).retrying.keys} or bool(broker.ids()))

            stores[0].before = look
            await eventually(lambda: database.count() == database.count("parked") == 0)
    assert reads[0]
    assert broker.ids() == ids


@ON_EACH
async def test_a_key_that_another_relay_released_meanwhile_flows_again(database: Database) -> None:
    """What was known of parked keys dies with the lease: a message behind nothing would wait for ever."""
    failing = True
    first = Scripted(lambda row, tries: Outcome.retry("no") if failing else None)
    found = relay(database, first, lease=1, limits=Limits(poll=0.01, attempts=1000, backoff=QUICK.backoff))
    async with running(found):
        database.add("k")
        await eventually(lambda: database.count("parked") == 1)
        renew = flow_of(found).leases.renew
        cannot_renew(found)
        await eventually(lambda: not flow_of(found).leases.epochs)
        expire(database)
        store = open_store(database.url, database.tables)
        other = Leases(store, 30.0)
        await other.renew()
        row = await store.run(lambda c: parking.due(c, database.tables, range(64), (), 10))  # type: ignore[arg-type]
        while not row:
            row = await store.run(lambda c: parking.due(c, database.tables, range(64), (), 10))  # type: ignore[arg-type]
        await store.run(lambda c: parking.sent(c, database.tables, other.fence, [row[0].row]))
        await other.release(leave=True)
        await store.close()
        flow_of(found).leases.renew = renew  # type: ignore[method-assign]
        failing = False
        ids = database.add("k")
        await eventually(lambda: database.count() == database.count("parked") == 0)
    assert ids[0] in first.ids()


async def test_rows_of_a_bucket_given_back_while_they_were_read_are_not_sent(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Scripted()
    with faulty_stores(monkeypatch) as stores:
        found = relay(database, broker, lease=30)
        async with running(found):
            await eventually(lambda: found.started.is_set())
            flow = flow_of(found)

            def give_back(what: str) -> None:
                if what == "read" and database.count() and len(flow.leases.epochs) == 64:
                    flow.leases.epochs = {}  # as `release` does before its statement

            stores[0].after = give_back
            database.add("k")
            await eventually(lambda: not flow.leases.epochs)
            await asyncio.sleep(0.1)
            assert broker.calls == []
            stores[0].after = lambda what: None


async def test_buckets_that_stay_ours_after_all_are_read_from_their_beginning(database: Database) -> None:
    """They were about to be handed over, so their rows were left out while the others' went by."""
    broker = Scripted()
    found = relay(database, broker, lease=30)
    async with running(found):
        await eventually(lambda: found.started.is_set())
        flow = flow_of(found)
        flow.retrying._trying[63] += 1  # keeps them from being given back
        flow.leases.surplus = frozenset(range(64)) - {0}
        database.add(*[f"k{n}" for n in range(200)])
        await eventually(lambda: database.count() < 200)
        await asyncio.sleep(0.5)
        assert database.count() > 150
        flow.leases.surplus = frozenset()
        await eventually(lambda: database.count() == 0, 5)


async def test_a_renewal_that_hangs_stops_the_sending_before_the_lease_can_be_anothers(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.add("k")
    broker = Scripted()
    broker.answering.clear()
    hang = asyncio.Event()
    hang.set()
    with faulty_stores(monkeypatch) as stores:
        found = relay(database, broker, lease=1)
        async with running(found):
            await eventually(lambda: len(broker.stored) == 1)
            run = stores[0].run

            async def hanging(work: Any) -> Any:
                await hang.wait()
                return await run(work)

            stores[0].run = hanging  # type: ignore[method-assign]
            hang.clear()
            flow, loop = flow_of(found), asyncio.get_running_loop()
            begun = loop.time()
            await eventually(lambda: not flow.leases.epochs, 5)
            assert loop.time() - begun < 1.1
            assert not flow._in_flight
            broker.answering.set()
            database.add("k")
            await asyncio.sleep(0.2)
            assert len(broker.calls) == 1
            hang.set()
            await eventually(lambda: database.count() == 0)
    assert len(set(broker.ids())) == 2


async def test_a_transport_opened_by_url_is_aborted_and_opened_anew_when_the_leases_run_out(
    on_sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was handed over before may be sent once the buckets can be someone else's."""
    from outbox.relay import _relay

    made: list[Scripted] = []

    def open_scripted(url: str) -> Scripted:
        made.append(Scripted())
        if len(made) == 1:
            made[0].open.clear()
        return made[-1]

    monkeypatch.setattr(_relay, "open_transport", open_scripted)
    ids = on_sqlite.add("k")
    found = relay(on_sqlite, "scripted:", lease=1)
    async with running(found):
        await eventually(lambda: made[0].calls if made else None)
        flow_of(found).leases._deadline = 0.0
        await eventually(lambda: len(made) == 2 and made[1].ids() == ids)
        assert made[0].log == ["connect", "abort"]
        assert made[0].stored == []


async def test_a_publish_that_outlives_its_lease_is_sent_again_by_the_next_owner(database: Database) -> None:
    """At worst duplicates, and the first deliveries are in order."""
    slow, quick = Scripted(), Scripted()
    quick.stored = slow.stored
    slow.answering.clear()
    ids = database.add("k", "k", "k")
    first = relay(database, slow, lease=1, drain_timeout=0.5)
    async with running(first):
        await eventually(lambda: len(slow.stored) == 3)
        cannot_renew(first)
        async with running(relay(database, quick, lease=1)):
            await eventually(lambda: len(slow.stored) >= 6)
            await eventually(lambda: database.count() == 0)
            ids += database.add("k")
            slow.answering.set()
            await eventually(lambda: database.count() == 0)
    assert slow.first_ids() == ids


async def test_a_short_lease_under_load_is_kept(database: Database) -> None:
    broker = Scripted()
    ids = []
    found = relay(database, broker, lease=1, limits=Limits(poll=0.01))
    async with running(found):
        for _ in range(25):
            ids += await asyncio.to_thread(database.add, *[f"k{n % 40}" for n in range(400)])
        await eventually(lambda: database.count() == 0, 60)
    assert set(broker.ids()) == set(ids)
    assert len(broker.ids()) < 1.5 * len(ids), "the leases were lost again and again"


async def test_a_retried_message_that_takes_long_does_not_cost_the_leases(database: Database) -> None:
    broker = Scripted(lambda row, tries: Outcome.retry("once") if tries == 0 and row.key == "bad" else None)
    found = relay(database, broker, lease=1, drain_timeout=10)
    async with running(found):
        ids = database.add("bad")
        await eventually(lambda: database.count("parked") == 1)
        broker.answering.clear()
        await eventually(lambda: broker.ids() == ids)
        epochs = flow_of(found).leases.epochs
        await asyncio.sleep(1.5)
        assert flow_of(found).leases.epochs == epochs
        assert len(epochs) == 64
        broker.answering.set()
        await eventually(lambda: database.count("parked") == 0)
    assert broker.ids() == ids


@ON_EACH
async def test_an_older_transaction_of_our_own_cannot_park_what_is_read_anew(database: Database) -> None:
    """Its caller has given up on it, and its thread has not: were it to commit after the parked keys were asked for, the
    successors of what it parks would overtake."""
    database.add("k")
    store = open_store(database.url, database.tables)
    leases = Leases(store, 10.0)
    await leases.renew()
    (row,) = await store.read(None, (), (), 10)
    tables, fence = database.tables, leases.fence
    assert await leases.begin(range(64), lambda c: parking.load_keys(c, tables, range(64))) == set()
    with pytest.raises(LeaseLost):
        await store.run(lambda c: parking.park(c, tables, fence, row, [], "late", 1.0))
    await store.run(lambda c: parking.park(c, tables, leases.fence, row, [], "in time", 1.0))
    await leases.renew()
    assert len(leases.epochs) == 64
    await store.close()
