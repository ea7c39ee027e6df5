"""The RabbitMQ transport against a broker that is killed, stopped, frozen, full, or was never one."""

from __future__ import annotations

import asyncio
import re
import struct
import time
from collections import Counter
from collections.abc import Callable

import pytest

from outbox.errors import Unavailable
from outbox.testing.conformance import ids, message, numbered
from outbox.transports.rabbitmq import RabbitmqTransport
from tests.services import RabbitmqServer
from tests.transports.rabbitmq_tools import Open, know, raw, read_all
from tests.transports.relaying import Sending, first_deliveries, in_order, send_through_an_outage
from tests.transports.tools import peer, read, read_for_ever, until


async def test_connecting_to_nobody_names_the_host(rabbits: Open) -> None:
    transport = rabbits("amqp://app:secret@127.0.0.1:1,127.0.0.1:2", delivery_timeout_ms=3000)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1: .*refused.*127\.0\.0\.1:2") as caught:
        await transport.connect()
    assert "secret" not in str(caught.value)
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


async def test_the_second_server_is_taken_when_the_first_is_away(rabbits: Open, rabbitmq_url: str) -> None:
    await rabbits(rabbitmq_url.replace("@", "@127.0.0.1:1,")).connect()


async def test_a_host_that_does_not_exist_is_named(rabbits: Open) -> None:
    with pytest.raises(Unavailable, match=r"nowhere\.invalid:5672: there is no such host"):
        await rabbits("amqp://nowhere.invalid", delivery_timeout_ms=20_000).connect()


async def _hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _another_protocol(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readexactly(8)
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)
    await reader.read()


async def _another_version(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readexactly(8)
    writer.write(b"AMQP\x00\x01\x00\x00")
    await writer.drain()
    writer.close()


async def _a_giant_frame(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readexactly(8)
    writer.write(struct.pack(">BHL", 1, 0, 1 << 31))
    while True:
        writer.write(bytes(65536))
        await writer.drain()


async def _silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()
    await asyncio.Event().wait()


@pytest.mark.parametrize("behave", [_hang_up, _another_protocol, _another_version, _silence])
async def test_what_is_no_broker_is_unavailable_and_named(rabbits: Open, behave: Callable[..., object]) -> None:
    async with peer(behave) as where:
        transport = rabbits(f"amqp://{where}", delivery_timeout_ms=2000)
        begun = time.monotonic()
        with pytest.raises(Unavailable, match=r"cannot reach a broker \(127\.0\.0\.1:\d+: \w+"):
            await transport.connect()
        (outcome,) = await transport.publish([message("orders", "k")])
        assert (outcome.kind, outcome.scope) == ("unavailable", "transport")
        assert time.monotonic() - begun < 6
        begun = time.monotonic()
        await transport.close()
        assert time.monotonic() - begun < 3


async def test_a_frame_that_is_too_large_is_not_waited_for(rabbits: Open) -> None:
    async with peer(_a_giant_frame) as where:
        with pytest.raises(Unavailable, match="does not speak AMQP"):  # not: no answer in time
            await rabbits(f"amqp://{where}").connect()


@pytest.mark.parametrize("how", ["kill", "stop", "pause"])
async def test_a_broker_that_goes_and_comes_back_under_way_loses_and_turns_around_nothing(
    rabbits: Open, killable_rabbitmq: RabbitmqServer, name: str, how: str
) -> None:
    transport = rabbits(killable_rabbitmq.url, delivery_timeout_ms=2000)
    await know(transport, name, "billing")
    await know(
        transport, f"{name}-later", "billing"
    )  # RabbitMQ 3.10 finds no leader for the queue made last before a SIGKILL
    count, keys = 6000, 200
    sending = Sending(transport, numbered(name, count, keys=keys), batch=100, calls=2)
    await send_through_an_outage(sending, killable_rabbitmq, how)
    assert max(sending.waves) < 2000 / 1000 + 3
    found = await read_all(rabbits(killable_rabbitmq.url), name, "billing")
    assert Counter(ids(found)).keys() == {m.id for m in sending.sent}
    assert first_deliveries(found) == in_order(count, keys)


async def test_nothing_is_sent_after_an_abort(rabbits: Open, killable_rabbitmq: RabbitmqServer, name: str) -> None:
    doomed, other = rabbits(killable_rabbitmq.url, delivery_timeout_ms=60_000), rabbits(killable_rabbitmq.url)
    await know(other, name, "billing")
    await Sending(doomed, numbered(name, 10)).run()
    await asyncio.to_thread(killable_rabbitmq.pause)
    payload = bytes(200_000)
    calls = [
        asyncio.create_task(doomed.publish([message(name, f"key-{at}", payload) for _ in range(20)])) for at in range(5)
    ]
    done, _ = await asyncio.wait(calls, timeout=0.5)
    assert not done
    begun = time.monotonic()
    await doomed.close(abort=True)
    assert time.monotonic() - begun < 2
    outcomes = [outcome for call in calls for outcome in await call]
    assert {outcome.kind for outcome in outcomes} == {"unavailable"}
    await asyncio.to_thread(killable_rabbitmq.resume)
    await Sending(other, numbered(name, 10, first=10)).run()
    found = await read_all(other, name, "billing")
    assert len([d for d in found if d.payload != payload]) == 20
    assert len(found) < 120 - 50, "what had not been written to the socket was sent"
    assert await read_all(other, name, "billing") == []


async def test_an_abort_is_not_held_up_by_a_broker_that_does_not_answer_at_all(
    rabbits: Open, killable_rabbitmq: RabbitmqServer, name: str
) -> None:
    transport = rabbits(killable_rabbitmq.url, delivery_timeout_ms=60_000)
    await asyncio.to_thread(killable_rabbitmq.pause)
    connecting = asyncio.create_task(transport.publish(numbered(name, 10)))
    await asyncio.wait([connecting], timeout=0.3)
    begun = time.monotonic()
    await transport.close(abort=True)
    (kind,) = {outcome.kind for outcome in await asyncio.wait_for(connecting, 10)}
    assert kind == "unavailable"
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_consumer_goes_on_after_the_broker_was_away_and_skips_nothing(
    rabbits: Open, killable_rabbitmq: RabbitmqServer, name: str, how: str
) -> None:
    transport = rabbits(killable_rabbitmq.url, delivery_timeout_ms=4000)
    await know(transport, name, "billing")
    await know(transport, f"{name}-later", "billing")  # as above
    await Sending(transport, numbered(name, 1000, keys=100), batch=100, calls=1).run()
    asked: list[frozenset[tuple[str, int]]] = []

    async def lost(places: frozenset[tuple[str, int]]) -> None:
        asked.append(places)

    subscription = await transport.subscribe([name], "billing", window=100, revoked=lost)
    found = await read(subscription, lambda found: len(found) >= 400)
    await asyncio.to_thread(getattr(killable_rabbitmq, how))
    with pytest.raises(Unavailable, match="rabbitmq: "):
        await read_for_ever(subscription, found)
    assert asked == [frozenset({(name, 0)})]
    with pytest.raises(Unavailable):
        await subscription.fetch(500, 0.5)
    await asyncio.to_thread(killable_rabbitmq.restart)
    found += await read(subscription, lambda more: len({*ids(found), *ids(more)}) >= 1000, within=60)
    assert first_deliveries(found) == in_order(1000, 100)
    await subscription.close()


async def test_a_consumer_closes_in_time_while_the_broker_is_frozen(
    rabbits: Open, killable_rabbitmq: RabbitmqServer, name: str
) -> None:
    transport = rabbits(killable_rabbitmq.url, delivery_timeout_ms=4000)
    await know(transport, name, "billing")
    await Sending(transport, numbered(name, 10)).run()
    subscription = await transport.subscribe([name], "billing", window=100)
    await read(subscription, lambda found: len(found) >= 10)
    await asyncio.to_thread(killable_rabbitmq.pause)
    begun = time.monotonic()
    await subscription.close()
    await transport.close()
    assert time.monotonic() - begun < 10


async def test_a_frozen_broker_is_noticed_by_its_missing_heartbeats(
    rabbits: Open, killable_rabbitmq: RabbitmqServer, name: str
) -> None:
    transport = rabbits(killable_rabbitmq.url, heartbeat=1, delivery_timeout_ms=2000)
    await know(transport, name, "billing")
    subscription = await transport.subscribe([name], "billing", window=100)
    await asyncio.to_thread(killable_rabbitmq.pause)
    with pytest.raises(Unavailable, match="silent for too long"):
        await subscription.fetch(10, 30)


async def test_heartbeats_are_answered_while_a_handler_takes_its_time(
    rabbits: Open, rabbitmq_url: str, name: str
) -> None:
    transport = rabbits(rabbitmq_url, heartbeat=1)
    await know(transport, name, "billing")
    await transport.publish([message(name, "k")])
    subscription = await transport.subscribe([name], "billing", window=100)
    (held,) = await subscription.fetch(1, 10)
    checker = subscription._link._connection._heartbeat_checker  # type: ignore[attr-defined]
    # a broker hangs up on a client that has been silent for three of its heartbeats
    await until(lambda: checker._heartbeat_frames_sent >= 10 and checker._heartbeat_frames_received >= 4)
    await subscription.ack([held])
    await subscription.close()
    assert await read_all(transport, name, "billing") == []


async def test_a_broker_without_memory_takes_no_messages_until_it_has_some_while_consumers_go_on(
    rabbits: Open, killable_rabbitmq: RabbitmqServer, name: str
) -> None:
    transport = rabbits(killable_rabbitmq.url, delivery_timeout_ms=20_000)
    await know(transport, name, "billing")
    await Sending(transport, numbered(name, 100)).run()
    subscription = await transport.subscribe([name], "billing", window=10)
    await asyncio.to_thread(killable_rabbitmq.ctl, "set_vm_memory_high_watermark", "0.000001")
    try:
        outcomes = []
        while not any(outcome.kind == "unavailable" for outcome in outcomes):
            begun = time.monotonic()
            outcomes = await transport.publish(numbered(name, 1, first=100))
        assert time.monotonic() - begun < 5
        (outcome,) = outcomes
        assert (outcome.kind, outcome.scope) == ("unavailable", "transport")
        assert "takes no messages at the moment (low on memory)" in outcome.reason
        begun = time.monotonic()
        (again,) = await transport.publish(numbered(name, 1, first=100))
        assert (again.kind, again.reason) == ("unavailable", outcome.reason)
        assert time.monotonic() - begun < 1
        await read(subscription, lambda found: len(found) >= 100)
    finally:
        await asyncio.to_thread(killable_rabbitmq.ctl, "set_vm_memory_high_watermark", "0.4")
    await Sending(transport, numbered(name, 10, first=200)).run()


async def test_an_exchange_that_is_deleted_under_way_stops_only_its_topic(
    rabbits: Open, rabbitmq_url: str, name: str
) -> None:
    transport = rabbits(rabbitmq_url, auto_create="no")
    doomed, other = f"{name}-doomed", f"{name}-other"
    await know(transport, doomed, "billing")
    await know(transport, other, "billing")
    await Sending(transport, [message(doomed, "k"), message(other, "k")]).run()
    link = transport._publisher._link  # type: ignore[union-attr]
    await raw(rabbitmq_url, lambda channel: channel.exchange_delete(doomed))
    batch = [m for n in range(200) for m in (message(doomed, f"k{n}"), message(other, f"k{n}"))]
    for _ in range(2):
        outcomes = await transport.publish(batch)
        assert [(o.kind, o.scope) for o in outcomes] == [("unavailable", "topic"), ("sent", "transport")] * 200
        assert re.search("no exchange", outcomes[0].reason)
    assert transport._publisher._link is link  # type: ignore[union-attr]
    await know(transport, doomed, "billing")
    assert {o.kind for o in await transport.publish(batch)} == {"sent"}


async def test_a_queue_that_is_deleted_under_way_is_told_and_made_anew(
    rabbits: Open, rabbitmq_url: str, name: str
) -> None:
    transport = rabbits(rabbitmq_url)
    await know(transport, name, "billing")
    subscription = await transport.subscribe([name], "billing", window=10)
    await raw(rabbitmq_url, lambda channel: channel.queue_delete(f"{name}.billing"))
    with pytest.raises(Unavailable, match=rf"{name}\.billing.*its queue is deleted or has no leader"):
        await subscription.fetch(10, 20)
    reading = asyncio.create_task(read(subscription, lambda found: bool(found)))
    await Sending(transport, numbered(name, 1)).run()
    assert [d.payload for d in await reading] == [b"0"]


async def test_a_full_queue_is_unavailable_and_goes_on_when_there_is_room(
    rabbits: Open, rabbitmq: RabbitmqServer, name: str
) -> None:
    """A policy of the operator's: what the queue does not take is refused by its confirm."""
    transport = rabbits(rabbitmq.url)
    await know(transport, name, "billing")
    policy = '{"max-length": 5, "overflow": "reject-publish"}'
    await asyncio.to_thread(rabbitmq.ctl, "set_policy", "--apply-to", "queues", name, f"^{name}[.]billing$", policy)
    sent = 0
    outcomes = []
    while sent < 1000 and not outcomes:
        found = await transport.publish(numbered(name, 10, first=sent))
        sent += sum(o.kind == "sent" for o in found)
        outcomes = [o for o in found if o.kind != "sent"]
    assert {(o.kind, o.scope) for o in outcomes} == {("unavailable", "topic")}
    assert "did not take a message" in outcomes[0].reason
    found = await read_all(transport, name, "billing")
    assert len(found) == sent
    assert [o.kind for o in await transport.publish(numbered(name, 1))] == ["sent"]


async def test_closing_is_quick_for_a_transport_that_did_nothing(rabbits: Open) -> None:
    transport: RabbitmqTransport = rabbits("amqp://127.0.0.1:1")
    await transport.close()
    await transport.close(abort=True)
