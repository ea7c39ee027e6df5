"""Conformance of one member: windows, pauses, waiting and closing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter

import pytest

from outbox.errors import Unavailable
from outbox.testing._conformance import Conformance, ids, message, numbered, place_of
from outbox.transport import Transport


class Reading(Conformance):
    async def test_no_more_than_a_window_is_out(self, transport: Transport, topic: str, group: str) -> None:
        await self.send(transport, self.unrelated(topic, 500))
        subscription = await transport.subscribe([topic], group, window=30)
        out = await self.read_until_quiet(subscription)
        assert len(out) == 30
        seen = Counter(ids(out))
        while len(seen) < 500:
            await subscription.ack(out[:7])
            out = out[7:]
            more = await self.read(subscription, min(7, 500 - len(seen)), ack=False)
            out += more
            seen.update(ids(more))
            assert len(out) <= 30
        assert set(seen.values()) == {1}

    async def test_fetch_returns_when_its_time_is_up(self, transport: Transport, topic: str, group: str) -> None:
        subscription = await transport.subscribe([topic], group, window=10)
        assert await self.read_until_quiet(subscription) == []
        begun = time.monotonic()
        assert await subscription.fetch(10, 0.3) == []
        assert 0.2 < time.monotonic() - begun < 2

    async def test_a_waiting_fetch_gets_what_is_sent_then(self, transport: Transport, topic: str, group: str) -> None:
        subscription = await transport.subscribe([topic], group, window=10)
        await self.read_until_quiet(subscription)
        waiting = asyncio.create_task(subscription.fetch(10, self.patience))
        await asyncio.sleep(0.1)
        await self.send(transport, [message(topic, "k", b"now")])
        assert [delivery.payload for delivery in await waiting] == [b"now"]

    async def test_nothing_comes_from_a_paused_partition_until_it_is_resumed(
        self, transport: Transport, topic: str, group: str
    ) -> None:
        if not transport.capabilities.partitions:
            pytest.skip("there is nothing to pause but the whole subscription")
        await self.send(transport, numbered(topic, 100, keys=40))
        subscription = await transport.subscribe([topic], group, window=1000)
        paused = frozenset({place_of((await self.read(subscription, 100))[0])})
        subscription.pause(paused)
        await self.send(transport, numbered(topic, 100, keys=40, first=100))
        others = await self.read_until_quiet(subscription)
        assert others
        assert not paused & {place_of(delivery) for delivery in others}
        subscription.resume(paused)
        rest = await self.read(subscription, 100 - len(others))
        assert {place_of(delivery) for delivery in rest} == paused

    async def test_closing_ends_a_fetch_that_waits(self, transport: Transport, topic: str, group: str) -> None:
        subscription = await transport.subscribe([topic], group, window=10)
        waiting = asyncio.create_task(subscription.fetch(10, 60))
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        await subscription.close()
        with contextlib.suppress(Unavailable):
            assert await waiting == []
        assert time.monotonic() - begun < 10
        await subscription.close()  # twice is no trouble

    async def test_what_is_not_offered_says_so(self, transport: Transport, topic: str, group: str) -> None:
        await self.send(transport, [message(topic)])
        subscription = await transport.subscribe([topic], group, window=10)
        (delivery,) = await self.read(subscription, 1, ack=False)
        if not transport.capabilities.delayed:
            with pytest.raises(NotImplementedError):
                await subscription.retry(delivery, 1.0)
        if not transport.capabilities.native_dead_letters:
            with pytest.raises(NotImplementedError):
                await subscription.reject(delivery)

    async def test_a_delayed_message_comes_again_not_before_its_time(
        self, transport: Transport, topic: str, group: str
    ) -> None:
        if not transport.capabilities.delayed:
            pytest.skip("cannot deliver later")
        await self.send(transport, [message(topic, "k", b"later")])
        subscription = await transport.subscribe([topic], group, window=10)
        (delivery,) = await self.read(subscription, 1, ack=False)
        begun = time.monotonic()
        await subscription.retry(delivery, 2.0)
        (again,) = await self.read(subscription, 1)
        assert again.payload == b"later"
        assert time.monotonic() - begun > 1.9

    async def test_subscribing_to_a_topic_that_does_not_exist_is_unavailable(
        self, transport: Transport, group: str
    ) -> None:
        self.require_missing_topics()
        with pytest.raises(Unavailable, match="nowhere"):
            await transport.subscribe([f"nowhere-{group}"], group, window=10)
