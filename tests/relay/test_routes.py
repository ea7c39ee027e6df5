"""Several brokers under one relay: a message goes where its topic says, and an outage of one does not hold up the others."""

from __future__ import annotations

import asyncio

import pytest

from outbox.errors import ConfigurationError, Unavailable
from outbox.relay import Limits
from outbox.relay import routes as routes_
from outbox.relay.routes import Route, Routes
from outbox.transport import Outcome
from outbox.transports import open_transport
from tests.relay.database import Database
from tests.relay.running import QUICK, eventually, relay, running
from tests.relay.scripted import Scripted
from tests.relay.test_flow import flow_of, is_empty
from tests.relay.test_unavailable import PIPELINES, Broker

SMALL = Limits(batch=20, window=40, poll=0.01, attempts=3, backoff=QUICK.backoff)


def where(*patterns: str) -> Routes:
    return Routes({pattern: lambda: open_transport("memory:") for pattern in patterns})


# ---------------------------------------------------------------- which one


def test_a_topic_goes_by_its_own_name_then_by_the_first_pattern_that_fits() -> None:
    routes = where("*", "audit.*", "audit.log", "a*", "mail.[ab]", "mail.?")
    topics = ("audit.log", "audit.login", "about", "mail.a", "mail.c", "mail.cc", "orders", "Audit.x", "audit.*")
    found = [routes.of(topic).pattern for topic in topics]
    assert found == ["audit.log", "audit.*", "a*", "mail.[ab]", "mail.?", "*", "*", "*", "audit.*"]


async def test_messages_go_to_the_broker_of_their_topic(database: Database) -> None:
    logs, rest = Scripted(), Scripted()
    audit = database.add("a", "b", topic="audit.login")
    orders = database.add("a", "b", topic="orders")
    audit += database.add("a", topic="audit.logout")
    found = await relay(database, rest, routes={"audit.*": logs}).adrain()
    assert (found.sent, logs.ids(), rest.ids()) == (5, audit, orders)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"transport": "memory:a", "routes": {"*": "memory:b"}}, "are both given: leave one of them out"),
        ({"routes": {"": "memory:b"}}, "routes: a pattern of topics is a text such as 'audit.*', not ''"),
        ({"routes": {"a": "memory:b", "*": "cafka://x"}}, "cafka: there is no such transport; known are"),
        ({}, "several by pattern of topics: routes={…} or --route"),
    ],
)
async def test_wrong_routes_are_said_at_the_start(on_sqlite: Database, given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await relay(on_sqlite, given.pop("transport", None), **given).adrain()
    assert said in str(caught.value)


async def test_the_environments_transport_is_the_route_of_all_others(
    on_sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_TRANSPORT", "memory:")
    logs = Scripted()
    on_sqlite.add("a", topic="audit")
    on_sqlite.add("a", topic="orders")
    assert (await relay(on_sqlite, None, routes={"audit": logs}).adrain()).sent == 2
    assert len(logs.ids()) == 1


# ---------------------------------------------------------------- one is away


@PIPELINES
async def test_a_broker_that_is_away_holds_up_no_other_and_its_messages_come_in_order_later(
    database: Database, pipeline: bool
) -> None:
    away, up = Broker(pipeline=pipeline), Scripted(pipeline=pipeline)
    away.away.add("*")
    found = relay(database, up, routes={"slow.*": away}, limits=SMALL)
    ids: list[str] = []
    async with running(found):
        for n in range(6):
            ids += database.add(*["a", "b"] * 50, topic=f"slow.{n % 3}")
            database.add(*["x"] * 50, topic="quick")
            await eventually(lambda n=n: len(up.stored) == 50 * (n + 1), 5)  # type: ignore[misc]
        assert not pipeline or max(len(call) for call in up.calls) > 16  # it is not the one that is probed
        assert [*flow_of(found).routes.troubles()] == ["scripted (slow.*)"]
        away.away.clear()
        await eventually(lambda: database.count() == 0)
        await eventually(lambda: is_empty(found))
    for topic in range(3):
        for key in "ab":
            sent = [row.id for row in away.stored if (row.topic, row.key) == (f"slow.{topic}", key)]
            assert sent == [id for id in ids if id in set(sent)]
    assert sorted(away.ids()) == sorted(ids)
    assert database.count("dead_letter") == database.count("parked") == 0


@PIPELINES
async def test_a_broker_that_does_not_answer_holds_up_no_other(
    database: Database, pipeline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its messages are in memory, as many as may be, and more of them are the first in the table."""
    monkeypatch.setattr(routes_, "SLOW", 0.2)
    hangs, up = Scripted(pipeline=pipeline), Scripted(pipeline=pipeline)
    hangs.open.clear()
    found = relay(database, up, routes={"slow": hangs}, limits=SMALL)
    ids = database.add(*["a", None, "b", None] * 100, topic="slow")
    async with running(found):
        for n in range(5):
            database.add(*["x"] * 100, topic="quick")
            await eventually(lambda n=n: len(up.stored) == 100 * (n + 1), 5)  # type: ignore[misc]
        held = [route._rows for route in flow_of(found).routes]
        assert held[0] == SMALL.window
        hangs.open.set()
        await eventually(lambda: database.count() == 0)
        await eventually(lambda: is_empty(found))
    assert sorted(hangs.ids()) == sorted(ids)
    for key in "ab":
        sent = [row.id for row in hangs.stored if row.key == key]
        assert sent == [id for id in ids if id in sent]


async def test_a_full_route_that_goes_on_is_waited_for() -> None:
    """To read around a long backlog costs a walk over it, for every row that the other routes may have."""
    routes = where("*", "audit")
    route = routes.of("orders")
    assert not route.is_aside(0, 10)
    route.begun(asyncio.create_task(asyncio.sleep(10)))
    assert not route.is_aside(0, 10)
    task = next(iter(route.publishing))
    route.publishing[task] -= routes_.SLOW
    assert route.is_aside(0, 10)
    assert route.is_aside(4, 10)  # else each row that it sends would turn all reading round
    assert not route.is_aside(5, 10)
    task.cancel()


async def test_what_one_broker_refused_waits_for_its_own_calls_alone(database: Database) -> None:
    """Nothing is read for it until all that it was given has been answered; the other one goes on."""
    half, up = Scripted(), Scripted()
    found = relay(database, up, routes={"slow": half}, limits=SMALL)
    async with running(found):
        await eventually(lambda: found.started.is_set())
        half.answering.clear()
        database.add("a", topic="slow")
        await eventually(lambda: len(half.calls) == 1)
        half.script = lambda row, tries: Outcome.unavailable("a moment", scope="topic") if not tries else None
        half.answering.set()
        half.open.clear()
        database.add("b", topic="slow")
        await eventually(lambda: len(half.calls) == 2)
        database.add("x", topic="quick")
        await eventually(lambda: len(up.stored) == 1, 5)
        half.open.set()
        await eventually(lambda: database.count() == 0)
    assert half.keys() == ["a", "b"]


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_broker_that_cannot_be_reached_from_the_start_holds_up_no_other(
    database: Database, hangs: bool
) -> None:
    away, up = Scripted(), Scripted()
    if hangs:
        away.may_connect.clear()
    else:
        away.connects = lambda times: Unavailable("refused") if times < 4 else None
    database.add(*["a"] * 50, topic="slow")
    found = relay(database, up, routes={"slow": away}, limits=SMALL)
    async with running(found):
        database.add(*["x"] * 50, topic="quick")
        await eventually(lambda: len(up.stored) == 50, 5)
        assert found.started.is_set()
        away.may_connect.set()
        await eventually(lambda: database.count() == 0)
    assert len(away.stored) == 50


async def test_one_that_never_can_be_reached_ends_the_relay_with_its_reason(on_sqlite: Database) -> None:
    wrong = Scripted()
    wrong.connects = lambda times: ConfigurationError("wrong region")
    with pytest.raises(ConfigurationError, match="wrong region"):
        await relay(on_sqlite, Scripted(), routes={"slow": wrong}).arun(asyncio.Event())


async def test_what_is_parked_is_tried_by_the_routes_that_can_be_reached(database: Database) -> None:
    away, up = Broker(), Scripted(lambda row, tries: Outcome.retry("later") if tries < 2 else None)
    away.script = lambda row, tries: away.answer(row, tries) if tries else Outcome.retry("later")
    found = relay(database, up, routes={"slow": away}, limits=SMALL)
    async with running(found):
        database.add("a", topic="slow")
        await eventually(lambda: database.count("parked") == 1)
        away.away.add("*")
        database.add("x", topic="quick")
        await eventually(lambda: len(up.stored) == 1)
        await eventually(lambda: database.count("parked") == 1)
        away.away.clear()
        await eventually(lambda: database.count("parked") == 0)
    assert (away.keys(), up.keys(), database.count("dead_letter")) == (["a"], ["x"], 0)


# ---------------------------------------------------------------- a drain, no route, no lease


async def test_a_drain_sends_what_can_be_sent_and_says_which_broker_is_away(database: Database) -> None:
    away, up = Broker(), Scripted()
    away.away.add("*")
    database.add(*["a"] * 30, topic="slow")
    database.add(*["x"] * 30, topic="quick")
    found = relay(database, up, routes={"slow": away}, limits=SMALL)
    with pytest.raises(Unavailable, match="stopped draining, the rest is still in the outbox: down"):
        await asyncio.wait_for(found.adrain(), 10)
    assert (len(up.stored), database.count()) == (30, 30)


async def test_a_drain_ends_when_all_brokers_are_away(database: Database) -> None:
    one, other = Broker(), Broker()
    one.away.add("*")
    other.connects = lambda times: Unavailable("refused")
    database.add("a", topic="slow")
    with pytest.raises(Unavailable, match=r"scripted \(slow\): down; scripted \(\*\): refused"):
        await asyncio.wait_for(relay(database, other, routes={"slow": one}).adrain(), 10)
    assert database.count() == 1


async def test_a_topic_without_a_route_waits_and_it_is_told_why(database: Database) -> None:
    up = Scripted()
    lost = database.add("a", "b", topic="nowhere")
    found = relay(database, None, routes={"quick": up, "audit.*": Scripted()}, limits=SMALL)
    async with running(found):
        database.add(*["x"] * 50, topic="quick")
        await eventually(lambda: len(up.stored) == 50, 5)
        await eventually(lambda: flow_of(found).routes.troubles())
        (topic, state) = next(iter(flow_of(found).routes.troubles().items()))
        assert (topic, state["reason"]) == (
            "nowhere",
            "no route fits this topic, known are quick, audit.*: add one for it, or for '*', and restart the relay",
        )
    assert (database.count(), database.count("parked"), database.count("dead_letter")) == (2, 0, 0)
    rest = Scripted()
    await relay(database, rest).adrain()
    assert rest.ids() == lost


async def test_when_the_leases_run_out_no_broker_gets_what_was_handed_over(on_sqlite: Database) -> None:
    one, other = Scripted(), Scripted()
    one.open.clear()
    other.open.clear()
    found = relay(on_sqlite, other, routes={"slow": one}, lease=0.6)
    async with running(found):
        on_sqlite.add("a", topic="slow")
        on_sqlite.add("a", topic="quick")
        await eventually(lambda: one.calls and other.calls)
        flow = flow_of(found)
        old = [task for route in flow.routes for task in route.publishing]
        assert len(old) == 2
        await flow.abort()
        assert all(task.cancelled() for task in old)
        for broker in (one, other):
            broker.open.set()
        await eventually(lambda: on_sqlite.count() == 0)
    assert (len(one.stored), len(other.stored)) == (1, 1)


# ---------------------------------------------------------------- what is said


def test_all_brokers_away_are_the_broker_away() -> None:
    routes = where("a", "*")
    one, other = routes
    one.circuits.failed("*", "down")
    assert routes.troubles() == {"memory (a)": {"reason": "down", "since": _since(one)}}
    other.circuits.failed("*", "refused")
    assert routes.all_down
    assert routes.troubles() == {"*": {"reason": "memory (a): down; memory (*): refused", "since": _since(one)}}


def _since(route: Route) -> float:
    since: float = route.circuits.state()["*"]["since"]
    return since
