"""The Kafka transport against a real broker that is killed, frozen, or was never there."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from outbox._outgoing import Outgoing
from outbox.errors import Unavailable
from outbox.testing.conformance import ids, message, numbered
from tests.services import Server
from tests.transports.kafka_tools import Open, read_all
from tests.transports.relaying import Sending, first_deliveries, in_order, send_through_an_outage
from tests.transports.tools import read, read_for_ever


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
    await send_through_an_outage(sending, killable_kafka, "kill")
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
    await send_through_an_outage(sending, killable_kafka, "pause")
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
    # what its caller does then: send again what was not answered, and go on behind it
    again: list[Outgoing] = numbered(name, 5000, keys=1, first=1)
    await Sending(transport, again).run()
    await Sending(transport, numbered(name, 10, keys=1, first=6000)).run()
    numbers = [int(delivery.payload or b"") for delivery in await read_all(transport, name)]
    assert not set(range(5001, 5011)) & set(numbers)
    # What was on the wire when it was cancelled may be stored, and late at that: then as a duplicate.
    assert list(dict.fromkeys(numbers)) == [0, *range(1, 5001), *range(6000, 6010)]
