"""The SQS transport against a service that is stopped, killed, frozen, overloaded, or was never one; and consumers killed."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from outbox.errors import Unavailable
from outbox.testing.conformance import ids, message, numbered
from tests.services import Server
from tests.transports.relaying import Sending, first_deliveries, in_order, send_through_an_outage
from tests.transports.sqs_tools import LONG, STANDARD_OR_FIFO, Open, read_all, with_parameters
from tests.transports.tools import peer, read, until

# ---------------------------------------------------------------- a service that goes and comes back


@STANDARD_OR_FIFO
async def test_a_service_that_freezes_under_way_loses_and_turns_around_nothing(
    queues: Open, killable_sqs: Server, topic_name: str, fifo: str
) -> None:
    """What was stored though its answer came too late is sent again: twice in a standard queue, once in a FIFO queue."""
    transport = queues(killable_sqs, fifo=fifo, delivery_timeout_ms=1000)
    reader = queues(killable_sqs, fifo=fifo, visibility_timeout_ms=60_000)  # longer than it is frozen
    subscription = await reader.subscribe([topic_name], "billing", window=1000)
    count, keys = 1000, 100
    sending = Sending(transport, numbered(topic_name, count, keys=keys), batch=50, calls=2)
    await send_through_an_outage(sending, killable_sqs, "pause")
    found = await read(subscription, lambda found: len(set(ids(found))) >= count)
    found += await read_all(subscription)
    assert set(ids(found)) == {m.id for m in sending.sent}
    assert {outcome.scope for outcome in sending.unavailable} == {"transport"}
    if fifo == "yes":
        assert first_deliveries(found) == in_order(count, keys)
        assert set(Counter(ids(found)).values()) == {1}


@pytest.mark.parametrize("how", ["kill", "stop"] if LONG else ["kill"])
async def test_publishers_and_consumers_go_on_when_a_service_that_was_away_is_back(
    queues: Open, killable_sqs: Server, topic_name: str, how: str
) -> None:
    """This one forgets its queues, too: the consumer makes its own anew, and until then nothing is sent."""
    transport, other = queues(killable_sqs, delivery_timeout_ms=2000), queues(killable_sqs)
    subscription = await other.subscribe([topic_name], "billing", window=100)
    await Sending(transport, numbered(topic_name, 100)).run()
    await read(subscription, lambda found: len(found) >= 100)
    await asyncio.to_thread(getattr(killable_sqs, how))
    (outcome,) = await transport.publish([message(topic_name, "k")])
    assert (outcome.kind, outcome.scope) == ("unavailable", "transport")
    assert "cannot be" in outcome.reason
    with pytest.raises(Unavailable, match=rf"group 'billing': queue '{topic_name}__billing' cannot be read"):
        await subscription.fetch(10, 20)
    await asyncio.to_thread(killable_sqs.restart)
    sending = Sending(transport, numbered(topic_name, 100, first=100))
    reading = asyncio.create_task(read(subscription, lambda found: len(set(ids(found))) >= 100))
    await sending.run(within=30)
    assert set(ids(await reading)) == {m.id for m in sending.sent}


async def test_a_queue_that_is_deleted_under_way_stops_only_its_topic(
    queues: Open, elasticmq: Server, topic_name: str
) -> None:
    transport = queues(elasticmq, refresh_ms=600_000)
    doomed, well = f"{topic_name}-doomed", f"{topic_name}-well"
    reader = queues(elasticmq)
    for topic, group in ((doomed, "billing"), (doomed, "mail"), (well, "billing")):
        await (await reader.subscribe([topic], group, window=1)).close()
    batch = [m for at in range(20) for m in (message(doomed, f"k{at}"), message(well, f"k{at}"))]
    assert {outcome.kind for outcome in await transport.publish(batch)} == {"sent"}
    client = await transport._client.get()  # type: ignore[attr-defined]
    for group, then in (("billing", ("sent", "transport")), ("mail", ("unavailable", "topic"))):
        url = (await client.get_queue_url(QueueName=f"{doomed}__{group}"))["QueueUrl"]
        await client.delete_queue(QueueUrl=url)
        outcomes = await transport.publish(batch)
        assert [(o.kind, o.scope) for o in outcomes] == [("unavailable", "topic"), ("sent", "transport")] * 20
        assert f"queue '{doomed}__{group}' cannot be written to: there is no such queue" in outcomes[0].reason
        # now that it is known, those are asked that are left
        outcomes = await transport.publish(batch)
        assert [(o.kind, o.scope) for o in outcomes] == [then, ("sent", "transport")] * 20
    await (await reader.subscribe([doomed], "billing", window=1)).close()
    assert {outcome.kind for outcome in await transport.publish(batch)} == {"sent"}


# ---------------------------------------------------------------- closing


async def test_nothing_is_sent_after_an_abort(queues: Open, killable_sqs: Server, topic_name: str) -> None:
    """What was on the wire may be stored: two requests of ten."""
    doomed = queues(killable_sqs, requests=2, delivery_timeout_ms=60_000)
    subscription = await queues(killable_sqs).subscribe([topic_name], "billing", window=1000)
    assert {outcome.kind for outcome in await doomed.publish(numbered(topic_name, 10))} == {"sent"}
    await asyncio.to_thread(killable_sqs.pause)
    calls = [asyncio.create_task(doomed.publish(numbered(topic_name, 100, first=first))) for first in (10, 110)]
    done, _ = await asyncio.wait(calls, timeout=0.5)
    assert not done
    await asyncio.wait_for(doomed.close(abort=True), 5)
    outcomes = [outcome for call in calls for outcome in await asyncio.wait_for(call, 5)]
    assert {outcome.kind for outcome in outcomes} == {"unavailable"}
    await asyncio.to_thread(killable_sqs.resume)
    assert 10 <= len(await read_all(subscription)) <= 10 + 2 * 10


@pytest.mark.parametrize("abort", [False, True])
async def test_a_close_ends_though_nothing_answers(
    queues: Open, killable_sqs: Server, topic_name: str, abort: bool
) -> None:
    transport = queues(killable_sqs, delivery_timeout_ms=2000)
    subscription = await transport.subscribe([topic_name], "billing", window=100)
    assert {outcome.kind for outcome in await transport.publish(numbered(topic_name, 20))} == {"sent"}
    await subscription.fetch(1, 10)
    await asyncio.to_thread(killable_sqs.pause)
    publishing = asyncio.create_task(transport.publish(numbered(topic_name, 100)))
    await asyncio.wait([publishing], timeout=0.2)
    await asyncio.wait_for(transport.close(abort=abort), 15)
    assert {outcome.kind for outcome in await asyncio.wait_for(publishing, 1)} == {"unavailable"}
    with pytest.raises(RuntimeError, match="closed"):
        await subscription.fetch(1, 1)


# ---------------------------------------------------------------- what answers otherwise


async def _hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _no_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(100)
    writer.write(b"AMQP\x00\x00\x09\x01")
    await writer.drain()
    writer.close()


async def _silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    while await reader.read(65536):
        pass


@pytest.mark.parametrize("behave", [_hang_up, _no_http, _silence])
async def test_what_is_no_service_is_unavailable_and_named(queues: Open, behave: Callable[..., object]) -> None:
    async with peer(behave) as where:
        transport = queues(_at(where), delivery_timeout_ms=1000, wait_ms=0)
        with pytest.raises(Unavailable, match="sqs: the service cannot be asked: "):
            await asyncio.wait_for(transport.connect(), 10)
        (outcome,) = await transport.publish([message("orders", "k")])
        assert (outcome.kind, outcome.scope) == ("unavailable", "transport")
        with pytest.raises(Unavailable, match="sqs: topic 'orders'"):
            await asyncio.wait_for(transport.subscribe(["orders"], "billing", window=10), 10)
        (said,) = await asyncio.wait_for(transport.check(["orders"]), 10)
        assert "orders" in said


def _at(where: str) -> str:
    return f"sqs://key:s3cret@us-east-1/?endpoint_url=http://{where}"


def _answers(
    status: int, body: dict[str, Any], heard: Callable[[bytes], object] = lambda head: None
) -> Callable[..., Coroutine[Any, Any, None]]:
    """A service that always says the same, as Amazon's does in its JSON protocol. ``heard`` has the head of each request."""
    text = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} x\r\nContent-Type: application/x-amz-json-1.0\r\nContent-Length: {len(text)}\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await reader.readuntil(b"\r\n\r\n")
            heard(request)
            length = next(
                int(line.partition(b":")[2])
                for line in request.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            )
            await reader.readexactly(length)
            writer.write(head.encode() + text)
            await writer.drain()

    return answer


@pytest.mark.parametrize(
    ("status", "code", "scope", "said"),
    [
        (400, "ThrottlingException", "transport", "ThrottlingException"),
        (403, "RequestThrottled", "transport", "RequestThrottled"),
        (503, "ServiceUnavailable", "transport", "ServiceUnavailable"),
        (403, "InvalidClientTokenId", "transport", "Look at the access key, its secret"),
        (403, "ExpiredTokenException", "transport", "the session token"),
        (400, "AccessDeniedException", "topic", "Grant sqs:SendMessage"),
    ],
)
async def test_what_the_service_says_is_told_and_costs_no_attempt(
    queues: Open, status: int, code: str, scope: str, said: str
) -> None:
    body = {"__type": f"com.amazonaws.sqs#{code}", "message": "no"}
    async with peer(_answers(status, body)) as where:
        (outcome,) = await queues(_at(where)).publish([message("orders", "k")])
    assert (outcome.kind, outcome.scope) == ("unavailable", scope)
    assert said in outcome.reason
    assert "s3cret" not in outcome.reason


async def test_polls_that_do_not_wait_pause_when_there_is_nothing(queues: Open) -> None:
    asked: list[float] = []
    nothing = {"QueueUrl": "http://127.0.0.1/queue", "QueueUrls": [], "Attributes": {}}

    def heard(head: bytes) -> None:
        if b"ReceiveMessage" in head:
            asked.append(time.monotonic())

    async with peer(_answers(200, nothing, heard)) as where:
        subscription = await queues(_at(where), wait_ms=0, declare="no").subscribe(["orders"], "billing", window=10)
        await until(lambda: len(asked) > 5)
        assert await subscription.fetch(1, 0) == []
        await subscription.close()
    assert asked[5] - asked[0] >= 5 * 0.2 * 0.9


# ---------------------------------------------------------------- consumers that are killed, or ask for time

WORKER = """
import asyncio, sys
from outbox.transports import open_transport

async def main(url, topic):
    subscription = await open_transport(url).subscribe([topic], "billing", window=100)
    held = []
    while len(held) < 30:
        held += await subscription.fetch(30, 20.0)
    print("held", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


@STANDARD_OR_FIFO
async def test_what_a_killed_consumer_had_comes_to_another_one_and_not_before(
    queues: Open, elasticmq: Server, topic_name: str, fifo: str
) -> None:
    url = with_parameters(elasticmq.url, fifo=fifo, refresh_ms=300, visibility_timeout_ms=2000, wait_ms=1000)
    other = await queues(elasticmq, fifo=fifo).subscribe([topic_name], "billing", window=100)
    await other.close()
    transport = queues(elasticmq, fifo=fifo)
    sent = numbered(topic_name, 30, keys=30)
    await Sending(transport, sent).run()
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, url, topic_name, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert worker.stdout is not None
        assert await asyncio.wait_for(worker.stdout.readline(), 30) == b"held\n"
        other = await transport.subscribe([topic_name], "billing", window=100)
        alive = time.monotonic() + 3  # longer than it stays invisible by itself
        while time.monotonic() < alive:
            assert await other.fetch(30, 1.0) == []
    finally:
        worker.kill()
        await worker.wait()
    found = await read(other, lambda found: len(found) >= 30, within=20)
    assert sorted(ids(found)) == sorted(m.id for m in sent)
    assert all(delivery.suspect for delivery in found)


@pytest.mark.parametrize("server", ["sqs", "elasticmq"])
@STANDARD_OR_FIFO
async def test_a_retry_comes_long_before_the_visibility_timeout_and_not_at_once(
    queues: Open, request: pytest.FixtureRequest, server: str, topic_name: str, fifo: str
) -> None:
    transport = queues(request.getfixturevalue(server), fifo=fifo, visibility_timeout_ms=600_000)
    subscription = await transport.subscribe([topic_name], "billing", window=10)
    await Sending(transport, [message(topic_name, "k", b"again")]).run()
    (held,) = await subscription.fetch(10, 20)
    begun = time.monotonic()
    await subscription.retry(held, 2.0)
    (again,) = await subscription.fetch(10, 20)
    assert time.monotonic() - begun > 1
    assert again.payload == b"again"
    assert again.suspect
    await subscription.ack([again])
    await subscription.close()
