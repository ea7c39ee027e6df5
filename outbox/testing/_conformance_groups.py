"""Conformance of consumer groups: who gets what, and what a death leaves behind."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from outbox.errors import ConfigurationError
from outbox.testing._conformance import Conformance, Open, Place, ids, message, numbered, place_of
from outbox.transport import Delivery, Subscription, Transport


class Groups(Conformance):
    async def test_every_group_gets_every_message(self, transport: Transport, topic: str, group: str) -> None:
        names = (f"{group}-a", f"{group}-b")
        for name in names:
            await self.known(transport, [topic], name)
        sent = numbered(topic, 100)
        await self.send(transport, sent)
        for name in names:
            subscription = await transport.subscribe([topic], name, window=200)
            assert sorted(ids(await self.read(subscription, 100))) == sorted(m.id for m in sent)

    async def test_a_group_reads_several_topics(self, transport: Transport, topic: str, group: str) -> None:
        second = f"{topic}-2"
        await transport.declare([second], partitions=2)
        subscription = await transport.subscribe([topic, second], group, window=100)
        await self.send(transport, [*numbered(topic, 20), *numbered(second, 20)])
        assert Counter(d.topic for d in await self.read(subscription, 40)) == {topic: 20, second: 20}

    async def test_two_members_share_the_messages(
        self, opened: Open, transport: Transport, topic: str, group: str
    ) -> None:
        if not self.shares:
            pytest.skip("one member has all messages, the others stand by")
        first = await transport.subscribe([topic], group, window=1000)
        second = await opened().subscribe([topic], group, window=1000)
        got: dict[Subscription, list[Delivery]] = {first: [], second: []}
        number = 0

        async def both_have_some() -> bool:
            nonlocal number
            await self.send(transport, numbered(topic, 40, keys=40, first=number))
            number += 40
            for member, found in got.items():
                batch = await member.fetch(1000, 0.2)
                await member.ack(batch)
                found += batch
            return all(got.values())

        await self.until(both_have_some)
        for found in got.values():
            found.clear()
        sent = numbered(topic, 200, keys=40, first=number)
        await self.send(transport, sent)
        wanted = {m.id for m in sent}

        async def all_have_come() -> bool:
            for member, found in got.items():
                batch = await member.fetch(1000, 0.2)
                await member.ack(batch)
                found += [d for d, id in zip(batch, ids(batch), strict=True) if id in wanted]
            return sum(len(found) for found in got.values()) >= 200

        await self.until(all_have_come)
        assert got[first]
        assert got[second]
        assert Counter([*ids(got[first]), *ids(got[second])]) == Counter(m.id for m in sent)

    async def test_what_a_dead_member_had_not_acknowledged_is_delivered_again(
        self, opened: Open, transport: Transport, topic: str, group: str
    ) -> None:
        sent = self.unrelated(topic, 60)
        await self.send(transport, sent)
        doomed = opened()
        subscription = await doomed.subscribe([topic], group, window=100)
        await self.read(subscription, 60, ack=False)
        await self.kill(doomed)
        begun = time.monotonic()
        survivor = await transport.subscribe([topic], group, window=100)
        found = await self.read(survivor, 60)
        assert time.monotonic() - begun < self.takeover
        assert sorted(ids(found)) == sorted(m.id for m in sent)
        assert all(delivery.suspect for delivery in found)

    async def test_an_unacknowledged_message_comes_again_though_later_ones_were_acknowledged(
        self, opened: Open, transport: Transport, topic: str, group: str
    ) -> None:
        await self.send(transport, self.unrelated(topic, 80))
        doomed = opened()
        subscription = await doomed.subscribe([topic], group, window=100, member="one")
        found = await self.read(subscription, 80, ack=False)
        left = found[::13]
        done = [delivery for delivery in found if delivery not in left]
        await subscription.ack(done[::-1])
        await doomed.close()
        again = await transport.subscribe([topic], group, window=100, member="one")
        redelivered = set(ids(await self.read_until_quiet(again)))
        assert set(ids(left)) <= redelivered
        if transport.capabilities.partitions:
            # committed is what has no gap before it: nothing below the first one left of a partition comes again
            firsts: dict[Place, int] = {}
            for delivery in left:
                place = place_of(delivery)
                firsts[place] = min(firsts.get(place, delivery.offset or 0), delivery.offset or 0)
            needless = [d for d in found if (d.offset or 0) < firsts.get(place_of(d), 1 << 62)]
            assert not redelivered & set(ids(needless))

    async def test_what_was_acknowledged_before_a_close_does_not_come_again(
        self, opened: Open, transport: Transport, topic: str, group: str
    ) -> None:
        await self.send(transport, numbered(topic, 50))
        first = opened()
        await self.read(await first.subscribe([topic], group, window=100), 50)
        await first.close()
        await self.send(transport, numbered(topic, 10, first=50))
        found = await self.read_until_quiet(await transport.subscribe([topic], group, window=100))
        assert sorted(int(d.payload or b"") for d in found) == list(range(50, 60))

    async def test_acknowledged_offsets_are_committed_without_a_close(
        self, opened: Open, transport: Transport, topic: str, group: str
    ) -> None:
        if not transport.capabilities.partitions:
            pytest.skip("every acknowledgement is its own")
        window = 20
        doomed = opened()
        subscription = await doomed.subscribe([topic], group, window=window, member="one")
        await self.send(transport, numbered(topic, 200))
        await self.read(subscription, 200)
        await self.kill(doomed)
        again = await transport.subscribe([topic], group, window=200, member="one")
        assert len(await self.read_until_quiet(again)) <= window * self.partitions

    async def test_a_static_member_has_its_share_back_at_once(
        self, opened: Open, transport: Transport, topic: str, group: str
    ) -> None:
        await self.send(transport, self.unrelated(topic, 40))
        doomed = opened()
        await self.read(await doomed.subscribe([topic], group, window=100, member="one"), 40, ack=False)
        await self.kill(doomed)
        begun = time.monotonic()
        again = await transport.subscribe([topic], group, window=100, member="one")
        assert len(await self.read(again, 40)) == 40
        assert time.monotonic() - begun < 3

    async def test_of_two_processes_under_one_member_name_one_is_told_and_the_other_goes_on(
        self, opened: Open, transport: Transport, topic: str, group: str
    ) -> None:
        if not self.notices_namesakes or not transport.capabilities.partitions:
            pytest.skip("namesakes are not noticed")
        both = [await one.subscribe([topic], group, window=100, member="one") for one in (opened(), opened())]
        await self.send(transport, numbered(topic, 10))
        told: dict[Subscription, str] = {}

        async def one_is_told() -> bool:
            for subscription in both:
                try:
                    await subscription.ack(await subscription.fetch(100, 0.1))
                except ConfigurationError as error:
                    told[subscription] = str(error)
            return bool(told)

        await self.until(one_is_told)
        (other,) = [subscription for subscription in both if subscription not in told]
        assert {"one" in text for text in told.values()} == {True}
        await self.read_until_quiet(other)
        await self.send(transport, [message(topic, "k", b"more")])
        found = await self.read(other, 1)
        assert b"more" in {delivery.payload for delivery in found}

    async def test_only_the_first_window_is_suspect(self, transport: Transport, topic: str, group: str) -> None:
        if not transport.capabilities.partitions:
            pytest.skip("the broker itself flags what it delivers again")
        await self.send(transport, numbered(topic, 300, keys=1))
        subscription = await transport.subscribe([topic], group, window=50)
        found = await self.read(subscription, 300)
        assert [delivery.suspect for delivery in found] == [True] * 50 + [False] * 250

    async def test_a_member_is_asked_to_let_go_before_another_one_reads(
        self, opened: Open, transport: Transport, topic: str, group: str
    ) -> None:
        if not transport.capabilities.partitions:
            pytest.skip("nobody owns a part of a queue")
        held: list[Delivery] = []
        asked: list[frozenset[Place]] = []

        async def let_go(places: frozenset[Place]) -> None:
            asked.append(places)
            await first.ack([delivery for delivery in held if place_of(delivery) in places])

        await self.send(transport, numbered(topic, 100, keys=40))
        first = await transport.subscribe([topic], group, window=200, revoked=let_go)
        held += await self.read(first, 100, ack=False)
        other = opened()
        joining = asyncio.create_task(other.subscribe([topic], group, window=200))
        await self.until(lambda: bool(asked))
        second = await joining
        await self.send(transport, numbered(topic, 40, keys=40, first=100))
        found: list[Delivery] = []

        async def all_new_ones_have_come() -> bool:
            for member in (first, second):
                found.extend(await member.fetch(1000, 0.2))
            return {int(d.payload or b"") for d in found} >= set(range(100, 140))

        await self.until(all_new_ones_have_come)
        # what it acknowledged when it was asked was committed before the others began to read
        given_up = {place for places in asked for place in places}
        assert [d for d in found if int(d.payload or b"") < 100 and place_of(d) in given_up] == []
        await first.ack(held)  # of partitions that are gone: no trouble
