"""Real relay processes, killed between the broker's acknowledgement and the delete, frozen past their lease, or asked to
stop: afterwards everything is there, duplicates have the same id, and the first deliveries of a key are in order."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outbox import wire
from outbox.relay import Relay
from outbox.transport import Delivery
from outbox.transports import open_transport
from tests.relay.database import Database
from tests.services import PostgresqlServer
from tests.services.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
KEYS = 20
MESSAGES = 1000
LEASE = 1.0

# Kills itself once the broker has acknowledged a batch, and before anyone can know: argv is database, transport, how many
# batches it lives through.
KILLED = """
import asyncio, os, signal, sys
from outbox import Outbox
from outbox.relay import Limits, Relay
from outbox.transports import open_transport

class Killer:
    def __init__(self, transport, lives):
        self.transport, self.lives = transport, lives
    def __getattr__(self, name):
        return getattr(self.transport, name)
    async def publish(self, batch):
        outcomes = await self.transport.publish(batch)
        assert all(outcome.kind == "sent" for outcome in outcomes), outcomes
        self.lives -= 1
        if self.lives < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return outcomes

database, transport, lives = sys.argv[1:]
async def main():
    killer = Killer(open_transport(transport), int(lives))
    relay = Relay(Outbox(), database=database, transport=killer, lease=1.0, limits=Limits(batch=30, poll=0.01))
    await relay.arun(asyncio.Event())
asyncio.run(main())
"""

PLAIN = """
import sys
from outbox import Outbox
from outbox.relay import Limits, Relay
Relay(Outbox(), database=sys.argv[1], transport=sys.argv[2], lease=1.0, limits=Limits(batch=10, poll=0.01)).run()
"""


@pytest.fixture
def database(postgresql: PostgresqlServer, postgresql_url: str) -> Iterator[Database]:
    found = Database(postgresql_url).create()
    yield found
    found.close()


@pytest.fixture(params=["local", "kafka"])
async def broker(request: pytest.FixtureRequest, tmp_path: Path, topic_name: str) -> str:
    """The URL of one, with the test's topic."""
    url = f"local://{tmp_path / 'log.db'}" if request.param == "local" else request.getfixturevalue("kafka_url")
    transport = open_transport(url)
    await transport.declare([topic_name], partitions=3)
    await transport.close()
    return str(url)


@contextmanager
def process(script: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=REPOSITORY, stderr=subprocess.PIPE)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGCONT)
            child.kill()
        child.communicate()


async def deliveries(url: str, topic: str, wanted: set[str]) -> list[Delivery]:
    """All that is in the topic: what is wanted must come, and what comes after it in the next second, too."""
    transport = open_transport(url)
    subscription = await transport.subscribe([topic], "counting", window=10_000)
    found: list[Delivery] = []
    missing, deadline = set(wanted), time.monotonic() + 60
    while missing or (batch := await subscription.fetch(1000, 1.0)):
        if missing:
            batch = await subscription.fetch(1000, 1.0)
            assert time.monotonic() < deadline, f"{len(missing)} messages did not arrive"
        found += batch
        missing -= {id_of(delivery) for delivery in batch}
        await subscription.ack(batch)
    await subscription.close()
    await transport.close()
    return found


def id_of(delivery: Delivery) -> str:
    return dict(delivery.headers)[wire.ID].decode()


def check(found: list[Delivery], ids: list[str], keys: list[str]) -> int:
    """Everything is there, in order at its first delivery; returns how many came more than once."""
    seen: dict[str, Delivery] = {}
    for delivery in found:
        known = seen.setdefault(id_of(delivery), delivery)
        assert (known.key, known.payload) == (delivery.key, delivery.payload)
    assert set(seen) == set(ids)
    for key in set(keys):
        assert [id for id, d in seen.items() if d.key == key.encode()] == [
            id for id, k in zip(ids, keys, strict=True) if k == key
        ]
    return len(found) - len(seen)


async def test_relays_killed_between_acknowledgement_and_delete_lose_and_invert_nothing(
    database: Database, broker: str, topic_name: str
) -> None:
    keys = [f"k{n % KEYS}" for n in range(MESSAGES)]
    ids = database.add(*keys, topic=topic_name)
    kills = 0
    for lives in (0, 1, 3, 0, 2, 5):
        with process(KILLED, database.url, broker, str(lives)) as child:
            await asyncio.to_thread(child.wait, 60)
            assert child.returncode == -signal.SIGKILL, child.communicate()[1]
            kills += 1
            more = [f"k{n}" for n in range(KEYS)]
            keys, ids = keys + more, ids + database.add(*more, topic=topic_name)
    assert database.count() > 0
    relay = Relay(database.outbox, database=database.url, transport=broker, lease=LEASE)
    while database.count():
        await relay.adrain()  # the first ones find only what is not leased to a dead relay
    duplicates = check(await deliveries(broker, topic_name, set(ids)), ids, keys)
    assert duplicates >= kills  # each of them had acknowledged messages in the window
    assert database.count("parked") == database.count("dead_letter") == 0


@pytest.mark.parametrize("broker", ["kafka"], indirect=True)  # frozen, it can hold the write lock of a local log
async def test_a_relay_frozen_past_its_lease_costs_duplicates_at_most(
    database: Database, broker: str, topic_name: str
) -> None:
    keys = [f"k{n % KEYS}" for n in range(MESSAGES)]
    ids = database.add(*keys, topic=topic_name)
    with process(PLAIN, database.url, broker) as frozen:
        assert await asyncio.to_thread(wait_until, lambda: database.count() < MESSAGES, 30)
        frozen.send_signal(signal.SIGSTOP)
        more = [f"k{n}" for n in range(KEYS)] * 5
        keys, ids = keys + more, ids + database.add(*more, topic=topic_name)
        with process(PLAIN, database.url, broker):
            assert await asyncio.to_thread(wait_until, lambda: database.count() == 0, 60)
            frozen.send_signal(signal.SIGCONT)
            keys, ids = keys + more, ids + database.add(*more, topic=topic_name)
            assert await asyncio.to_thread(wait_until, lambda: database.count() == 0, 60)
    check(await deliveries(broker, topic_name, set(ids)), ids, keys)


async def test_sigterm_drains_and_hands_the_leases_over(database: Database, tmp_path: Path) -> None:
    broker = f"local://{tmp_path / 'log.db'}"
    ids = database.add(*["k"] * 500, topic="t")
    with process(PLAIN, database.url, broker) as child:
        assert await asyncio.to_thread(wait_until, lambda: database.count() < 500, 30)
        child.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(child.wait, 20) == 0
    assert all(row.owner is None for row in database.rows("lease"))
    assert database.count("relay") == 0
    left = [str(row.id) for row in database.rows("message")]
    sent = [id for id in ids if id not in left]
    assert check(await deliveries(broker, "t", set(sent)), sent, ["k"] * len(sent)) == 0
