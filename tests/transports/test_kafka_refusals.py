"""The Kafka transport against a real broker that refuses things."""

from __future__ import annotations

import json
import time

import pytest
from aiokafka.admin import NewTopic
from msgspec.structs import replace

from outbox.errors import ConfigurationError, MessageTooLarge, Refused
from outbox.testing.conformance import message, numbered
from tests.transports.kafka_tools import Open, offsets, read_all, set_limit, with_admin
from tests.transports.relaying import Sending, first_deliveries, in_order


async def test_a_topic_with_a_low_limit_takes_many_small_messages_and_no_large_one(
    opened: Open, kafka_url: str, name: str
) -> None:
    limit = 5000
    new = NewTopic(name, 1, 1, topic_configs={"max.message.bytes": str(limit)})
    await with_admin(kafka_url, lambda admin: admin.create_topics([new]))
    transport = opened(kafka_url)
    await transport.declare([name])  # waits until it is there
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
    padded = [replace(m, headers=padding) for m in numbered(name, 6, keys=1)]
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
    await transport.declare([name])  # waits until it is there
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
