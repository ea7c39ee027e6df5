"""Many keys, writers that commit late or not at all, brokers that answer all they can, relays that come, go and lose their
leases, a database that fails before and after its commits: and afterwards everything is where it must be.

``OUTBOX_TEST_RANDOM_SECONDS`` makes it longer, ``OUTBOX_TEST_SEED`` repeats one's choices (not the threads' timing).
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa

from outbox._outgoing import Outgoing
from outbox.backoff import Backoff
from outbox.relay import Limits
from outbox.transport import Outcome
from tests.relay.conftest import ON_EACH
from tests.relay.database import Database
from tests.relay.faulty import Faulty, faulty_stores, gone
from tests.relay.running import eventually, relay, running
from tests.relay.scripted import Scripted

SECONDS = float(os.environ.get("OUTBOX_TEST_RANDOM_SECONDS", "8"))
LIMITS = Limits(batch=40, window=200, poll=0.02, attempts=8, backoff=Backoff(first=0.01, factor=1.2, most=0.05))
LEASE = 0.6
KEYS = 10
WRITERS = 4
BACKLOG = 1000  # rows at which the writers pause: a key of which every fifth message fails is slow
TOPICS = ("orders", "invoices")
BROKERS = ("this one", "that one")


@dataclass
class World:
    """What happened, seen from outside."""

    seed: int
    database: Database
    committed: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    """Id to (topic, key, number), the numbers of a (topic, key) in the order of their entity's lock."""
    rolled_back: set[str] = field(default_factory=set)
    fates: dict[str, str] = field(default_factory=dict)
    stored: list[Outgoing] = field(default_factory=list)
    tries: Counter[str] = field(default_factory=Counter)
    acked: set[str] = field(default_factory=set)
    ids: dict[int, str] = field(default_factory=dict)
    settled_unasked: list[str] = field(default_factory=list)
    away: set[str] = field(default_factory=set)
    writing: threading.Event = field(default_factory=threading.Event)
    calm: bool = False

    def fate(self, id: str) -> str:
        """One for each message, whoever tries it and when."""
        kinds = ["good"] * 17 + ["flaky"] * 3 + ["hopeless", "reject"]
        return self.fates.setdefault(id, random.Random(f"{self.seed}{id}").choice(kinds))

    # -------------------------------------------------------- writers

    def backlog(self) -> int:
        return self.database.count() + self.database.count("parked")

    def write(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.writing.is_set():
            while rng.random() < 0.1 and self.backlog() > BACKLOG and not self.writing.is_set():
                time.sleep(0.1)
            with self.database.engine.connect() as connection, connection.begin() as transaction:
                added = {}
                for place in sorted(
                    {(rng.choice(TOPICS), f"k{rng.randrange(KEYS)}") for _ in range(rng.randint(1, 2))}
                ):
                    name = {"name": ":".join(place)}
                    connection.execute(sa.text("update entity set n = n + 3 where name = :name"), name)
                    n = connection.scalar(sa.text("select n from entity where name = :name"), name)
                    for extra in range(rng.randint(1, 3)):
                        (id,) = self.database.add(place[1], topic=place[0], connection=connection)
                        added[id] = (*place, int(n or 0) + extra)
                if rng.random() < 0.2 and self.database.name != "sqlite":
                    time.sleep(rng.random() * 0.08)  # a late commit
                if rng.random() < 0.15:
                    transaction.rollback()
                    self.rolled_back.update(added)
                else:
                    transaction.commit()
                    self.committed.update(added)
            time.sleep(rng.random() * 0.02)

    # -------------------------------------------------------- brokers

    def broker(self, rng: random.Random, name: str) -> Scripted:
        def script(row: Outgoing, tries: int) -> Outcome | None:
            if name in self.away:
                return Outcome.unavailable("away")
            if row.topic in self.away:
                return Outcome.unavailable("away", scope="topic")
            fate = self.fate(row.id)
            if fate == "reject":
                return Outcome.reject("never")
            if fate == "hopeless" or (fate == "flaky" and tries < 2):
                return Outcome.retry("later")
            return None

        found = Scripted(script, pipeline=rng.random() < 0.5)
        found.stored, found.tries = self.stored, self.tries
        found.acked = self  # type: ignore[assignment]  # += of a list
        found.delay = lambda: rng.random() * rng.choice([0.0, 0.005, 0.05])
        # the second opens the topic's circuit, which is kept for longer each time
        behind = [Outcome.retry("behind"), Outcome.unavailable("behind", scope="topic")]
        found.behind = lambda row: behind[0] if self.calm else rng.choice(behind)
        return found

    def __iadd__(self, ids: list[str]) -> World:
        self.acked.update(ids)
        return self

    # -------------------------------------------------------- databases

    def watch(self, store: Faulty, rng: random.Random) -> None:
        """Fail at random; and notice what is settled without the broker's word."""
        read, settle = store.store.read, store.store.settle
        outage = 0.0

        def fault(what: str) -> Exception | None:
            nonlocal outage
            if self.calm:
                return None
            if what == "_renew" and rng.random() < 0.05:
                outage = time.monotonic() + 2 * LEASE  # long enough to lose the leases
            fails = time.monotonic() < outage if what == "_renew" else rng.random() < 0.01
            return gone(what) if fails else None

        async def reading(*args: Any) -> list[Outgoing]:
            rows = await read(*args)
            self.ids.update({row.position: row.id for row in rows})
            return rows

        async def settling(rows: Sequence[Outgoing]) -> int:
            ids = [self.ids[row.position] for row in rows]
            self.settled_unasked += [id for id in ids if id not in self.acked]
            return await settle(rows)

        store.before = store.after = fault
        store.store.read, store.store.settle = reading, settling  # type: ignore[method-assign]


async def run_relays(world: World, rng: random.Random, stores: list[Faulty], over: asyncio.Event) -> None:
    """One place in which relays come and go."""
    while not over.is_set():
        before = len(stores)
        limits = LIMITS if rng.random() < 0.7 else Limits(batch=3, window=9, poll=0.01, backoff=LIMITS.backoff)
        routes = {"*": world.broker(rng, BROKERS[0])}
        if rng.random() < 0.5:
            routes["inv*"] = world.broker(rng, BROKERS[1])
        found = relay(
            world.database, None, routes=routes, lease=LEASE, limits=limits, drain_timeout=rng.choice([0.0, 3.0])
        )
        async with running(found):
            for store in stores[before:]:
                world.watch(store, rng)
            end = time.monotonic() + rng.uniform(0.5, 3.0)
            while not over.is_set() and (world.calm or time.monotonic() < end):  # noqa: ASYNC110  # two conditions
                await asyncio.sleep(0.02)


async def break_brokers(world: World, rng: random.Random) -> None:
    while True:
        await asyncio.sleep(rng.random() * 0.8)
        scope = rng.choice([*BROKERS, *TOPICS])
        world.away.add(scope)
        await asyncio.sleep(rng.random() * 0.3)
        world.away.discard(scope)


@ON_EACH
@pytest.mark.timeout(110 + SECONDS)
async def test_nothing_is_lost_and_first_deliveries_are_in_order(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = int(os.environ.get("OUTBOX_TEST_SEED") or random.randrange(10**6))
    print(f"OUTBOX_TEST_SEED={seed}")
    rng = random.Random(seed)
    world = World(seed, database)
    with database.engine.begin() as connection:
        connection.execute(sa.text("create table entity (name varchar(40) primary key, n int)"))
        names = [{"name": f"{topic}:k{n}"} for topic in TOPICS for n in range(KEYS)]
        connection.execute(sa.text("insert into entity values (:name, 0)"), names)
    writers = [threading.Thread(target=world.write, args=(rng.random(),)) for _ in range(WRITERS)]  # type: ignore[arg-type]
    over = asyncio.Event()
    with faulty_stores(monkeypatch) as stores:
        for writer in writers:
            writer.start()
        breaking = asyncio.create_task(break_brokers(world, rng))
        relays = [asyncio.create_task(run_relays(world, random.Random(rng.random()), stores, over)) for _ in range(3)]
        await asyncio.sleep(SECONDS)
        world.writing.set()
        for writer in writers:
            await asyncio.to_thread(writer.join)
        breaking.cancel()
        world.away.clear()
        world.calm = True
        await eventually(lambda: world.backlog() == 0, 60)
        over.set()
        await asyncio.gather(*relays)

    dead = {str(row.message_id): row.reason for row in database.rows("dead_letter")}
    wanted = {"hopeless": "retries-exhausted", "reject": "rejected"}
    expected = {id: wanted[fate] for id in world.committed if (fate := world.fate(id)) in wanted}
    assert {(id, world.fate(id), id in world.committed) for id in dead.keys() ^ expected.keys()} == set()
    assert dead == expected
    sent = list(dict.fromkeys(row.id for row in world.stored))
    assert set(sent) == set(world.committed) - set(dead)
    assert not set(sent) & world.rolled_back
    assert world.settled_unasked == []
    assert inversions(world, sent) == []
    assert len(sent) > 10 * SECONDS


def inversions(world: World, sent: list[str]) -> list[str]:
    highest: dict[tuple[str, str], tuple[int, str]] = {}
    found = []
    for id in sent:
        topic, key, n = world.committed[id]
        before, other = highest.get((topic, key), (-1, ""))
        if n < before:
            found.append(f"{topic}/{key}: {n} ({id}, {world.fate(id)}) after {before} ({other})")
        highest[topic, key] = max((before, other), (n, id))
    return found
