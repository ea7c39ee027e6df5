"""Conformance of publishing: what is stored, in which order, and what is refused."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict

import pytest
from msgspec.structs import replace

from outbox import wire
from outbox.errors import MessageTooLarge
from outbox.testing._conformance import Conformance, Open, ids, key_of, message, numbered, place_of
from outbox.transport import Outcome, Transport


class Publishing(Conformance):
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
        broken = replace(message(topic, "k"), headers="[1, 2")
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
        sizes = [len(d.payload or b"") for d in await self.read_until_quiet(subscription, ack=True)]
        assert max(sizes) == taken

    async def test_a_topic_that_does_not_exist_is_unavailable_and_stops_no_other(
        self, transport: Transport, topic: str, group: str
    ) -> None:
        self.require_missing_topics()
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
        await self.known(transport, [missing], group)
        await self.send(transport, [message(missing, "k")])

    async def test_nothing_overtakes_a_message_that_was_not_sent(
        self, transport: Transport, topic: str, group: str
    ) -> None:
        self.require_missing_topics()
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
        assert len(await self.read_until_quiet(subscription, ack=True)) == 10 + sent
