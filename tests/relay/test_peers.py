"""The defects that other outbox libraries have in their relays (one test a line of our list), and what happens here."""

from __future__ import annotations

import asyncio
import datetime as dt

from outbox._outgoing import Outgoing
from outbox.relay import Limits
from outbox.relay.leases import Leases
from outbox.stores import open_store
from outbox.transport import Outcome
from tests.relay.database import Database
from tests.relay.running import QUICK, eventually, relay, running
from tests.relay.scripted import Scripted
from tests.relay.test_leases import cannot_renew


async def test_broker_down_for_ten_minutes_spends_no_attempt_and_deletes_nothing(database: Database) -> None:
    """There: attempts burn out, and the row is deleted after the last one."""
    down = True
    broker = Scripted(lambda row, tries: Outcome.unavailable("down") if down else None)
    ids = database.add("a", "a", "b")
    async with running(relay(database, broker, limits=Limits(poll=0.01, attempts=1))):
        await eventually(lambda: broker.tries[ids[0]] >= 4)  # more often than the budget allows
        assert database.count() == 3
        down = False
        await eventually(lambda: database.count() == 0)
    assert broker.ids() == ids
    assert database.count("dead_letter") == 0


async def test_two_relays_one_slow_the_slow_one_settles_nothing_of_the_others(database: Database) -> None:
    """There: a stale worker sets ``published`` back to ``pending``, and the message is sent again and again."""
    slow, quick = Scripted(lambda row, tries: Outcome.retry("late")), Scripted()
    slow.answering.clear()
    first = relay(database, slow, lease=1)
    async with running(first):
        ids = database.add("k", "k")
        await eventually(lambda: slow.calls)
        cannot_renew(first)
        async with running(relay(database, quick, lease=1)):
            await eventually(lambda: database.count() == 0)
            slow.answering.set()
            await asyncio.sleep(0.3)
            assert quick.ids() == ids
            assert database.count("parked") == database.count() == 0


async def test_claimed_row_of_a_dead_worker_is_sent_by_another(database: Database) -> None:
    """There: a row that was claimed is never looked at again."""
    ids = database.add("k")
    dead = Leases(open_store(database.url, database.tables), 0.6)
    await dead.renew()
    await dead.store.read(None, (), (), 10)
    await dead.store.close()
    broker = Scripted()
    async with running(relay(database, broker, lease=0.6)):
        await eventually(lambda: broker.ids() == ids)


async def test_one_unroutable_event_at_the_head_is_parked_alone_and_others_flow(database: Database) -> None:
    """There: it raises out of the loop every time, and the whole outbox stops."""

    def script(row: Outgoing, tries: int) -> Outcome | Exception | None:
        if row.topic == "nowhere":
            return Outcome.unavailable("unknown topic", scope="topic")
        if row.key == "bad":
            return Outcome.retry("no route for it")
        return ValueError("cannot be routed") if row.key == "worse" else None

    broker = Scripted(script)
    database.add("x", topic="nowhere")
    database.add("bad")
    database.add("worse")
    ids = database.add("a", "b", "a")
    async with running(relay(database, broker, limits=Limits(poll=0.01, attempts=10**6, backoff=QUICK.backoff))):
        await eventually(lambda: set(broker.ids()) == set(ids))
        await eventually(lambda: database.count() + database.count("parked") == 3)
        assert database.count("dead_letter") == 0


async def test_a_failed_row_that_is_retried_keeps_its_place_in_its_key(database: Database) -> None:
    """There: it is sorted after the newer rows of the key."""
    broker = Scripted(lambda row, tries: Outcome.retry("once more") if tries < 2 and row.payload == b"1" else None)
    async with running(relay(database, broker)):
        ids = database.add("k", payload=b"1")
        ids += database.add("k", "k", payload=b"2")
        await eventually(lambda: database.count("parked") > 0)
        ids += database.add("k", payload=b"3")
        await eventually(lambda: database.count() == database.count("parked") == 0)
    assert broker.ids() == ids


async def test_order_does_not_come_from_a_clock(database: Database) -> None:
    """There: FIFO by the application's clock, which skewed clocks reorder."""
    ids = []
    for hours in (0, -5, 3, -1):
        ids += database.add("k", created_at=dt.datetime.now(dt.UTC) + dt.timedelta(hours=hours))
    broker = Scripted()
    await relay(database, broker).adrain()
    assert broker.ids() == ids


async def test_nothing_counts_as_sent_without_the_brokers_confirmation(database: Database) -> None:
    """There: published without waiting for the confirmation, marked as sent, lost."""
    database.add("k")
    broker = Scripted()
    broker.answering.clear()
    found = relay(database, broker, drain_timeout=0.2)
    async with running(found):
        await eventually(lambda: broker.stored)
        await asyncio.sleep(0.1)
        assert found.counts.sent == 0
    assert database.count() == 1


async def test_cleaning_up_removes_only_what_was_sent_in_small_transactions(database: Database) -> None:
    """There: one DELETE of everything, or of rows in any state."""
    done = database.add(*["a"] * 300)
    broker = Scripted(lambda row, tries: None if row.id in done else Outcome.unavailable("away", scope="topic"))
    kept = database.add(*["a"] * 50, topic="other")
    async with running(relay(database, broker, limits=Limits(batch=40, poll=0.01))):
        await eventually(lambda: database.count() == 50)
        await asyncio.sleep(0.1)
        assert [str(row.id) for row in database.rows("message")] == kept
