"""What SQS has and others have not, on servers that speak it: limits, groups, visibility, dead letters, entries that fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
from botocore import exceptions

from outbox._outgoing import Outgoing
from outbox.errors import ConfigurationError, Unavailable
from outbox.testing.conformance import ids, message, numbered
from outbox.transport import Delivery
from outbox.transports import open_transport
from outbox.transports._sqs_client import Client
from outbox.transports._sqs_publish import Publisher
from outbox.transports._sqs_queues import Queue, Queues
from outbox.transports._sqs_settings import Settings
from tests.services import Server
from tests.transports.relaying import Sending, first_deliveries, in_order
from tests.transports.sqs_tools import Open, read_all

# ---------------------------------------------------------------- what fits


@pytest.mark.parametrize("server", ["sqs", "elasticmq"])
async def test_more_headers_than_attributes_come_out(
    queues: Open, request: pytest.FixtureRequest, server: str, topic_name: str
) -> None:
    transport = queues(request.getfixturevalue(server))
    subscription = await transport.subscribe([topic_name], "billing", window=10)
    headers = {f"header-{number}": f"value {number}" for number in range(25)}
    (outcome,) = await transport.publish([message(topic_name, "k", b"\x00", headers=headers)])
    assert outcome.kind == "sent", outcome
    (found,) = await read_all(subscription, 1)
    assert headers.items() <= {name: value.decode() for name, value in found.headers}.items()
    assert found.payload == b"\x00"


async def test_large_messages_share_requests_as_far_as_their_bytes_go(
    queues: Open, elasticmq: Server, topic_name: str
) -> None:
    """Its limit is that of old, for a message and for a request: 262,144 bytes. It does not say so when asked."""
    transport = queues(elasticmq)
    subscription = await transport.subscribe([topic_name], "billing", window=100)
    large = [message(topic_name, f"k{number}", b"x" * 100_000) for number in range(12)]
    too_large = message(topic_name, "k", b"x" * 263_000)
    outcomes = await transport.publish([*large, too_large])
    assert [outcome.kind for outcome in outcomes] == ["sent"] * 12 + ["reject"]
    assert "MessageTooLong" in outcomes[-1].reason
    (outcome,) = await transport.publish([too_large])
    assert "bytes with its headers, and 262144 are possible" in outcome.reason
    assert sorted(ids(await read_all(subscription, 12))) == sorted(m.id for m in large)


# ---------------------------------------------------------------- FIFO


@pytest.mark.parametrize("server", ["sqs", "elasticmq"])
async def test_what_is_sent_twice_is_there_once_and_a_replay_again(
    queues: Open, request: pytest.FixtureRequest, server: str, topic_name: str
) -> None:
    transport = queues(request.getfixturevalue(server), fifo="yes")
    subscription = await transport.subscribe([topic_name], "billing", window=10)
    once = message(topic_name, "k", b"once")
    for _ in range(3):
        assert [o.kind for o in await transport.publish([once])] == ["sent"]
    replayed = Outgoing(
        0, once.id, once.topic, once.key, once.type, b"again", None, '{"outbox-cycle": "1"}', once.bucket
    )
    assert [o.kind for o in await transport.publish([replayed])] == ["sent"]
    assert [d.payload for d in await read_all(subscription)] == [b"once", b"again"]


@pytest.mark.parametrize("server", ["sqs", "elasticmq"])
async def test_a_key_is_in_order_though_two_members_read(
    queues: Open, request: pytest.FixtureRequest, server: str, topic_name: str
) -> None:
    found: list[Delivery] = []
    first, second = (queues(request.getfixturevalue(server), fifo="yes") for _ in range(2))
    members = [await one.subscribe([topic_name], "billing", window=50) for one in (first, second)]
    outcomes = await first.publish(numbered(topic_name, 200))
    assert {outcome.kind for outcome in outcomes} == {"sent"}

    async def work(member: Any) -> None:
        while len(found) < 200:
            batch = await member.fetch(7, 1.0)
            found.extend(batch)
            await member.ack(batch)

    await asyncio.wait_for(asyncio.gather(*map(work, members)), 30)
    assert first_deliveries(found) == in_order(200)
    assert len(found) == 200


# ---------------------------------------------------------------- who gets what


async def test_without_a_group_nothing_is_sent_and_each_group_gets_all(
    queues: Open, elasticmq: Server, topic_name: str
) -> None:
    transport, other = queues(elasticmq), queues(elasticmq)
    (outcome,) = await transport.publish([message(topic_name, "k")])
    assert (outcome.kind, outcome.scope) == ("unavailable", "topic")
    assert f"no queue ({topic_name}__GROUP): no group has subscribed to it yet" in outcome.reason
    (said,) = await transport.check([topic_name])
    assert "no group has subscribed to it yet" in said
    members = [await other.subscribe([topic_name], group, window=100) for group in ("billing", "mail")]
    sent = numbered(topic_name, 40)
    assert {o.kind for o in await transport.publish(sent)} == {"sent"}
    for member in members:
        assert sorted(ids(await read_all(member, 40))) == sorted(m.id for m in sent)
    assert await transport.check([topic_name]) == []


async def test_a_new_group_gets_all_that_is_sent_from_then_on_also_by_those_that_knew_the_others(
    queues: Open, elasticmq: Server, topic_name: str
) -> None:
    """Its first subscription returns when no publisher can be without it."""
    transport, other = queues(elasticmq, refresh_ms=1000), queues(elasticmq, refresh_ms=1000)
    await other.subscribe([topic_name], "billing", window=10)
    await transport.publish([message(topic_name, "k")])  # knows the queues from here on
    newcomer = await other.subscribe([topic_name], "mail", window=10)
    await transport.publish([message(topic_name, "k", b"for both")])
    assert [d.payload for d in await read_all(newcomer, 1)] == [b"for both"]


async def test_a_topic_whose_name_begins_another_ones_gets_only_its_own(
    queues: Open, elasticmq: Server, topic_name: str
) -> None:
    transport = queues(elasticmq)
    longer = await transport.subscribe([f"{topic_name}-eu"], "billing", window=10)
    shorter = await transport.subscribe([topic_name], "billing", window=10)
    await transport.publish([message(topic_name, "k", b"short"), message(f"{topic_name}-eu", "k", b"long")])
    assert [d.payload for d in await read_all(shorter)] == [b"short"]
    assert [d.payload for d in await read_all(longer)] == [b"long"]


async def test_one_queue_a_topic_is_made_beforehand_and_shared(
    queues: Open, elasticmq: Server, topic_name: str
) -> None:
    transport = queues(elasticmq, queue="{topic}")
    (outcome,) = await transport.publish([message(topic_name, "k")])
    assert (outcome.kind, outcome.scope) == ("unavailable", "topic")
    await transport.declare([topic_name])
    assert [o.kind for o in await transport.publish([message(topic_name, "k", b"kept")])] == ["sent"]
    assert transport.capabilities.history
    assert [d.payload for d in await read_all(await transport.subscribe([topic_name], "any", window=5))] == [b"kept"]


async def test_groups_that_are_named_are_not_looked_for(queues: Open, elasticmq: Server, topic_name: str) -> None:
    transport = queues(elasticmq, groups="billing,mail")
    billing = await transport.subscribe([topic_name], "billing", window=10)
    search = await transport.subscribe([topic_name], "search", window=10)
    await transport.publish([message(topic_name, "k", b"x")])
    assert len(await read_all(billing)) == 1
    assert await read_all(search) == []


async def test_without_declare_missing_queues_are_told(queues: Open, elasticmq: Server, topic_name: str) -> None:
    transport = queues(elasticmq, declare="no")
    with pytest.raises(Unavailable, match=f"there is no queue '{topic_name}__billing'; make it, or leave out declare"):
        await transport.subscribe([topic_name], "billing", window=10)


# ---------------------------------------------------------------- while it is ours


async def test_what_a_handler_works_on_for_long_is_not_handed_out_again(
    queues: Open, elasticmq: Server, topic_name: str
) -> None:
    """Twice as long as it would be invisible without."""
    transport = queues(elasticmq)
    subscription = await transport.subscribe([topic_name], "billing", window=100)
    await transport.publish(numbered(topic_name, 30, keys=30))
    held = [d for _ in range(10) for d in await subscription.fetch(30, 0.3)]
    assert len(held) == 30
    other = await queues(elasticmq).subscribe([topic_name], "billing", window=100)
    begun = time.monotonic()
    while time.monotonic() - begun < 4.5:
        assert await other.fetch(30, 1.0) == []
    await subscription.ack(held)
    await subscription.close()
    assert await other.fetch(30, 3.0) == []


async def test_what_waits_behind_a_slow_handler_is_bounded_by_the_window(
    queues: Open, elasticmq: Server, topic_name: str
) -> None:
    transport = queues(elasticmq)
    subscription = await transport.subscribe([topic_name], "billing", window=25)
    await transport.publish(numbered(topic_name, 200, keys=200))
    assert await subscription.fetch(1, 5.0)
    await asyncio.sleep(2.0)
    (feed,) = subscription._feeds  # type: ignore[attr-defined]
    assert feed.held <= 25
    other = await queues(elasticmq).subscribe([topic_name], "billing", window=500)
    assert len(await read_all(other)) >= 175


async def test_what_a_poll_brings_while_it_is_closed_is_another_member_s_at_once(
    queues: Open, elasticmq: Server, topic_name: str
) -> None:
    """An answer that nobody waits for would hide its messages for as long as if somebody worked on them."""
    transport = queues(elasticmq, wait_ms=10_000, visibility_timeout_ms=600_000)
    leaving = await transport.subscribe([topic_name], "billing", window=10)
    assert await leaving.fetch(1, 0.5) == []
    closing = asyncio.create_task(leaving.close())
    await asyncio.wait([closing], timeout=2.5)
    assert not closing.done()
    await Sending(queues(elasticmq), [message(topic_name, "k")]).run()
    await closing
    (found,) = await read_all(await transport.subscribe([topic_name], "billing", window=10), 1)
    assert found.payload is not None


async def test_a_rejected_message_is_among_the_dead_letters_with_all_it_had(
    queues: Open, elasticmq: Server, topic_name: str
) -> None:
    for fifo in ("no", "yes"):
        transport = queues(elasticmq, fifo=fifo)
        subscription = await transport.subscribe([topic_name], "billing", window=10)
        sent = message(topic_name, "k", b"\xff", type="order.placed", headers={"a": "b"})
        await transport.publish([sent])
        (delivery,) = await subscription.fetch(10, 10.0)
        await subscription.reject(delivery)
        # not a group's queue: nothing is sent to it
        assert [o.kind for o in await transport.publish([message(topic_name, "k", b"next")])] == ["sent"]
        dead = queues(elasticmq, fifo=fifo, queue="{topic}", dead_letters="{queue}-x")
        found = await read_all(await dead.subscribe([f"{topic_name}__billing-dlq"], "any", window=10))
        assert [(d.payload, d.key, dict(d.headers)["a"]) for d in found] == [(b"\xff", b"k", b"b")]
        assert [d.payload for d in await read_all(subscription)] == [b"next"]


# ---------------------------------------------------------------- entries that fail


class _Answers(Client):
    """A service that says of messages what a test wants: what no server can be brought to say at will."""

    def __init__(self, failing: dict[str, dict[str, Any] | Exception]) -> None:
        super().__init__(Settings("us-east-1"))
        self.failing = failing
        self.taken: list[str] = []

    async def get(self) -> Any:
        return self

    async def send_message_batch(self, QueueUrl: str, Entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        answer: dict[str, Any] = {"Successful": [], "Failed": []}
        for entry in Entries:
            said = self.failing.get(entry["MessageBody"])
            if isinstance(said, Exception):
                raise said
            if said is None:
                self.taken.append(entry["MessageBody"])
                answer["Successful"].append({"Id": entry["Id"]})
            else:
                answer["Failed"].append({"Id": entry["Id"], **said})
        return answer


class _OneQueue(Queues):
    async def of_topic(self, topic: str) -> list[Queue]:
        return [Queue("q", "http://q", 262_144)]


async def publish(
    failing: dict[str, Any], messages: Sequence[Outgoing], *, fifo: bool = False
) -> tuple[list[str], list[str]]:
    """What was said of each, with its scope; and what was stored."""
    settings = Settings("us-east-1", fifo=fifo)
    client = _Answers(failing)
    outcomes = await Publisher(settings, client, _OneQueue(settings, client)).publish(messages)
    return [f"{o.kind}/{o.scope}" if o.kind == "unavailable" else o.kind for o in outcomes], client.taken


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"SenderFault": True, "Code": "InvalidMessageContents"}, "reject"),
        ({"SenderFault": True, "Code": "AWS.SimpleQueueService.InvalidParameterValue"}, "reject"),
        ({"SenderFault": True, "Code": "Whatever"}, "retry"),
        ({"SenderFault": False, "Code": "InternalError"}, "unavailable/topic"),
        ({"SenderFault": True, "Code": "RequestThrottled"}, "unavailable/topic"),
        ({"SenderFault": True, "Code": "KmsThrottled"}, "unavailable/topic"),
    ],
)
async def test_each_message_has_its_own_entry_in_the_answer(said: dict[str, Any], kind: str) -> None:
    kinds, taken = await publish({"3": said}, numbered("orders", 8, keys=8))
    assert kinds == ["sent"] * 3 + [kind] + ["sent"] * 4
    assert taken == [str(number) for number in range(8) if number != 3]


def refused(code: str, status: int = 400) -> exceptions.ClientError:
    return exceptions.ClientError(
        {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "SendMessageBatch"
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (refused("ThrottlingException"), "unavailable/transport"),
        (refused("InternalError", 500), "unavailable/transport"),
        (refused("ExpiredToken", 403), "unavailable/transport"),
        (refused("AccessDenied", 403), "unavailable/topic"),
        (refused("AWS.SimpleQueueService.NonExistentQueue"), "unavailable/topic"),
        (exceptions.EndpointConnectionError(endpoint_url="http://q"), "unavailable/transport"),
        (exceptions.NoCredentialsError(), "unavailable/transport"),
        (TimeoutError(), "unavailable/transport"),
    ],
)
async def test_a_request_that_fails_costs_no_attempt(error: Exception, kind: str) -> None:
    assert (await publish({"0": error}, numbered("orders", 3)))[0] == [kind] * 3


async def test_in_a_fifo_queue_nothing_of_a_key_overtakes_what_was_refused() -> None:
    kinds, taken = await publish(
        {
            "2": {"SenderFault": False, "Code": "InternalError"},
            "4": {"SenderFault": True, "Code": "InvalidMessageContents"},
        },
        numbered("orders", 9, keys=3),
        fifo=True,
    )
    # keys are 0 3 6, 1 4 7 and 2 5 8: 4 is gone for good, so 7 goes on; 2 comes again, so 5 and 8 wait
    assert kinds == ["sent", "sent", "unavailable/topic", "sent", "reject", "retry", "sent", "sent", "retry"]
    assert sorted(taken) == ["0", "1", "3", "6", "7"]


# ---------------------------------------------------------------- wrong settings


async def test_nothing_listens(queues: Open) -> None:
    transport = queues("sqs://key:s3cret@us-east-1/?endpoint_url=http://127.0.0.1:1")
    with pytest.raises(Unavailable) as caught:
        await transport.connect()
    (outcome,) = await transport.publish([message("orders", "k")])
    assert (outcome.kind, outcome.scope) == ("unavailable", "transport")
    for said in (str(caught.value), outcome.reason):
        assert "http://127.0.0.1:1" in said
        assert "s3cret" not in said


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.usefixtures("no_aws")
async def test_no_region_no_profile_no_credentials(elasticmq: Server) -> None:
    where = elasticmq.url.partition("endpoint_url=")[2]
    for url, error, said in (
        ("sqs://", ConfigurationError, "sqs: no region: write sqs://eu-central-1, or set AWS_DEFAULT_REGION"),
        ("sqs://eu-central-1?profile=nobody", ConfigurationError, "nobody"),
        (
            f"sqs://eu-central-1?endpoint_url={where}",
            Unavailable,
            "there are no AWS credentials: set AWS_ACCESS_KEY_ID",
        ),
    ):
        transport = open_transport(url)
        with pytest.raises(error, match=said):
            await transport.connect()
        await transport.close()


async def test_a_delivery_of_another_transport_is_not_taken(queues: Open, elasticmq: Server, topic_name: str) -> None:
    subscription = await queues(elasticmq).subscribe([topic_name], "billing", window=10)
    with pytest.raises(ValueError, match="of another transport"):
        await subscription.ack([Delivery(topic="orders", payload=b"x")])
    with pytest.raises(ConfigurationError, match="a window of at least one"):
        await queues(elasticmq).subscribe([topic_name], "billing", window=0)
