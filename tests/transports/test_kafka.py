"""The Kafka transport against a real broker that is killed, frozen, and told to refuse things."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.structs import TopicPartition

from outbox import wire
from outbox._message import Outgoing
from outbox.errors import ConfigurationError, MessageTooLarge, Refused, Unavailable
from outbox.testing.conformance import ids, message, numbered
from outbox.transport import Delivery, Subscription, Transport
from outbox.transports.kafka import KafkaTransport
from tests.services import Server
from tests.transports.relaying import Sending, first_deliveries, in_order

Open = Callable[..., KafkaTransport]


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Opens transports, with parameters; each is cut off after the test, since its broker may not be there."""
    transports: list[KafkaTransport] = []

    def another(url: str, **parameters: object) -> KafkaTransport:
        query = "&".join(f"{name}={value}" for name, value in ({"session_timeout_ms": 6000} | parameters).items())
        transports.append(KafkaTransport(f"{url}?{query}"))
        return transports[-1]

    yield another
    for transport in transports:
        await transport.close(abort=True)


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


async def read(
    subscription: Subscription, enough: Callable[[list[Delivery]], bool], within: float = 40
) -> list[Delivery]:
    """Fetch and acknowledge until there is enough."""
    found: list[Delivery] = []
    deadline = time.monotonic() + within
    while not enough(found):
        assert time.monotonic() < deadline, f"{len(found)} messages came in {within} s"
        try:
            batch = await subscription.fetch(500, 0.5)
        except Unavailable:
            continue
        await subscription.ack(batch)
        found += batch
    return found


async def read_for_ever(subscription: Subscription, found: list[Delivery]) -> None:
    while True:
        batch = await subscription.fetch(500, 0.5)
        await subscription.ack(batch)
        found += batch


async def until(condition: Callable[[], bool], within: float = 30) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "what should have happened has not"
        await asyncio.sleep(0.001)


async def read_all(transport: Transport, topic: str) -> list[Delivery]:
    """Everything in the topic, by a sentinel in each partition that is the last thing there."""
    count = len((await offsets(transport, topic)).keys())
    subscription = await transport.subscribe([topic], f"all-{uuid.uuid4().hex[:8]}", window=1_000_000)
    ends = await offsets(transport, topic)
    assert len(ends) == count

    def enough(found: list[Delivery]) -> bool:
        return len(found) >= sum(ends.values())

    found = await read(subscription, enough)
    await subscription.close()
    return found


async def offsets(transport: Transport, topic: str) -> dict[int, int]:
    """Where each partition ends."""
    from aiokafka import AIOKafkaConsumer

    assert isinstance(transport, KafkaTransport)
    consumer = AIOKafkaConsumer(**transport._settings.connection())
    await consumer.start()
    try:
        partitions = await consumer._client._wait_on_metadata(topic)
        ends = await consumer.end_offsets([TopicPartition(topic, partition) for partition in partitions])
        return {place.partition: end for place, end in ends.items()}
    finally:
        await consumer.stop()


async def with_admin(url: str, work: Callable[[AIOKafkaAdminClient], object]) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=url.removeprefix("kafka://"))
    await admin.start()
    try:
        await work(admin)  # type: ignore[misc]
    finally:
        await admin.close()


async def set_limit(url: str, topic: str, limit: int) -> None:
    resource = ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": str(limit)})
    await with_admin(url, lambda admin: admin.alter_configs([resource]))


# ---- a broker that is well


async def test_a_key_goes_where_the_java_client_puts_it(opened: Open, kafka_url: str, name: str) -> None:
    # Utils.toPositive(Utils.murmur2(key)) of Kafka's own UtilsTest, modulo 6
    java = {"21": -973932308, "foobar": -790332482, "a-little-bit-long-string": -985981536, "abc": 479470107}
    transport = opened(kafka_url)
    await transport.declare([name], partitions=6)
    await transport.publish([message(name, key) for key in java])
    found = await read_all(transport, name)
    assert {(d.key or b"").decode(): d.partition for d in found} == {k: (v & 0x7FFFFFFF) % 6 for k, v in java.items()}


async def test_a_new_partition_is_used_and_keys_move_as_java_moves_them(
    opened: Open, kafka_url: str, name: str
) -> None:
    from aiokafka.admin import NewPartitions
    from aiokafka.partitioner import murmur2

    from outbox.transports import _kafka_publish

    transport = opened(kafka_url)
    await transport.declare([name], partitions=2)
    await Sending(transport, numbered(name, 40, keys=40)).run()
    await with_admin(kafka_url, lambda admin: admin.create_partitions({name: NewPartitions(5)}))
    assert transport._publisher is not None
    fact, asked = transport._publisher._facts[name]
    transport._publisher._facts[name] = fact, asked - _kafka_publish.FACTS_AGE - 1  # as time passes
    await Sending(transport, numbered(name, 40, keys=40, first=40)).run()
    places = {(d.key, d.partition) for d in await read_all(transport, name) if int(d.payload or b"") >= 40}
    assert places == {(b"key-%d" % k, (murmur2(b"key-%d" % k) & 0x7FFFFFFF) % 5) for k in range(40)}


async def test_compressed_batches_come_out_as_they_went_in(opened: Open, kafka_url: str, name: str) -> None:
    transport = opened(kafka_url, compression_type="gzip")
    await transport.declare([name], partitions=2)
    await Sending(transport, numbered(name, 1000)).run()
    assert first_deliveries(await read_all(transport, name)) == in_order(1000)


async def test_a_session_that_the_broker_does_not_allow_is_a_mistake(opened: Open, kafka_url: str, name: str) -> None:
    transport = opened(kafka_url, session_timeout_ms=100)
    await transport.declare([name], partitions=1)
    with pytest.raises(ConfigurationError, match=r"session_timeout_ms=100 is not between"):
        await transport.subscribe([name], name, window=10)


async def test_offsets_of_transactions_leave_no_gap(opened: Open, kafka_url: str, name: str) -> None:
    transport = opened(kafka_url)
    await transport.declare([name], partitions=1)
    producer = AIOKafkaProducer(bootstrap_servers=kafka_url.removeprefix("kafka://"), transactional_id=name)
    await producer.start()
    for number, commit in enumerate([True, False, True, False]):
        await producer.begin_transaction()
        for _ in range(10):
            await producer.send(name, b"%d" % number, key=b"k", headers=[("foreign", None), ("id", b"x")])
        await (producer.commit_transaction() if commit else producer.abort_transaction())
    await producer.stop()
    subscription = await transport.subscribe([name], name, window=7)
    found = await read(subscription, lambda found: len(found) >= 20)
    assert Counter(delivery.payload for delivery in found) == {b"0": 10, b"2": 10}
    assert found[0].headers == [("foreign", b""), ("id", b"x")]
    await subscription.close()
    await Sending(transport, [message(name, "k", b"last")]).run()
    again = await transport.subscribe([name], name, window=7)
    assert [delivery.payload for delivery in await read(again, bool)] == [b"last"]


async def test_a_topic_made_anew_is_read_from_its_beginning(opened: Open, kafka_url: str, name: str) -> None:
    transport = opened(kafka_url)
    await transport.declare([name], partitions=1)
    await Sending(transport, numbered(name, 20)).run()
    subscription = await transport.subscribe([name], name, window=50)
    await read(subscription, lambda found: len(found) >= 20)
    await subscription.close()
    await with_admin(kafka_url, lambda admin: admin.delete_topics([name]))
    await gone(transport, name)
    await transport.declare([name], partitions=1)
    other = opened(kafka_url)
    await Sending(other, numbered(name, 5, first=100)).run()
    again = await other.subscribe([name], name, window=50)
    found = await read(again, lambda found: len(found) >= 5)
    assert sorted(int(delivery.payload or b"") for delivery in found) == list(range(100, 105))


async def gone(transport: KafkaTransport, topic: str) -> None:
    """Wait until the topic has been deleted."""
    for _ in range(400):
        if await transport.check([topic]):
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"{topic} is still there")


# ---- what the broker refuses


async def test_a_topic_with_a_low_limit_takes_many_small_messages_and_no_large_one(
    opened: Open, kafka_url: str, name: str
) -> None:
    limit = 5000
    new = NewTopic(name, 1, 1, topic_configs={"max.message.bytes": str(limit)})
    await with_admin(kafka_url, lambda admin: admin.create_topics([new]))
    transport = opened(kafka_url)
    large = message(name, "key-3", b"x" * 6000)
    sending = Sending(transport, [*numbered(name, 1000), large, *numbered(name, 1000, first=1000)], batch=600)
    await sending.run()
    assert [m.id for m, _ in sending.rejected] == [large.id]
    assert isinstance(sending.rejected[0][1].error, MessageTooLarge)
    assert "5000" in sending.rejected[0][1].reason
    assert sending.unavailable == [], "it was refused by the broker, and not before it was sent"
    assert first_deliveries(await read_all(transport, name)) == in_order(2000)


async def test_a_limit_that_was_lowered_meanwhile_makes_nothing_overtake(
    opened: Open, kafka_url: str, name: str
) -> None:
    transport = opened(kafka_url)
    await transport.declare([name], partitions=1)
    await Sending(transport, [message(name, "warm-up", b"0")]).run()
    await set_limit(kafka_url, name, 5000)
    assert transport._publisher is not None
    assert transport._publisher._producer is not None
    transport._publisher._producer.end()
    transport._publisher._facts = _Frozen(transport._publisher._facts)
    # The first call is the new producer's first batch in its partition, and as a whole too large. The broker knows no
    # sequence of this producer yet, so that it would take the small ones behind it in spite of the hole (KAFKA-14359).
    padding = json.dumps({"pad": "x" * 900})
    padded = [m._replace(headers=padding) for m in numbered(name, 6, keys=1)]
    sending = Sending(transport, [*padded, *numbered(name, 54, keys=1, first=6)], batch=6, calls=5)
    await sending.run()
    assert {outcome.kind for outcome in sending.unavailable} == {"unavailable"}
    found = [d for d in await read_all(transport, name) if d.key != b"warm-up"]
    assert [int(delivery.payload or b"") for delivery in found] == list(range(60))


class _Frozen(dict):  # type: ignore[type-arg]
    """Facts that a new producer does not forget: the limit is changed between its question and its batch."""

    def clear(self) -> None:
        pass

    def pop(self, key: object, default: object = None) -> object:  # type: ignore[override]
        return self.get(key, default)


async def test_a_record_that_the_broker_refuses_is_told_from_its_neighbours(
    opened: Open, kafka_url: str, name: str
) -> None:
    new = NewTopic(name, 1, 1, topic_configs={"cleanup.policy": "compact"})
    await with_admin(kafka_url, lambda admin: admin.create_topics([new]))
    transport = opened(kafka_url)
    keyless = [message(name), message(name)]
    sent = numbered(name, 300)
    sending = Sending(transport, [*sent[:120], keyless[0], *sent[120:250], keyless[1], *sent[250:]])
    await sending.run()
    assert [m.id for m, _ in sending.rejected] == [m.id for m in keyless]
    assert {type(outcome.error) for _, outcome in sending.rejected} == {Refused}
    assert first_deliveries(await read_all(transport, name)) == in_order(300)


@pytest.mark.parametrize("bad", ["no such topic!", "x" * 250, "..", "größe"])
async def test_a_name_that_no_topic_can_have_is_rejected(opened: Open, kafka_url: str, name: str, bad: str) -> None:
    transport = opened(kafka_url)
    await transport.declare([name], partitions=1)
    outcomes = await transport.publish([message(name, "k"), message(bad, "k"), message(name, "k")])
    assert [outcome.kind for outcome in outcomes] == ["sent", "reject", "sent"]
    assert isinstance(outcomes[1].error, Refused)


async def test_a_topic_that_is_deleted_under_way_stops_the_others_for_a_moment_only(
    opened: Open, kafka_url: str, name: str
) -> None:
    transport = opened(kafka_url, delivery_timeout_ms=30_000)
    other = f"{name}-other"
    await transport.declare([name, other], partitions=2)
    await Sending(transport, [*numbered(name, 50), *numbered(other, 50)]).run()
    await with_admin(kafka_url, lambda admin: admin.delete_topics([name]))
    begun = time.monotonic()
    outcomes = await transport.publish(numbered(name, 10))
    assert {(outcome.kind, outcome.scope) for outcome in outcomes} == {("unavailable", "topic")}
    await Sending(transport, numbered(other, 200, first=50)).run()
    assert time.monotonic() - begun < 10
    assert first_deliveries(await read_all(transport, other)) == in_order(250)


async def test_declaring_says_what_cannot_be(opened: Open, kafka_url: str, name: str) -> None:
    transport = opened(kafka_url)
    await transport.declare([name])
    await transport.declare([name], partitions=3)  # it exists: not an error, and not changed
    assert len(await offsets(transport, name)) == 1
    with pytest.raises(ConfigurationError, match="cannot be created"):
        await transport.declare(["no such topic!"])


# ---- a broker that is away


async def test_connecting_to_nobody_names_the_host(opened: Open) -> None:
    transport = opened("kafka://127.0.0.1:1,127.0.0.1:2", delivery_timeout_ms=3000)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1: .*refused.*127\.0\.0\.1:2"):
        await transport.connect()
    begun = time.monotonic()
    (outcome,) = await transport.publish([message("orders", "k")])
    assert (outcome.kind, outcome.scope) == ("unavailable", "transport")
    assert "127.0.0.1:1" in outcome.reason
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        await transport.subscribe(["orders"], "group", window=10)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        await transport.declare(["orders"])
    assert "127.0.0.1:1" in (await transport.check(["orders"]))[0]
    assert time.monotonic() - begun < 3


async def test_a_port_that_hangs_up_gets_a_hint(opened: Open) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(Unavailable, match="hangs up at once; is its security_protocol PLAINTEXT"):
        await opened(f"kafka://127.0.0.1:{port}").connect()
    server.close()


async def test_connecting_is_quick_where_all_is_well(opened: Open, kafka_url: str) -> None:
    await opened(kafka_url).connect()


async def test_a_broker_that_is_killed_under_way_loses_and_turns_around_nothing(
    opened: Open, killable_kafka: Server, name: str
) -> None:
    transport = opened(killable_kafka.url, delivery_timeout_ms=4000)
    await transport.declare([name], partitions=4)
    count = 8000
    sending = Sending(transport, numbered(name, count))
    running = asyncio.create_task(sending.run(within=60))
    await until(lambda: len(sending.sent) >= count // 4)
    await asyncio.to_thread(killable_kafka.kill)
    await until(lambda: bool(sending.unavailable))
    assert not running.done()
    await asyncio.to_thread(killable_kafka.restart)
    await running
    assert max(sending.waves) < 4000 / 1000 + 2
    found = await read_all(transport, name)
    assert Counter(ids(found)).keys() == {m.id for m in sending.sent}
    assert first_deliveries(found) == in_order(count)


async def test_a_broker_that_is_frozen_under_way_is_given_up_in_time_and_nothing_is_turned_around(
    opened: Open, killable_kafka: Server, name: str
) -> None:
    transport = opened(killable_kafka.url, delivery_timeout_ms=2000)
    await transport.declare([name], partitions=4)
    count = 8000
    sending = Sending(transport, numbered(name, count))
    running = asyncio.create_task(sending.run(within=60))
    await until(lambda: len(sending.sent) >= count // 4)
    await asyncio.to_thread(killable_kafka.pause)
    await until(lambda: bool(sending.unavailable))
    await asyncio.to_thread(killable_kafka.resume)
    await running
    assert max(sending.waves) < 2000 / 1000 + 2
    found = await read_all(transport, name)
    assert Counter(ids(found)).keys() == {m.id for m in sending.sent}
    assert first_deliveries(found) == in_order(count)


async def test_nothing_is_sent_after_an_abort(opened: Open, killable_kafka: Server, name: str) -> None:
    doomed, other = opened(killable_kafka.url, delivery_timeout_ms=60_000), opened(killable_kafka.url)
    await other.declare([name], partitions=1)
    await Sending(doomed, numbered(name, 10)).run()
    await asyncio.to_thread(killable_kafka.pause)
    # The first is written to the socket; the others wait behind it for its answer.
    calls = [asyncio.create_task(doomed.publish(numbered(name, 10, first=10 * at))) for at in range(1, 6)]
    done, _ = await asyncio.wait(calls, timeout=0.5)
    assert not done
    begun = time.monotonic()
    await doomed.close(abort=True)
    assert time.monotonic() - begun < 2
    outcomes = [outcome for call in calls for outcome in await call]
    assert {outcome.kind for outcome in outcomes} == {"unavailable"}
    await asyncio.to_thread(killable_kafka.resume)
    # Whatever the broker had in its hands it has stored before it answers these.
    await Sending(other, numbered(name, 10, first=1000)).run()
    stored = {int(delivery.payload or b"") for delivery in await read_all(other, name)}
    assert stored >= {*range(10), *range(1000, 1010)}
    assert stored <= {*range(20), *range(1000, 1010)}, "a batch that had not been written to the socket was sent"
    await asyncio.sleep(1)
    assert {int(delivery.payload or b"") for delivery in await read_all(other, name)} == stored


async def test_an_abort_is_not_held_up_by_a_broker_that_does_not_answer_at_all(
    opened: Open, killable_kafka: Server, name: str
) -> None:
    transport = opened(killable_kafka.url, delivery_timeout_ms=60_000)
    await transport.declare([name], partitions=1)
    await asyncio.to_thread(killable_kafka.pause)
    connecting = asyncio.create_task(transport.publish(numbered(name, 10)))
    await asyncio.wait([connecting], timeout=0.3)
    begun = time.monotonic()
    await transport.close(abort=True)
    (kind,) = {outcome.kind for outcome in await asyncio.wait_for(connecting, 10)}
    assert kind == "unavailable"
    assert time.monotonic() - begun < 3


async def test_a_consumer_goes_on_after_the_broker_was_away_and_skips_nothing(
    opened: Open, killable_kafka: Server, name: str
) -> None:
    transport = opened(killable_kafka.url, delivery_timeout_ms=4000)
    await transport.declare([name], partitions=4)
    await Sending(transport, numbered(name, 1000)).run()
    subscription = await transport.subscribe([name], name, window=100)
    found = await read(subscription, lambda found: len(found) >= 400)
    await asyncio.to_thread(killable_kafka.kill)
    with pytest.raises(Unavailable):
        await read_for_ever(subscription, found)
    await asyncio.to_thread(killable_kafka.restart)
    found += await read(subscription, lambda more: len({*ids(found), *ids(more)}) >= 1000, within=60)
    assert first_deliveries(found) == in_order(1000)
    await subscription.close()


async def test_a_consumer_closes_in_time_while_the_broker_is_frozen(
    opened: Open, killable_kafka: Server, name: str
) -> None:
    transport = opened(killable_kafka.url, delivery_timeout_ms=4000)
    await transport.declare([name], partitions=1)
    await Sending(transport, numbered(name, 10)).run()
    subscription = await transport.subscribe([name], name, window=100)
    await read(subscription, lambda found: len(found) >= 10)
    await asyncio.to_thread(killable_kafka.pause)
    begun = time.monotonic()
    await subscription.close()
    assert time.monotonic() - begun < 12


async def test_cancelling_a_publish_sends_no_successor_of_it(opened: Open, kafka_url: str, name: str) -> None:
    transport = opened(kafka_url)
    await transport.declare([name], partitions=1)
    await Sending(transport, numbered(name, 1)).run()
    first = asyncio.create_task(transport.publish(numbered(name, 5000, keys=1, first=1)))
    second = asyncio.create_task(transport.publish(numbered(name, 10, keys=1, first=5001)))
    await asyncio.sleep(0)
    first.cancel()
    assert {outcome.kind for outcome in await second} == {"unavailable"}
    rest: list[Outgoing] = numbered(name, 10, keys=1, first=6000)
    await Sending(transport, rest).run()
    numbers = [int(delivery.payload or b"") for delivery in await read_all(transport, name)]
    assert not set(range(5001, 5011)) & set(numbers)
    assert numbers[-10:] == list(range(6000, 6010))


def test_our_headers_have_the_names_that_docs_promise() -> None:
    assert (wire.ID, wire.TYPE, wire.CONTENT_TYPE) == ("outbox-id", "outbox-type", "content-type")
