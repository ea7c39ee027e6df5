"""The Kafka transport against a real broker that is well."""

from __future__ import annotations

from collections import Counter

import pytest
from aiokafka import AIOKafkaProducer

from outbox import wire
from outbox.errors import ConfigurationError
from outbox.testing.conformance import message, numbered
from tests.transports.kafka_tools import Open, gone, read_all, with_admin
from tests.transports.relaying import Sending, first_deliveries, in_order
from tests.transports.tools import read


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


def test_our_headers_have_the_names_that_docs_promise() -> None:
    assert (wire.ID, wire.TYPE, wire.CONTENT_TYPE) == ("outbox-id", "outbox-type", "content-type")
