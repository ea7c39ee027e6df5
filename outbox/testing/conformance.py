"""What every transport must do, as tests. Whoever writes one runs them with a few lines:

    from outbox.testing.conformance import TransportConformance

    class TestCarrierPigeon(TransportConformance):
        @pytest.fixture
        def transport_url(self, loft):
            return f"pigeon://{loft.address}"

It needs pytest-asyncio. What a transport cannot do, by its `Capabilities`, is skipped; the class attributes say the rest.
Each test makes topics and groups of its own, so that one broker serves all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias

import pytest
import pytest_asyncio

from outbox import wire
from outbox._message import Outgoing, bucket_of, new_id
from outbox.errors import MessageTooLarge, Unavailable
from outbox.transport import Delivery, Outcome, Subscription, Transport
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


class TransportConformance:
    """Subclass it and define the fixture ``transport_url``; override `open_one` for transports that have no URL."""

    pytestmark = pytest.mark.asyncio

    patience: float = 30.0
    """Seconds that a test waits for something that must happen."""
    takeover: float = 15.0
    """Seconds after which the messages of a member that died come to another one, at the most."""
    quiet: float = 1.0
    """Seconds without a message that tell that there is none."""
    partitions: int = 4
    missing_topics: bool = True
    """A topic that nobody declared is `unavailable`. False where it comes into being when it is written to."""

    # ---- what the tests stand on

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
    async def topic(self, transport: Transport) -> str:
        name = f"conformance-{uuid.uuid4().hex[:12]}"
        await transport.declare([name], partitions=self.partitions)
        return name

    @pytest.fixture
    def group(self) -> str:
        return f"group-{uuid.uuid4().hex[:12]}"

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

    async def read_until_quiet(self, subscription: Subscription, limit: int = 1000) -> list[Delivery]:
        """Fetch, and acknowledge nothing, until none has come for `quiet` seconds."""
        found: list[Delivery] = []
        last = time.monotonic()
        while time.monotonic() - last < self.quiet:
            batch = await subscription.fetch(limit, 0.2)
            if batch:
                found += batch
                last = time.monotonic()
        return found

    async def until(self, condition: Callable[[], bool | Awaitable[bool]], within: float | None = None) -> None:
        deadline = time.monotonic() + (within or self.patience)
        while True:
            met = condition()
            if met if isinstance(met, bool) else await met:
                return
            assert time.monotonic() < deadline, "what should have happened has not"
            await asyncio.sleep(0.01)

    # ---- publishing

    async def test_nothing_is_acknowledged_that_was_not_stored(
        self, transport: Transport, topic: str, group: str
    ) -> None:
        batches = [numbered(topic, 50, first=50 * at) for at in range(20)]
        results = await asyncio.gather(*(transport.publish(batch) for batch in batches))
        sent = [
            m.id
            for batch, result in zip(batches, results, strict=True)
            for m, o in zip(batch, result, strict=True)
            if o.kind == "sent"
        ]
        assert len(sent) == 1000
        subscription = await transport.subscribe([topic], group, window=2000)
        found = await self.read(subscription, len(sent))
        assert Counter(ids(found)) == Counter(sent)
        assert await self.read_until_quiet(subscription) == []

    async def test_messages_of_a_key_keep_the_order_of_the_calls_while_several_are_under_way(
        self, transport: Transport, topic: str, group: str
    ) -> None:
        if not transport.capabilities.ordered_pipeline:
            pytest.skip("the relay sends the next message of a key when the one before is acknowledged")
        sizes = [1, 7, 200, 3, 50, 1, 1, 120, 2, 80, 35]
        batches, first = [], 0
        for size in sizes:
            batches.append(numbered(topic, size, keys=7, first=first))
            first += size
        await asyncio.gather(*(self.send(transport, batch) for batch in batches))
        subscription = await transport.subscribe([topic], group, window=1000)
        by_key: dict[str | None, list[int]] = defaultdict(list)
        for delivery in await self.read(subscription, first):
            by_key[key_of(delivery)].append(int(delivery.payload or b""))
        assert by_key == {f"key-{k}": [n for n in range(first) if n % 7 == k] for k in range(7)}

    async def test_messages_without_a_key_are_spread(self, transport: Transport, topic: str, group: str) -> None:
        for _ in range(20):
            await self.send(transport, [message(topic) for _ in range(10)])
        subscription = await transport.subscribe([topic], group, window=500)
        found = await self.read(subscription, 200)
        assert {delivery.key for delivery in found} == {None}
        if transport.capabilities.partitions:
            assert len({place_of(delivery) for delivery in found}) == self.partitions

    async def test_an_empty_batch_is_no_trouble(self, transport: Transport) -> None:
        assert await transport.publish([]) == []

    @pytest.mark.parametrize(
        "payload",
        [b'{"id": 1}', b"", None, bytes(range(256)), "Grüße, 世界 🎈".encode()],
        ids=["json", "empty", "tombstone", "binary", "text"],
    )
    async def test_a_payload_comes_out_as_it_went_in(
        self, transport: Transport, topic: str, group: str, payload: bytes | None
    ) -> None:
        await self.send(transport, [message(topic, "k", payload), message(topic, None, payload)])
        subscription = await transport.subscribe([topic], group, window=10)
        found = await self.read(subscription, 2)
        assert [delivery.payload for delivery in found] == [payload, payload]

    async def test_keys_and_headers_come_out_as_they_went_in(
        self, transport: Transport, topic: str, group: str
    ) -> None:
        headers = {
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "größe": "Übergröße 🎈",
            "empty": "",
        }
        sent = message(
            topic, "Schlüssel 1/ü", b"x", type="order.placed", content_type="application/json", headers=headers
        )
        await self.send(transport, [sent])
        subscription = await transport.subscribe([topic], group, window=10)
        (found,) = await self.read(subscription, 1)
        assert key_of(found) == "Schlüssel 1/ü"
        expected = {name: value.encode() for name, value in headers.items()} | {
            wire.ID: sent.id.encode(),
            wire.TYPE: b"order.placed",
            wire.CONTENT_TYPE: b"application/json",
        }
        assert expected.items() <= dict(found.headers).items()
        assert (dict(found.headers).keys() - expected.keys()) <= {wire.KEY}

    async def test_what_a_message_does_not_have_makes_no_header(
        self, transport: Transport, topic: str, group: str
    ) -> None:
        await self.send(transport, [message(topic)])
        subscription = await transport.subscribe([topic], group, window=10)
        (found,) = await self.read(subscription, 1)
        assert [name for name, _ in found.headers] == [wire.ID]

    async def test_headers_that_cannot_be_read_reject_that_message_alone(
        self, transport: Transport, topic: str
    ) -> None:
        broken = message(topic, "k")._replace(headers="[1, 2")
        outcomes = await transport.publish([message(topic, "k"), broken, message(topic, "k")])
        assert [outcome.kind for outcome in outcomes] == ["sent", "reject", "sent"]

    async def test_the_largest_message_is_sent_and_one_byte_more_is_rejected(
        self, transport: Transport, topic: str, group: str
    ) -> None:
        most = transport.capabilities.max_message_bytes
        if most is None:
            pytest.skip("no limit is known beforehand")

        async def publish(size: int) -> Outcome:
            (outcome,) = await transport.publish([message(topic, "k", b"x" * size)])
            return outcome

        taken, refused = 0, most + 1
        while refused - taken > 1:  # overhead and headers are the transport's to count
            size = (taken + refused) // 2
            outcome = await publish(size)
            assert outcome.kind in ("sent", "reject"), outcome
            taken, refused = (size, refused) if outcome.kind == "sent" else (taken, size)
        assert taken > 0.9 * most - 1000
        outcome = await publish(taken + 1)
        assert outcome.kind == "reject"
        assert isinstance(outcome.error, MessageTooLarge)
        # in the middle of a batch it stops neither those before it nor those after it
        large = message(topic, "k", b"x" * refused)
        outcomes = await transport.publish([*numbered(topic, 3), large, *numbered(topic, 3, first=3)])
        assert [outcome.kind for outcome in outcomes] == ["sent"] * 3 + ["reject"] + ["sent"] * 3
        subscription = await transport.subscribe([topic], group, window=100)
        sizes = [len(d.payload or b"") for d in await self.read_until_quiet(subscription)]
        assert max(sizes) == taken

    async def test_a_topic_that_does_not_exist_is_unavailable_and_stops_no_other(
        self, transport: Transport, topic: str, group: str
    ) -> None:
        self._require_missing_topics()
        missing = f"{topic}-missing"
        begun = time.monotonic()
        outcomes = await transport.publish([message(topic, "k"), message(missing, "k"), message(topic, "k")])
        assert [(outcome.kind, outcome.scope) for outcome in outcomes] == [
            ("sent", "transport"),
            ("unavailable", "topic"),
            ("sent", "transport"),
        ]
        assert missing in outcomes[1].reason
        assert time.monotonic() - begun < 5
        await self.send(transport, [message(topic, "k")])
        assert await transport.check([topic]) == []
        (complaint,) = await transport.check([topic, missing])
        assert missing in complaint
        await transport.declare([topic, missing], partitions=1)
        assert await transport.check([topic, missing]) == []
        await self.send(transport, [message(missing, "k")])

    async def test_nothing_overtakes_a_message_that_was_not_sent(
        self, transport: Transport, topic: str, group: str
    ) -> None:
        self._require_missing_topics()
        if not transport.capabilities.ordered_pipeline:
            pytest.skip("the relay sends the next message of a key when the one before is acknowledged")
        late = f"{topic}-late"
        declared = asyncio.create_task(transport.declare([late], partitions=1))
        kinds = []
        under_way: list[asyncio.Task[list[Outcome]]] = []
        number = 0
        while not declared.done() or number < 20:
            # All of these are handed over before the first of them is known to have failed.
            under_way = [
                asyncio.create_task(transport.publish([message(late, "k", b"%d" % (number + at))])) for at in range(5)
            ]
            number += 5
            kinds = [outcome.kind for outcomes in await asyncio.gather(*under_way) for outcome in outcomes]
            assert kinds == sorted(kinds), "a message is stored, though one of its key before it was not"
        await declared

    def _require_missing_topics(self) -> None:
        if not self.missing_topics:
            pytest.skip("topics come into being when they are written to")

    async def test_a_closed_transport_sends_nothing(self, opened: Open, topic: str) -> None:
        for abort in (False, True):
            transport = opened()
            await self.send(transport, [message(topic)])
            await transport.close(abort=abort)
            (outcome,) = await transport.publish([message(topic)])
            assert outcome.kind == "unavailable"

    async def test_close_waits_for_what_is_under_way(self, opened: Open, topic: str, group: str) -> None:
        transport = opened()
        await self.send(transport, numbered(topic, 10))
        publishing = [
            asyncio.create_task(transport.publish(numbered(topic, 100, first=100 * at))) for at in range(1, 6)
        ]
        await asyncio.sleep(0)  # each has begun
        await transport.close()
        sent = sum(outcome.kind == "sent" for result in await asyncio.gather(*publishing) for outcome in result)
        subscription = await opened().subscribe([topic], group, window=2000)
        assert len(await self.read_until_quiet(subscription)) == 10 + sent

    # ---- groups

    async def test_every_group_gets_every_message(self, transport: Transport, topic: str, group: str) -> None:
        sent = numbered(topic, 100)
        await self.send(transport, sent)
        for name in (f"{group}-a", f"{group}-b"):
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
        sent = numbered(topic, 60)
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
        await self.send(transport, numbered(topic, 80))
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
        await self.send(transport, numbered(topic, 40))
        doomed = opened()
        await self.read(await doomed.subscribe([topic], group, window=100, member="one"), 40, ack=False)
        await self.kill(doomed)
        begun = time.monotonic()
        again = await transport.subscribe([topic], group, window=100, member="one")
        assert len(await self.read(again, 40)) == 40
        assert time.monotonic() - begun < 3

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

    # ---- one member

    async def test_no_more_than_a_window_is_out(self, transport: Transport, topic: str, group: str) -> None:
        await self.send(transport, numbered(topic, 500))
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
        self._require_missing_topics()
        with pytest.raises(Unavailable, match="nowhere"):
            await transport.subscribe([f"nowhere-{group}"], group, window=10)
