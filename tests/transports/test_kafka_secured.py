"""TLS, SASL and access rights: what works, and what is said where it does not."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from outbox.errors import ConfigurationError, OutboxError, Unavailable
from outbox.testing.conformance import message, numbered
from outbox.transports.kafka import KafkaTransport
from tests.services import Unavailable as NoService
from tests.transports.secured_kafka import SecuredKafka, start


@pytest.fixture(scope="module")
def secured() -> Iterator[SecuredKafka]:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    try:
        server = start()
    except NoService as reason:
        pytest.skip(f"no kafka on this machine: {reason}")
    asyncio.run(declare(server))
    server.allow("Write", "Read", "Describe", topic="open")
    server.allow("Describe", topic="readable")
    server.allow("Read", group="ours")
    yield server
    server.control.discard()


async def declare(server: SecuredKafka) -> None:
    transport = KafkaTransport(server.url("internal", user=""))
    await transport.declare(["open", "readable", "hidden"], partitions=1)
    await transport.close()


Open = Callable[[str], KafkaTransport]


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    transports: list[KafkaTransport] = []

    def another(url: str) -> KafkaTransport:
        transports.append(KafkaTransport(url))
        return transports[-1]

    yield another
    for transport in transports:
        await transport.close(abort=True)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
@pytest.mark.parametrize("listener", ["sasl", "sasl_ssl"])
async def test_messages_go_out_and_come_in(secured: SecuredKafka, opened: Open, listener: str, mechanism: str) -> None:
    authority = {"ssl_cafile": secured.folder / "ca.pem"} if listener == "sasl_ssl" else {}
    transport = opened(secured.url(listener, sasl_mechanism=mechanism, **authority))
    await transport.connect()
    (outcome,) = await transport.publish([message("open", "k")])
    assert outcome.kind == "sent", outcome
    subscription = await transport.subscribe(["open"], "ours", window=10)
    found = []
    while not found:
        found = await subscription.fetch(10, 5)
    await subscription.close()


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
async def test_a_wrong_password_is_no_unreachable_broker(secured: SecuredKafka, opened: Open, mechanism: str) -> None:
    transport = opened(secured.url("sasl", user="app:wrong@", sasl_mechanism=mechanism))
    with pytest.raises(ConfigurationError, match=r"refuses user 'app'.*wrong user name or password") as caught:
        await transport.connect()
    assert "app:wrong" not in str(caught.value)
    (outcome,) = await transport.publish([message("open", "k")])
    assert (outcome.kind, outcome.scope) == ("unavailable", "transport")
    assert "refuses user 'app'" in outcome.reason


@pytest.mark.parametrize(
    ("listener", "parameters", "expected", "what"),
    [
        ("sasl_ssl", {"ssl_cafile": "other.pem"}, ConfigurationError, "certificate of localhost:.* is not trusted"),
        ("sasl_ssl", {}, ConfigurationError, "give its authority as ssl_cafile"),
        (
            "sasl",
            {"sasl_mechanism": "SCRAM-SHA-256"},
            ConfigurationError,
            "does not offer sasl_mechanism=SCRAM-SHA-256",
        ),
        ("internal", {"security_protocol": "SASL_PLAINTEXT"}, ConfigurationError, "takes no user name"),
        (
            "sasl_ssl",
            {"security_protocol": "SASL_PLAINTEXT"},
            Unavailable,
            "hangs up at once; is its security_protocol",
        ),
    ],
)
async def test_what_does_not_fit_is_named(
    secured: SecuredKafka,
    opened: Open,
    listener: str,
    parameters: dict[str, str],
    expected: type[OutboxError],
    what: str,
) -> None:
    if "ssl_cafile" in parameters:
        parameters = parameters | {"ssl_cafile": str(secured.folder / parameters["ssl_cafile"])}
    with pytest.raises(expected, match=what):
        await opened(secured.url(listener, **parameters)).connect()


async def test_a_port_that_wants_a_user_name_gets_a_hint(secured: SecuredKafka, opened: Open) -> None:
    url = secured.url("sasl", user="", security_protocol="PLAINTEXT")
    with pytest.raises(Unavailable, match="hangs up at once; is its security_protocol PLAINTEXT"):
        await opened(url).connect()


@pytest.mark.parametrize("topic", ["readable", "hidden", "missing"])
async def test_a_topic_without_the_right_to_write_is_unavailable_and_stops_no_other(
    secured: SecuredKafka, opened: Open, topic: str
) -> None:
    transport = opened(secured.url("sasl"))
    for _ in range(3):
        batch = [message(topic, "k"), *numbered("open", 5)]
        for outcomes in await asyncio.gather(*(transport.publish(batch) for _ in range(6))):
            assert [(o.kind, o.scope) for o in outcomes] == [("unavailable", "topic")] + [("sent", "transport")] * 5
            assert topic in outcomes[0].reason


async def test_a_right_that_is_given_later_counts_at_once(secured: SecuredKafka, opened: Open) -> None:
    admin = opened(secured.url("internal", user=""))
    await admin.declare(["granted"], partitions=1)
    await asyncio.to_thread(secured.allow, "Describe", topic="granted")
    transport = opened(secured.url("sasl"))
    (outcome,) = await transport.publish([message("granted", "k")])
    assert outcome.scope == "topic"
    await asyncio.to_thread(secured.allow, "Write", topic="granted")
    kinds = {outcome.kind}
    while "sent" not in kinds:
        kinds = {outcome.kind for outcome in await transport.publish(numbered("granted", 10))}


async def test_groups_and_topics_that_are_not_ours_are_unavailable(secured: SecuredKafka, opened: Open) -> None:
    transport = opened(secured.url("sasl"))
    with pytest.raises(Unavailable, match=r"cannot join group 'theirs'.*Authorization"):
        await transport.subscribe(["open"], "theirs", window=10)
    with pytest.raises(Unavailable, match="'hidden' does not exist, or this user may not see it"):
        await transport.subscribe(["hidden"], "ours", window=10)
    with pytest.raises(Unavailable, match="'mine': this user may not create topics"):
        await transport.declare(["mine"])
    (complaint,) = await transport.check(["open", "hidden"])
    assert "'hidden'" in complaint


async def test_asking_for_a_topic_does_not_make_it(secured: SecuredKafka, opened: Open) -> None:
    transport = opened(secured.url("internal", user=""))
    for _ in range(3):
        (outcome,) = await transport.publish([message("asked")])
        assert (outcome.kind, outcome.scope) == ("unavailable", "topic")
        assert "add auto_create=true" in outcome.reason
    with pytest.raises(Unavailable, match="does not exist"):
        await transport.subscribe(["asked"], "g", window=10)
    assert await opened(secured.url("internal", user="")).check(["asked"]) != []


async def test_auto_create_makes_a_topic(secured: SecuredKafka, opened: Open) -> None:
    transport = opened(secured.url("internal", user="", auto_create="true"))
    deadline = time.monotonic() + 20
    while (await transport.publish([message("wanted")]))[0].kind != "sent":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    assert await opened(secured.url("internal", user="")).check(["wanted"]) == []
