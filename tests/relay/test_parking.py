"""A message that fails: its key waits behind it, in order, and others flow; until it is sent, or given up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from outbox._outgoing import Outgoing
from outbox.relay import Limits
from outbox.transport import Outcome
from tests.relay.conftest import ON_EACH
from tests.relay.database import Database
from tests.relay.faulty import faulty_stores, gone
from tests.relay.running import QUICK, eventually, relay, running
from tests.relay.scripted import Script, Scripted
from tests.relay.test_flow import flow_of, is_empty

PIPELINES = pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "lanes"])
RETRY = Outcome.retry("not now")


def fails(key: str, times: int, outcome: Outcome = RETRY) -> Script:
    """The first message of this key that comes fails so often."""
    first: list[str] = []

    def script(row: Outgoing, tries: int) -> Outcome | None:
        if row.key == key and not first:
            first.append(row.id)
        return outcome if first == [row.id] and tries < times else None

    return script


def of(broker: Scripted, key: str) -> list[str]:
    return [row.id for row in broker.stored if row.key == key]


@ON_EACH
@PIPELINES
async def test_a_failed_message_holds_its_key_and_no_other(database: Database, pipeline: bool) -> None:
    failing = True
    broker = Scripted(lambda row, tries: RETRY if failing and row.key == "bad" else None, pipeline=pipeline)
    async with running(relay(database, broker, limits=Limits(poll=0.01, attempts=1000, backoff=QUICK.backoff))):
        ids = database.add("bad", "good", "bad", "good", "bad")
        await eventually(lambda: broker.keys() == ["good", "good"])
        await eventually(lambda: database.count("parked") == 3)
        ids += database.add("bad", "good")
        await eventually(lambda: database.count("parked") == 4)
        assert [row.role for row in database.rows("parked")] == ["head", "behind", "behind", "behind"]
        failing = False
        await eventually(lambda: database.count() == database.count("parked") == 0)
    assert of(broker, "bad") == [ids[0], ids[2], ids[4], ids[5]]
    assert broker.first_ids() == broker.ids()


@PIPELINES
@pytest.mark.parametrize("behind", ["retry", "unavailable"])
async def test_successors_in_flight_follow_their_failed_predecessor(
    database: Database, pipeline: bool, behind: str
) -> None:
    """They were handed over in later calls, which are answered in any order."""
    broker = Scripted(fails("k", 1), pipeline=pipeline)
    if behind == "unavailable":
        broker.behind = lambda row: Outcome.unavailable("behind", scope="topic")
    delays = iter([0.3, 0.0, 0.1, 0.0])
    broker.delay = lambda: next(delays, 0.0)
    broker.open.clear()
    ids: list[str] = []
    async with running(relay(database, broker)):
        for n in range(4):
            ids += database.add("k")
            await eventually(lambda n=n: len(broker.calls) == n + 1 or not pipeline)  # type: ignore[misc]
        broker.open.set()
        await eventually(lambda: database.count() == database.count("parked") == 0)
    assert broker.ids() == ids


async def test_a_successor_read_while_its_predecessor_is_being_parked_waits_behind_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Scripted(fails("k", 1))
    with faulty_stores(monkeypatch) as stores:
        async with running(relay(database, broker)):
            await eventually(lambda: stores)
            ids: list[str] = []

            def commit_a_successor(what: str) -> None:
                if what == "park" and len(ids) == 1:
                    ids.extend(database.add("k"))

            stores[0].before = commit_a_successor
            ids += database.add("k")
            await eventually(lambda: len(ids) == 2 and database.count() == database.count("parked") == 0)
    assert broker.ids() == ids


async def test_a_successor_is_not_parked_while_one_before_it_is_unanswered(database: Database) -> None:
    """Else a crash then leaves the first and the third of a key parked, and the second not: sent last."""
    answer = asyncio.Event()
    broker = Scripted(fails("k", 1000))
    answers = iter([0.0])
    publish = broker.publish

    async def slowly(batch: Any) -> Any:
        outcomes = await publish(batch)
        if next(answers, None) is None and len(broker.calls) == 2:
            await answer.wait()
        return outcomes

    broker.publish = slowly  # type: ignore[method-assign]
    broker.open.clear()
    async with running(relay(database, broker, limits=Limits(poll=0.01, attempts=1000, backoff=QUICK.backoff))):
        ids = database.add("k")
        await eventually(lambda: len(broker.calls) == 1)
        ids += database.add("k")
        await eventually(lambda: len(broker.calls) == 2)
        broker.open.set()
        await eventually(lambda: database.count("parked") == 1)
        ids += database.add("k")
        await asyncio.sleep(0.2)
        assert database.count("parked") == 1
        answer.set()
        await eventually(lambda: database.count("parked") == 3)
        assert [str(row.id) for row in database.rows("parked")] == ids


@ON_EACH
@PIPELINES
async def test_after_its_budget_a_message_becomes_a_dead_letter_and_its_key_goes_on(
    database: Database, pipeline: bool
) -> None:
    broker = Scripted(fails("k", 1000), pipeline=pipeline)
    async with running(relay(database, broker)):
        ids = database.add("k", "k", "k", payload=b"1")
        await eventually(lambda: database.count() == database.count("parked") == 0)
    assert broker.ids() == ids[1:]
    (letter,) = database.rows("dead_letter")
    assert (str(letter.message_id), letter.reason, letter.attempts, letter.payload) == (
        ids[0],
        "retries-exhausted",
        QUICK.attempts,
        b"1",
    )
    assert broker.tries[ids[0]] == QUICK.attempts
    assert letter.first_failed_at is not None


@pytest.mark.parametrize("attempts", [1, 2, 5])
async def test_a_message_is_tried_as_often_as_the_budget_says(database: Database, attempts: int) -> None:
    broker = Scripted(lambda row, tries: RETRY if row.key == "bad" else None)
    async with running(relay(database, broker, limits=Limits(poll=0.01, attempts=attempts, backoff=QUICK.backoff))):
        ids = database.add("bad", None, "good", "bad")
        await eventually(lambda: database.count() == database.count("parked") == 0)
    assert broker.tries == {ids[0]: attempts, ids[1]: 1, ids[2]: 1, ids[3]: attempts}
    assert [row.attempts for row in database.rows("dead_letter")] == [attempts, attempts]


@PIPELINES
async def test_a_rejected_message_becomes_a_dead_letter_at_once_and_its_key_flows(
    database: Database, pipeline: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def script(row: Outgoing, tries: int) -> Outcome | None:
        return Outcome.reject("too large") if row.payload == b"large" else None

    broker = Scripted(script, pipeline=pipeline)
    async with running(relay(database, broker)):
        with database.open_transaction() as connection:
            ids = database.add("k", connection=connection)
            ids += database.add("k", None, connection=connection, payload=b"large")
            ids += database.add("k", connection=connection)
        await eventually(lambda: database.count() == 0)
    assert broker.ids() == [ids[0], ids[3]]
    letters = {str(row.message_id): row for row in database.rows("dead_letter")}
    assert set(letters) == {ids[1], ids[2]}
    assert {(row.reason, row.attempts) for row in letters.values()} == {("rejected", 1)}
    assert f"message {ids[1]} for orders is a dead letter (rejected): too large" in caplog.messages
    assert not any(broker.tries[id] > 1 for id in ids)


@ON_EACH
async def test_a_rejected_message_among_those_behind_does_not_send_its_successors_twice(database: Database) -> None:
    broker = Scripted(fails("k", 1))
    script = broker.script
    broker.script = lambda row, tries: Outcome.reject("no") if row.payload == b"no" else script(row, tries)
    with database.open_transaction() as connection:
        ids = database.add("k", "k", connection=connection)
        ids += database.add("k", connection=connection, payload=b"no")
        ids += database.add("k", connection=connection)
    async with running(relay(database, broker)):
        await eventually(lambda: database.count() == database.count("parked") == 0)
    assert broker.ids() == [ids[0], ids[1], ids[3]]
    assert [str(row.message_id) for row in database.rows("dead_letter")] == [ids[2]]


async def test_messages_committed_while_their_key_is_released_are_sent_in_order(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Scripted(lambda row, tries: RETRY if tries == 0 and row.payload == b"head" else None)
    ids: list[str] = []
    with faulty_stores(monkeypatch) as stores:
        async with running(relay(database, broker)):
            await eventually(lambda: stores)

            def commit_around_the_release(what: str) -> None:
                if what == "sent":
                    ids.extend(database.add("k"))

            stores[0].before = stores[0].after = commit_around_the_release
            for _ in range(5):
                ids += database.add("k", payload=b"head")
                await eventually(lambda: database.count() == database.count("parked") == 0)
    assert len(ids) > 10
    assert broker.ids() == ids


@ON_EACH
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["park", "sent", "dead", "failed_again"])
async def test_a_transaction_that_fails_or_whose_outcome_is_unknown_loses_and_inverts_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch, what: str, when: str
) -> None:
    """Also, no message waits behind nothing: the keys that are parked are asked for again."""
    limits = Limits(poll=0.01, attempts=3, backoff=QUICK.backoff)
    broker = Scripted(
        lambda row, tries: {b"retry": RETRY if tries < 2 else None, b"dead": RETRY}.get(row.payload or b"")
    )
    faults = {"left": 1}

    def fault(asked: str) -> Exception | None:
        if asked == what and faults["left"]:
            faults["left"] -= 1
            return gone(what)
        return None

    with faulty_stores(monkeypatch) as stores:
        async with running(relay(database, broker, limits=limits)):
            await eventually(lambda: stores)
            setattr(stores[0], when, fault)
            ids = []
            for n in range(6):
                ids += database.add("k", payload=[b"", b"retry", b"dead"][n % 3])
            await eventually(lambda: database.count() == database.count("parked") == 0 and not faults["left"])
    dead = [str(row.message_id) for row in database.rows("dead_letter")]
    assert sorted(dead) == sorted([ids[2], ids[5]])
    assert broker.first_ids() == [id for id in ids if id not in dead]


@ON_EACH
async def test_what_lost_its_head_by_hand_is_found_when_its_key_goes_on(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = True
    broker = Scripted(lambda row, tries: RETRY if failing else None)
    found = relay(database, broker, limits=Limits(poll=0.01, attempts=1000, backoff=QUICK.backoff))
    with faulty_stores(monkeypatch) as stores:
        async with running(found):
            ids = database.add("k", "k")
            await eventually(lambda: database.count("parked") == 2)
            parked = database.tables.parked
            database.execute(sa.delete(parked).where(parked.c.role == "head"))
            looks = stores[0].seen.count("look")
            await eventually(lambda: stores[0].seen.count("look") > looks + 2)
            await eventually(lambda: not flow_of(found).retrying.trying)
            failing = False
            ids += database.add("k")
            await eventually(lambda: database.count() == database.count("parked") == 0)
    assert broker.ids() == ids[1:]


async def test_a_relay_started_later_goes_on_where_the_first_one_parked(database: Database) -> None:
    limits = Limits(poll=0.01, attempts=1000, backoff=QUICK.backoff)
    failing = Scripted(fails("k", 1000))
    async with running(relay(database, failing, limits=limits)):
        ids = database.add("k", "k")
        await eventually(lambda: database.count("parked") == 2)
    ids += database.add("k")
    broker = Scripted()
    async with running(relay(database, broker, limits=limits)):
        await eventually(lambda: database.count() == database.count("parked") == 0)
    assert broker.ids() == ids


async def test_what_was_held_back_is_not_forgotten_in_memory_when_the_flow_goes_quiet_meanwhile(
    database: Database,
) -> None:
    """A topic becomes unavailable while successors of a parked key, just read, wait for their turn to be parked. Taken off
    the page but neither parked nor dropped, they counted as in flight for ever: later messages of the key overtook them."""
    failing = True
    broker = Scripted(lambda row, tries: RETRY if failing and row.id == ids[0] else None)
    found = relay(database, broker, limits=Limits(poll=0.01, attempts=1000, backoff=QUICK.backoff))
    ids = database.add("k")
    async with running(found):
        await eventually(lambda: database.count("parked") == 1)
        flow = flow_of(found)
        async with flow.retrying._lock:  # somebody else's transaction about parked keys
            ids += database.add("k", "k")
            await eventually(lambda: len(flow._in_flight) == 2)
            next(iter(flow.routes)).quiet = True  # as after an answer `unavailable`
        ids += database.add("k")
        await eventually(lambda: database.count("parked") == 4)
        failing = False
        await eventually(lambda: database.count() == database.count("parked") == 0)
        assert is_empty(found)
    assert broker.first_ids() == ids
