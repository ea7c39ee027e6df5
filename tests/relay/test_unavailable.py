"""While the broker, or a topic, is away: no attempt is spent, nothing is lost, others flow, and then it goes on in order."""

from __future__ import annotations

import asyncio
import time

import pytest

from outbox._outgoing import Outgoing
from outbox.errors import ConfigurationError, Unavailable
from outbox.relay import Limits
from outbox.transport import Outcome
from tests.relay.database import Database
from tests.relay.running import QUICK, eventually, relay, running
from tests.relay.scripted import Scripted
from tests.relay.test_flow import flow_of, is_empty

PIPELINES = pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "lanes"])


class Broker(Scripted):
    """One that can be away, wholly or by topic."""

    def __init__(self, *, pipeline: bool = True) -> None:
        super().__init__(pipeline=pipeline)
        self.away: set[str] = set()
        self.script = self.answer

    def answer(self, row: Outgoing, tries: int) -> Outcome | None:
        if "*" in self.away:
            return Outcome.unavailable("down")
        return Outcome.unavailable("no such topic", scope="topic") if row.topic in self.away else None


@PIPELINES
async def test_while_the_broker_is_away_no_attempt_is_spent_and_then_all_goes_in_order(
    database: Database, pipeline: bool
) -> None:
    broker = Broker(pipeline=pipeline)
    broker.away.add("*")
    ids = database.add(*["a", "b"] * 30)
    found = relay(database, broker, limits=Limits(poll=0.01, attempts=1, backoff=QUICK.backoff))
    async with running(found):
        await eventually(lambda: len(broker.calls) > 3)
        assert (database.count(), database.count("parked"), database.count("dead_letter")) == (60, 0, 0)
        ids += database.add("a", "b")
        broker.away.clear()
        await eventually(lambda: database.count() == 0)
        await eventually(lambda: is_empty(found))
    assert sorted(broker.ids()) == sorted(ids)
    for key, first in (("a", 0), ("b", 1)):
        assert [row.id for row in broker.stored if row.key == key] == ids[first::2]


async def test_while_the_broker_is_away_it_is_asked_less_and_less_often_and_with_few_messages(
    database: Database,
) -> None:
    broker = Broker()
    broker.away.add("*")
    database.add(*["k"] * 500)
    async with running(relay(database, broker)):
        await eventually(lambda: broker.calls)
        begun = time.monotonic()
        await eventually(lambda: len(broker.calls) >= 5)
        assert time.monotonic() - begun > 1  # pauses of 0.2, 0.4, 0.8 and 1.6 s, less their jitter
        assert all(len(call) <= 16 for call in broker.calls[1:])


@PIPELINES
async def test_a_topic_that_is_away_holds_up_no_other_and_comes_in_order_later(
    database: Database, pipeline: bool
) -> None:
    broker = Broker(pipeline=pipeline)
    broker.away.add("down")
    down = database.add("a", "b", "a", topic="down")
    found = relay(database, broker)
    async with running(found):
        for n in range(5):
            database.add(*["x"] * 100, topic="up")
            down += database.add("a", "b", "a", topic="down")
            await eventually(lambda n=n: len(broker.stored) == 100 * (n + 1))  # type: ignore[misc]
        assert {row.topic for row in broker.stored} == {"up"}
        assert "down" in flow_of(found).routes.troubles()
        broker.away.clear()
        await eventually(lambda: database.count() == 0)
    sent = [row for row in broker.stored if row.topic == "down"]
    for key, of_key in (("a", [id for n, id in enumerate(down) if n % 3 != 1]), ("b", down[1::3])):
        assert [row.id for row in sent if row.key == key] == of_key
    assert database.count("dead_letter") == database.count("parked") == 0


async def test_while_a_topic_is_away_the_others_keep_their_speed(database: Database) -> None:
    broker = Broker()
    broker.away.add("down")
    database.add("a", topic="down")
    async with running(relay(database, broker)):
        await eventually(lambda: broker.calls)
        database.add(*["x"] * 1000, topic="up")
        await eventually(lambda: len(broker.stored) == 1000)
        assert max(len(call) for call in broker.calls) > 100


async def test_a_successor_read_while_its_predecessor_was_refused_does_not_overtake(database: Database) -> None:
    """The row was left out of that read as being in flight, and is dropped before the read ends."""
    broker = Broker()
    broker.away.add("*")
    broker.open.clear()
    found = relay(database, broker)
    async with running(found):
        ids = database.add("k")
        await eventually(lambda: broker.calls)
        flow = flow_of(found)
        read, reads = flow.store.read, []

        async def read_slowly(*args: object) -> list[Outgoing]:
            rows = await read(*args)  # type: ignore[arg-type]
            reads.append(rows)
            if rows and broker.away:
                broker.open.set()
                await eventually(lambda: not flow._in_flight)
                for _ in range(10):
                    await asyncio.sleep(0)
                broker.away.clear()
            return rows

        flow.store.read = read_slowly  # type: ignore[method-assign, assignment]
        await eventually(lambda: reads)
        ids += database.add("k")
        await eventually(lambda: database.count() == 0)
    assert broker.ids() == ids


async def test_parked_messages_go_on_when_the_broker_is_back_also_if_nothing_else_is_there(
    database: Database,
) -> None:
    broker = Scripted()
    answers = {0: Outcome.retry("once")}
    broker.script = lambda row, tries: answers.get(tries, Outcome.unavailable("down")) if answers else None
    async with running(relay(database, broker)):
        ids = database.add("a", "a", "b")
        await eventually(lambda: database.count("parked") == 3)
        await eventually(lambda: max(broker.tries.values()) >= 3)
        answers.clear()
        await eventually(lambda: database.count("parked") == 0)
    assert sorted(broker.ids()) == sorted(ids)
    assert [row.id for row in broker.stored if row.key == "a"] == ids[:2]
    assert database.count("dead_letter") == 0


async def test_parked_messages_of_a_topic_that_is_away_do_not_starve_those_of_others(database: Database) -> None:
    failed = Outcome.retry("once")
    broker = Broker()
    away = broker.script
    broker.script = lambda row, tries: failed if tries == 0 else away(row, tries)
    async with running(relay(database, broker)):
        broker.open.clear()
        database.add(*[f"k{n}" for n in range(120)], topic="down")
        database.add("x", topic="up")
        await eventually(lambda: broker.calls)
        broker.away.add("down")
        broker.open.set()
        await eventually(lambda: [row.topic for row in broker.stored] == ["up"])
        broker.away.clear()
        await eventually(lambda: database.count("parked") == database.count() == 0)
    assert database.count("dead_letter") == 0


async def test_a_transport_that_raises_for_one_message_holds_up_only_that_one(database: Database) -> None:
    """It breaks its contract; the outbox must not stop at it all the same."""
    broker = Scripted(lambda row, tries: ZeroDivisionError("a bug") if row.key == "bad" else None)
    limits = Limits(poll=0.01, attempts=1000, backoff=QUICK.backoff)
    async with running(relay(database, broker, limits=limits)):
        ids = database.add("good", "bad", "good", "bad", *["other"] * 200)
        await eventually(lambda: len(set(broker.ids())) == 202)
        await eventually(lambda: database.count() == 0)
        assert [str(row.id) for row in database.rows("parked")] == [ids[1], ids[3]]
    assert broker.first_ids() == [id for id in ids if id not in (ids[1], ids[3])]


async def test_a_transport_that_raises_for_everything_counts_as_away(database: Database) -> None:
    broken = True
    broker = Scripted(lambda row, tries: OSError("no route") if broken else None)
    async with running(relay(database, broker, limits=Limits(poll=0.01, attempts=1, backoff=QUICK.backoff))):
        ids = database.add(*["a", "b"] * 20)
        await eventually(lambda: len(broker.calls) > 6)
        assert database.count() == 40
        broken = False
        await eventually(lambda: database.count() == 0)
    assert database.count("dead_letter") == 0
    assert broker.first_ids() == ids


async def test_a_broker_away_at_the_start_is_waited_for(database: Database) -> None:
    broker = Scripted()
    broker.connects = lambda times: [Unavailable("down"), OSError("not foreseen"), None][min(times - 1, 2)]
    found = relay(database, broker)
    async with running(found):
        ids = database.add("k")
        await eventually(lambda: found.started.is_set())
        await eventually(lambda: broker.ids() == ids)


async def test_a_broker_that_can_never_be_reached_ends_the_relay(database: Database) -> None:
    broker = Scripted()
    broker.connects = lambda times: ConfigurationError("no such user")
    with pytest.raises(ConfigurationError, match="no such user"):
        await asyncio.wait_for(relay(database, broker).arun(asyncio.Event()), 10)
    assert all(row.owner is None for row in database.rows("lease"))


async def test_a_broker_that_does_not_answer_does_not_delay_a_stop(database: Database) -> None:
    broker = Scripted()
    broker.may_connect.clear()
    loop = asyncio.get_running_loop()
    async with running(relay(database, broker, drain_timeout=20)):
        await eventually(lambda: broker._connects)
        begun = loop.time()
    assert loop.time() - begun < 3
