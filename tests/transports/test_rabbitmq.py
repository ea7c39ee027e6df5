"""The RabbitMQ transport against a real broker: what is made there, what goes over the wire, and who gets what."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from datetime import UTC, datetime

import pika
import pytest

from outbox import wire
from outbox.errors import ConfigurationError, Unavailable
from outbox.testing.conformance import ids, message, numbered
from tests.services import RabbitmqServer
from tests.transports.churn import Churn
from tests.transports.rabbitmq_tools import Open, get, know, raw, read_all
from tests.transports.relaying import Sending, first_deliveries, in_order
from tests.transports.tools import read


async def test_a_group_has_a_queue_that_is_bound_to_the_topics_exchange(
    rabbits: Open, rabbitmq: RabbitmqServer, name: str
) -> None:
    await know(rabbits(rabbitmq.url), name, "billing")
    queues = await asyncio.to_thread(rabbitmq.ctl, "list_queues", "--quiet", "name", "durable", "arguments")
    (line,) = [line for line in queues.splitlines() if line.startswith(f"{name}.billing\t")]
    for argument in ('"x-queue-type","quorum"', '"x-single-active-consumer",true', '"at-least-once"', "reject-publish"):
        assert argument in line
    assert f"{name}.billing.dlq" in line
    assert "\ttrue\t" in line
    bindings = await asyncio.to_thread(
        rabbitmq.ctl, "list_bindings", "--quiet", "source_name", "destination_name", "routing_key"
    )
    assert f"{name}\t{name}.billing\t#" in bindings.splitlines()


async def test_others_see_text_headers_and_the_properties_of_amqp(rabbits: Open, rabbitmq_url: str, name: str) -> None:
    transport = rabbits(rabbitmq_url)
    await transport.declare([name])
    await raw(rabbitmq_url, lambda channel: channel.queue_declare(f"{name}-theirs", durable=True))
    await raw(rabbitmq_url, lambda channel: channel.queue_bind(f"{name}-theirs", name, "order.*"))
    sent = message(name, "7", b"{}", type="order.placed", content_type="application/json", headers={"tenant": "ü"})
    assert [o.kind for o in await transport.publish([sent])] == ["sent"]
    method, properties, body = await get(rabbitmq_url, f"{name}-theirs")
    assert (method.exchange, method.routing_key, body) == (name, "order.placed", b"{}")
    assert properties.delivery_mode == 2
    assert (properties.message_id, properties.type, properties.content_type) == (
        sent.id,
        "order.placed",
        "application/json",
    )
    assert properties.headers == {
        wire.ID: sent.id,
        wire.TYPE: "order.placed",
        wire.KEY: "7",
        wire.CONTENT_TYPE: "application/json",
        "tenant": "ü",
    }


async def test_what_others_send_is_delivered_as_bytes_whatever_its_headers_are(
    rabbits: Open, rabbitmq_url: str, name: str
) -> None:
    transport = rabbits(rabbitmq_url)
    await know(transport, name, "billing")
    at = datetime(2026, 11, 25, 6, 0, tzinfo=UTC)
    strange = {
        "number": 7,
        "no": False,
        "yes": True,
        "nothing": None,
        "bytes": b"\xff\x00",
        "nested": {"deep": [1, {"er": "ü"}, b"\xff"]},
        "at": at,
        wire.ID: "no uuid",
        wire.CYCLE: 10**18,
    }

    def send(channel: object) -> None:
        publish = channel.basic_publish  # type: ignore[attr-defined]
        publish(name, "x", b"bare")
        publish(name, "x", b"", pika.BasicProperties(content_type="text/plain", timestamp=int(at.timestamp())))
        publish(name, "x", b"strange", pika.BasicProperties(headers=strange, timestamp=1 << 62))
        publish(name, "x", b"x", pika.BasicProperties(headers={f"header-{n}": "x" for n in range(5000)}))
        publish(name, "x", b"kept", pika.BasicProperties(headers={wire.TOMBSTONE: "1"}))

    await raw(rabbitmq_url, send)
    bare, empty, odd, many, kept = await read_all(transport, name, "billing")
    assert (bare.payload, bare.headers, bare.key, bare.timestamp) == (b"bare", [], None, None)
    assert (empty.payload, empty.headers, empty.timestamp) == (b"", [("content-type", b"text/plain")], at)
    found = dict(odd.headers)
    assert found["number"] == b"7"
    assert (found["no"], found["yes"], found["nothing"]) == (b"false", b"true", b"")
    assert found["bytes"] == b"\xff\x00"
    assert b'"er"' in found["nested"]
    assert found[wire.ID] == b"no uuid"
    assert odd.timestamp is None
    assert len(many.headers) == 5000
    assert kept.payload == b"kept"


async def test_a_message_that_no_queue_would_get_is_not_sent_and_is_when_there_is_one(
    rabbits: Open, rabbitmq_url: str, name: str
) -> None:
    transport = rabbits(rabbitmq_url)
    await know(transport, f"{name}-known", "billing")
    batch = [message(f"{name}-known", "k"), message(name, "k"), message(f"{name}-known", "k")]
    outcomes = await transport.publish(batch)
    assert [(o.kind, o.scope) for o in outcomes] == [
        ("sent", "transport"),
        ("unavailable", "topic"),
        ("sent", "transport"),
    ]
    assert "no queue is bound" in outcomes[1].reason
    assert name in outcomes[1].reason
    await know(transport, name, "billing")
    assert [o.kind for o in await transport.publish(batch)] == ["sent"] * 3


async def test_of_many_messages_under_way_just_those_that_nobody_would_get_are_not_sent(
    rabbits: Open, rabbitmq_url: str, name: str
) -> None:
    transport = rabbits(rabbitmq_url, binding="wanted")
    await know(transport, name, "billing")
    batch = [message(name, f"k{n}", b"%d" % n, type="wanted" if n % 7 % 3 else "other") for n in range(3000)]
    calls = [batch[at : at + 500] for at in range(0, 3000, 500)]
    outcomes = [o for found in await asyncio.gather(*map(transport.publish, calls)) for o in found]
    assert [o.kind for o in outcomes] == ["sent" if m.type == "wanted" else "unavailable" for m in batch]
    found = await read_all(transport, name, "billing")
    assert Counter(ids(found)) == Counter(m.id for m in batch if m.type == "wanted")


async def test_what_is_rejected_lies_in_the_dead_letters_queue(rabbits: Open, rabbitmq_url: str, name: str) -> None:
    transport = rabbits(rabbitmq_url)
    await know(transport, name, "billing")
    sent = message(name, "k", b"poison")
    await transport.publish([sent, message(name, "k", b"good")])
    subscription = await transport.subscribe([name], "billing", window=10)
    first = await subscription.fetch(1, 10)
    await subscription.reject(first[0])
    (good,) = await read(subscription, lambda found: bool(found))
    assert good.payload == b"good"
    _, properties, body = await get(rabbitmq_url, f"{name}.billing.dlq")
    assert (body, properties.headers[wire.ID]) == (b"poison", sent.id)
    assert properties.delivery_mode == 2
    assert await read_all(transport, name, "billing") == []


async def test_what_waits_for_its_next_delivery_holds_up_nothing_and_comes_back_as_suspect(
    rabbits: Open, rabbitmq_url: str, name: str
) -> None:
    transport = rabbits(rabbitmq_url)
    await know(transport, name, "billing")
    sent = numbered(name, 5)
    await transport.publish(sent)
    subscription = await transport.subscribe([name], "billing", window=5)
    (first,) = await subscription.fetch(1, 10)
    assert not first.suspect
    await subscription.retry(first, 0.5)
    found = await read(subscription, lambda found: len(found) >= 5)
    assert [int(d.payload or b"") for d in found] == [1, 2, 3, 4, 0]
    again = found[-1]
    assert again.suspect
    assert dict(again.headers).items() >= dict(first.headers).items()
    assert b"expired" in dict(again.headers)["x-death"]
    assert await read_all(transport, name, "billing") == []


async def test_a_second_member_stands_by_and_takes_over_in_order(rabbits: Open, rabbitmq_url: str, name: str) -> None:
    first, second = rabbits(rabbitmq_url), rabbits(rabbitmq_url)
    await know(first, name, "billing")
    await Sending(first, numbered(name, 300)).run()
    working = await first.subscribe([name], "billing", window=50)
    standing = await second.subscribe([name], "billing", window=50)
    found = await read(working, lambda found: len(found) >= 100)
    held = await working.fetch(20, 5)
    assert held
    assert await standing.fetch(1, 0.3) == []
    await first.close(abort=True)
    rest = await read(standing, lambda rest: len(rest) >= 300 - len(found))
    assert Counter(ids([*found, *rest])).most_common(1)[0][1] == 1
    assert first_deliveries([*found, *rest]) == in_order(300)
    assert [d.suspect for d in rest[: len(held)]] == [True] * len(held)


async def test_what_a_classic_queue_delivers_again_is_suspect_too(rabbits: Open, rabbitmq_url: str, name: str) -> None:
    """It counts no deliveries, and only says that this is not the first."""
    first, second = (rabbits(rabbitmq_url, queue_type="classic") for _ in range(2))
    await know(first, name, "billing")
    await Sending(first, numbered(name, 20)).run()
    held = await (await first.subscribe([name], "billing", window=10)).fetch(10, 10)
    assert {d.suspect for d in held} == {False}
    await first.close(abort=True)
    found = await read_all(second, name, "billing")
    assert first_deliveries(found) == in_order(20)
    assert {id for id, d in zip(ids(found), found, strict=True) if d.suspect} >= set(ids(held))


async def test_members_that_come_and_go_share_the_partitions_and_turn_no_key_around(
    rabbits: Open, rabbitmq_url: str, name: str
) -> None:
    transports = [rabbits(rabbitmq_url, partitions=4) for _ in range(3)]
    await know(transports[0], name, "billing")
    churn = Churn(name, "billing", keys=40)
    churn.produce(rabbits(rabbitmq_url))
    for joining in range(3):
        churn.join(joining, transports[joining])
        await churn.all_have_some(*range(joining + 1))
    await churn.leave(0)
    await churn.all_have_some(1, 2)
    await churn.finish([1, 2])
    assert len(set(ids(churn.found))) == churn.count
    assert first_deliveries(churn.found) == in_order(churn.count, 40)
    assert len(churn.found) == churn.count, "something came twice though all was finished"


async def test_messages_without_a_key_get_through_partitions_too(rabbits: Open, rabbitmq_url: str, name: str) -> None:
    transport = rabbits(rabbitmq_url, partitions=3)
    await know(transport, name, "billing")
    outcomes = await transport.publish([message(name) for _ in range(50)])
    assert {o.kind for o in outcomes} == {"sent"}
    assert len(await read_all(transport, name, "billing")) == 50


async def test_a_key_stays_in_its_partition(rabbits: Open, rabbitmq_url: str, name: str) -> None:
    transport = rabbits(rabbitmq_url, partitions=4)
    await know(transport, name, "billing")
    await Sending(transport, numbered(name, 400, keys=100)).run()
    places = defaultdict(set)
    for found in await read_all(transport, name, "billing"):
        places[found.key].add(found.partition)
    assert {len(found) for found in places.values()} == {1}
    assert set.union(*places.values()) == {0, 1, 2, 3}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2)])
async def test_another_number_of_partitions_is_refused(
    rabbits: Open, rabbitmq_url: str, name: str, before: int, after: int
) -> None:
    await know(rabbits(rabbitmq_url, partitions=before), name, "billing")
    with pytest.raises(ConfigurationError, match="was made with another number of partitions"):
        await rabbits(rabbitmq_url, partitions=after).subscribe([name], "billing", window=1)
    await know(rabbits(rabbitmq_url, partitions=before), name, "billing")


async def test_a_queue_with_other_arguments_is_named_with_the_argument(
    rabbits: Open, rabbitmq_url: str, name: str
) -> None:
    transport = rabbits(rabbitmq_url)
    await transport.declare([name])
    await know(transport, f"{name}-2", "billing")
    await raw(rabbitmq_url, lambda channel: channel.queue_declare(f"{name}.billing", durable=True))
    with pytest.raises(ConfigurationError, match=r"inequivalent arg 'x-.*delete it, or make the URL's parameters fit"):
        await transport.subscribe([name], "billing", window=1)
    assert [o.kind for o in await transport.publish([message(f"{name}-2", "k")])] == ["sent"]


async def test_what_is_there_already_is_used_as_it_is(rabbits: Open, rabbitmq_url: str, name: str) -> None:
    """An exchange of another type, a classic queue with a name of its own: all made by somebody else."""

    def make(channel: object) -> None:
        channel.exchange_declare(name, "fanout", durable=True)  # type: ignore[attr-defined]
        channel.queue_declare(f"q-{name}", durable=True)  # type: ignore[attr-defined]
        channel.queue_bind(f"q-{name}", name)  # type: ignore[attr-defined]

    await raw(rabbitmq_url, make)
    transport = rabbits(rabbitmq_url, declare="no", queue="q-{topic}")
    assert await transport.check([name]) == []
    assert {o.kind for o in await transport.publish(numbered(name, 10))} == {"sent"}
    assert len(await read_all(transport, name, "any")) == 10
    with pytest.raises(Unavailable, match="there is no queue"):
        await rabbits(rabbitmq_url, declare="no").subscribe([name], "billing", window=1)
    with pytest.raises(Unavailable, match="there is no exchange"):
        await rabbits(rabbitmq_url, declare="no").subscribe([f"{name}-2"], "billing", window=1)


async def test_a_consumer_that_does_not_keep_up_holds_no_more_than_its_window(
    rabbits: Open, rabbitmq_url: str, name: str
) -> None:
    transport = rabbits(rabbitmq_url)
    await know(transport, name, "billing")
    await Sending(transport, numbered(name, 5000, keys=500), batch=500, calls=1).run()
    subscription = await transport.subscribe([name], "billing", window=50)
    feeds = subscription._feeds  # type: ignore[attr-defined]
    for _ in range(30):
        found = await subscription.fetch(10, 1)
        await asyncio.sleep(0.01)
        assert sum(len(feed.waiting) + len(feed.out) for feed in feeds) <= 50
        await subscription.ack(found)
