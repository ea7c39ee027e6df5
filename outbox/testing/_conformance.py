"""What the conformance tests stand on: transports opened and closed, topics made, messages sent and read."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias

import pytest
import pytest_asyncio

from outbox import wire
from outbox._message import bucket_of, new_id
from outbox._outgoing import Outgoing
from outbox.transport import Delivery, Subscription, Transport
from outbox.transports import open_transport

Open: TypeAlias = Callable[[], Transport]
Place: TypeAlias = tuple[str, int]


def message(
    topic: str,
    key: str | None = None,
    payload: bytes | None = b"{}",
    *,
    type: str | None = None,
    content_type: str | None = None,
    headers: dict[str, str] | None = None,
) -> Outgoing:
    """A stored message, as the relay would read it."""
    id = new_id()
    text = None if headers is None else json.dumps(headers)
    return Outgoing(0, str(id), topic, key, type, payload, content_type, text, bucket_of(key, id))


def numbered(topic: str, count: int, *, keys: int = 10, first: int = 0) -> list[Outgoing]:
    """Messages whose payloads are numbers, over some keys in turn."""
    return [message(topic, f"key-{number % keys}", b"%d" % number) for number in range(first, first + count)]


def ids(deliveries: Iterable[Delivery]) -> list[str]:
    return [dict(delivery.headers)[wire.ID].decode() for delivery in deliveries]


def key_of(delivery: Delivery) -> str | None:
    raw = delivery.key if delivery.key is not None else dict(delivery.headers).get(wire.KEY)
    return None if raw is None else raw.decode()


def place_of(delivery: Delivery) -> Place:
    return delivery.topic, delivery.partition or 0


class Conformance:
    """What the tests stand on."""

    pytestmark = pytest.mark.asyncio

    patience: float = 30.0
    """Seconds that a test waits for something that must happen."""
    takeover: float = 15.0
    """Seconds after which the messages of a member that died come to another one, at the most."""
    quiet: float = 1.0
    """Seconds without a message that tell that there is none."""
    partitions: int = 4
    notices_namesakes: bool = True
    """Of two processes that join as one static member, all but one are told so."""
    shares: bool = True
    """Two members of a group have a part of the messages each. False where one has all of them and the others stand by."""
    missing_topics: bool = True
    """A topic that nobody declared is `unavailable`. False where it comes into being when it is written to, or read."""
    holds_keys: bool = False
    """Of a key the next message comes when the one before it is acknowledged."""

    def open_one(self, url: str) -> Transport:
        return open_transport(url)

    async def kill(self, transport: Transport) -> None:
        """End a transport as a SIGKILL of its process would: nothing is committed, no group is left."""
        await transport.close(abort=True)

    @pytest_asyncio.fixture
    async def opened(self, transport_url: str) -> AsyncIterator[Open]:
        """Opens further transports of the same broker, each as another process would; closes them after the test."""
        transports: list[Transport] = []

        def another() -> Transport:
            transports.append(self.open_one(transport_url))
            return transports[-1]

        yield another
        for transport in transports:
            await transport.close()

    @pytest_asyncio.fixture
    async def transport(self, opened: Open) -> Transport:
        return opened()

    @pytest_asyncio.fixture
    async def topic(self, transport: Transport, group: str) -> str:
        name = f"conformance-{uuid.uuid4().hex[:12]}"
        await transport.declare([name], partitions=self.partitions)
        await self.known(transport, [name], group)
        return name

    @pytest.fixture
    def group(self) -> str:
        return f"group-{uuid.uuid4().hex[:12]}"

    async def known(self, transport: Transport, topics: Sequence[str], group: str) -> None:
        """Have the group get what is sent from now on, where it would not get what was sent before."""
        if not transport.capabilities.history:
            await (await transport.subscribe(topics, group, window=1)).close()

    async def send(self, transport: Transport, messages: Sequence[Outgoing]) -> None:
        """Publish in one call; all of it must be sent."""
        outcomes = await transport.publish(messages)
        assert [outcome for outcome in outcomes if outcome.kind != "sent"] == []
        assert len(outcomes) == len(messages)

    async def read(self, subscription: Subscription, count: int, *, ack: bool = True) -> list[Delivery]:
        """Fetch until there are ``count`` deliveries."""
        found: list[Delivery] = []
        deadline = time.monotonic() + self.patience
        while len(found) < count:
            assert time.monotonic() < deadline, f"only {len(found)} of {count} messages came in {self.patience} s"
            batch = await subscription.fetch(count - len(found), 0.5)
            found += batch
            if ack:
                await subscription.ack(batch)
        return found

    def unrelated(self, topic: str, count: int) -> list[Outgoing]:
        """Messages that all come without an acknowledgement."""
        return numbered(topic, count, keys=count if self.holds_keys else 10)

    async def read_until_quiet(
        self, subscription: Subscription, limit: int = 1000, *, ack: bool = False
    ) -> list[Delivery]:
        """Fetch until none has come for `quiet` seconds."""
        found: list[Delivery] = []
        last = time.monotonic()
        while time.monotonic() - last < self.quiet:
            batch = await subscription.fetch(limit, 0.2)
            if batch:
                found += batch
                last = time.monotonic()
                if ack:
                    await subscription.ack(batch)
        return found

    async def until(self, condition: Callable[[], bool | Awaitable[bool]], within: float | None = None) -> None:
        deadline = time.monotonic() + (within or self.patience)
        while True:
            met = condition()
            if met if isinstance(met, bool) else await met:
                return
            assert time.monotonic() < deadline, "what should have happened has not"
            await asyncio.sleep(0.01)

    def require_missing_topics(self) -> None:
        if not self.missing_topics:
            pytest.skip("topics come into being when they are written to")
