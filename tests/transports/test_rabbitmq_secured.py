"""TLS, users, rights and limits: what works, and what is said where it does not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from outbox.errors import ConfigurationError, MessageTooLarge, OutboxError, Refused, Unavailable
from outbox.testing.conformance import message, numbered
from tests.services import RABBITMQ
from tests.services.fixtures import or_skip
from tests.transports.rabbitmq_tools import Open, know, read_all
from tests.transports.secured_rabbitmq import LIMIT, Secured, start


@pytest.fixture(scope="module")
def secured(pytestconfig: pytest.Config) -> Iterator[Secured]:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    found: list[Secured] = []

    def obtain() -> object:
        found.append(start())
        return found[0].server

    or_skip(pytestconfig, RABBITMQ, obtain)  # type: ignore[arg-type]
    yield found[0]
    found[0].server.close()


async def test_messages_go_out_and_come_in_through_tls(secured: Secured, rabbits: Open, name: str) -> None:
    transport = rabbits(secured.tls(**secured.files()))
    await transport.connect()
    await know(transport, f"app-{name}", "billing")
    # more than one record of TLS, and more than one read of pika's
    sent = [message(f"app-{name}", f"k{n}", bytes(LIMIT - n)) for n in range(20)]
    assert {o.kind for o in await transport.publish(sent)} == {"sent"}
    found = await read_all(transport, f"app-{name}", "billing")
    assert [len(d.payload or b"") for d in found] == [len(m.payload or b"") for m in sent]


async def test_a_certificate_can_be_the_user(secured: Secured, rabbits: Open, name: str) -> None:
    transport = rabbits(secured.tls(user="", auth="external", **secured.files()))
    await know(transport, f"app-{name}", "billing")
    assert {o.kind for o in await transport.publish(numbered(f"app-{name}", 3))} == {"sent"}
    # as app, not as guest
    with pytest.raises(Unavailable, match="lacks a permission"):
        await transport.declare([f"locked-{name}"])


async def test_a_wrong_password_is_no_unreachable_broker(secured: Secured, rabbits: Open) -> None:
    transport = rabbits(secured.plain(user="app:wr0ng@"))
    with pytest.raises(ConfigurationError, match=r"refuses user 'app': wrong user name or password") as caught:
        await transport.connect()
    assert "wr0ng" not in str(caught.value)
    (outcome,) = await transport.publish([message("app-open", "k")])
    assert (outcome.kind, outcome.scope) == ("unavailable", "transport")
    assert "refuses user 'app'" in outcome.reason
    with pytest.raises(ConfigurationError, match="wrong user name or password"):
        await transport.subscribe(["app-open"], "billing", window=1)
    assert "wrong user name or password" in (await transport.check(["app-open"]))[0]


async def test_a_virtual_host_that_is_not_there_or_not_ours_is_named(secured: Secured, rabbits: Open) -> None:
    with pytest.raises(ConfigurationError, match="has no virtual host 'nowhere'"):
        await rabbits(secured.plain(path="/nowhere")).connect()
    with pytest.raises(ConfigurationError, match="user 'app' may not use virtual host 'closed'"):
        await rabbits(secured.plain(path="/closed")).connect()


@pytest.mark.parametrize(
    ("authority", "client", "host", "expected", "what"),
    [
        ("other.pem", True, "localhost", ConfigurationError, "certificate of localhost:.* is not trusted"),
        ("ca.pem", True, "127.0.0.1", ConfigurationError, "certificate of 127.0.0.1:.* is not trusted"),
        ("ca.pem", False, "localhost", Unavailable, "ssl_certfile"),
    ],
)
async def test_a_certificate_that_does_not_fit_is_named(
    secured: Secured, rabbits: Open, authority: str, client: bool, host: str, expected: type[OutboxError], what: str
) -> None:
    with pytest.raises(expected, match=what):
        await rabbits(secured.tls(host=host, **secured.files(authority, client))).connect()


@pytest.mark.parametrize(("scheme", "what"), [("amqp", "amqps://"), ("amqps", "does not speak TLS")])
async def test_the_wrong_door_gets_a_hint(secured: Secured, rabbits: Open, scheme: str, what: str) -> None:
    with pytest.raises(Unavailable, match=what):
        await rabbits(secured.wrong_door(scheme)).connect()


async def test_a_topic_without_the_right_to_write_is_unavailable_and_stops_no_other(
    secured: Secured, rabbits: Open, name: str
) -> None:
    ours, theirs = f"app-{name}", f"locked-{name}"
    guest, transport = rabbits(secured.plain("guest:guest@")), rabbits(secured.plain())
    await know(guest, theirs, "billing")
    await know(transport, ours, "billing")
    for _ in range(3):
        outcomes = await transport.publish([message(theirs, "k"), *numbered(ours, 5)])
        assert [(o.kind, o.scope) for o in outcomes] == [("unavailable", "topic")] + [("sent", "transport")] * 5
        assert "ACCESS_REFUSED" in outcomes[0].reason
        assert theirs in outcomes[0].reason
    assert len(await read_all(transport, ours, "billing")) == 15


async def test_a_missing_right_to_declare_or_to_read_is_named(secured: Secured, rabbits: Open, name: str) -> None:
    guest, transport = rabbits(secured.plain("guest:guest@")), rabbits(secured.plain())
    with pytest.raises(Unavailable, match=f"locked-{name}.*lacks a permission.*ACCESS_REFUSED"):
        await transport.declare([f"locked-{name}"])
    await know(guest, f"locked-{name}", "billing")
    with pytest.raises(Unavailable, match=rf"lacks a permission.*ACCESS_REFUSED.*locked-{name}\.billing"):
        await transport.subscribe([f"locked-{name}"], "billing", window=1)
    with pytest.raises(Unavailable, match=r"lacks a permission.*ACCESS_REFUSED"):
        await transport.subscribe([f"locked-{name}"], "other", window=1)


async def test_what_others_have_made_needs_no_right_to_make_it(secured: Secured, rabbits: Open, name: str) -> None:
    guest, transport = rabbits(secured.plain("guest:guest@")), rabbits(secured.plain())
    await know(guest, f"shared-{name}", "billing")
    assert {o.kind for o in await transport.publish(numbered(f"shared-{name}", 5))} == {"sent"}
    assert len(await read_all(transport, f"shared-{name}", "billing")) == 5


async def test_a_limit_of_the_brokers_own_is_learnt_from_its_refusal(
    secured: Secured, rabbits: Open, name: str
) -> None:
    topic = f"app-{name}"
    transport = rabbits(secured.plain())
    await know(transport, topic, "billing")
    await transport.publish(numbered(topic, 1))
    batch = [message(topic, "a", bytes(LIMIT)), message(topic, "b", bytes(LIMIT + 1)), message(topic, "c", b"c")]
    outcomes = await transport.publish(batch)
    assert outcomes[1].kind == "reject"
    assert isinstance(outcomes[1].error, MessageTooLarge)
    assert f"{LIMIT + 1} bytes" in outcomes[1].reason
    assert str(LIMIT) in outcomes[1].reason
    assert {outcomes[0].kind, outcomes[2].kind} <= {"sent", "unavailable"}
    # from then on it is refused before it is sent, and ends no channel
    for _ in range(2):
        assert [o.kind for o in await transport.publish(batch)] == ["sent", "reject", "sent"]


async def test_headers_that_do_not_fit_into_a_frame_are_refused_beforehand(
    secured: Secured, rabbits: Open, name: str
) -> None:
    topic = f"app-{name}"
    transport = rabbits(secured.plain())
    await know(transport, topic, "billing")
    good = message(topic, "k", headers={f"h{n}": "x" * 10 for n in range(4000)})
    large = message(topic, "k", headers={f"header-{n}": "x" * 20 for n in range(10_000)})
    long = message(topic, "k", headers={"x" * 256: "x"})
    nameless = message(topic, "k", headers={"": "x"})
    outcomes = await transport.publish([good, large, long, nameless, good])
    assert [o.kind for o in outcomes] == ["sent", "reject", "reject", "reject", "sent"]
    assert isinstance(outcomes[1].error, MessageTooLarge)
    assert isinstance(outcomes[2].error, Refused)
    assert len(await read_all(transport, topic, "billing")) == 2


@pytest.mark.parametrize("topic", ["x" * 256, "ü" * 128])
async def test_a_name_that_no_exchange_can_have_is_refused(secured: Secured, rabbits: Open, topic: str) -> None:
    transport = rabbits(secured.plain())
    (outcome,) = await transport.publish([message(topic, "k")])
    assert outcome.kind == "reject"
    assert "longer than 255 bytes" in outcome.reason
    with pytest.raises(ConfigurationError, match="longer than 255 bytes"):
        await transport.declare([topic])
    with pytest.raises(ConfigurationError, match="longer than 255 bytes"):
        await transport.subscribe([topic], "billing", window=1)


async def test_a_routing_key_that_is_too_long_is_refused(secured: Secured, rabbits: Open, name: str) -> None:
    transport = rabbits(secured.plain())
    await know(transport, f"app-{name}", "billing")
    types = ["x" * 255, "x" * 256]
    outcomes = await transport.publish([message(f"app-{name}", "k", type=type) for type in types])
    assert [o.kind for o in outcomes] == ["sent", "reject"]
