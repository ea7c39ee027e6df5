"""What amqp:// and amqps:// URLs say, and what is refused."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from outbox.errors import ConfigurationError
from outbox.transports import open_transport
from outbox.transports._rabbitmq_settings import PARAMETERS, Settings, settings
from outbox.transports._url import parse


def read(url: str) -> Settings:
    return settings(parse(url))


def test_a_url_says_all_that_a_connection_needs() -> None:
    found = read("amqp://app:p%40ss@one:5673,two,[::1]:7/shop?heartbeat=5&partitions=4&routing_key=x.{key}")
    assert found.servers == (("one", 5673), ("two", 5672), ("::1", 7))
    assert (found.username, found.password, found.vhost) == ("app", "p@ss", "shop")
    assert (found.heartbeat, found.partitions) == (5, 4)
    assert found.routing_key_of("orders", "k1", None) == "x.k1"


@pytest.mark.parametrize(
    ("url", "vhost"),
    [
        ("amqp://b", "/"),
        ("amqp://b/", "/"),
        ("amqp://b/%2F", "/"),
        ("amqp://b/a", "a"),
        ("amqp://b/a%2Fb?heartbeat=9", "a/b"),
    ],
)
def test_the_path_is_the_virtual_host(url: str, vhost: str) -> None:
    assert read(url).vhost == vhost


def test_the_user_may_be_a_parameter_and_is_guest_without_one() -> None:
    assert (read("amqp://b").username, read("amqp://b").password) == ("guest", "guest")
    found = read("amqp://b?username=app&password=secret")
    assert (found.username, found.password) == ("app", "secret")
    assert "secret" not in repr(found)


def test_tls_has_its_own_port_and_checks_the_host() -> None:
    found = read("amqps://broker")
    assert found.servers == (("broker", 5671),)
    assert found.ssl_context is not None
    assert found.ssl_context.check_hostname
    assert found.ssl_context.verify_mode == ssl.CERT_REQUIRED
    unchecked = read("amqps://broker?ssl_check_hostname=no").ssl_context
    assert unchecked is not None
    assert not unchecked.check_hostname
    assert unchecked.verify_mode == ssl.CERT_REQUIRED


def test_names_follow_the_templates() -> None:
    found = read("amqp://b")
    assert (found.exchange_of("orders"), found.queue_of("orders", "billing")) == ("orders", "orders.billing")
    found = read("amqp://b?exchange=app.{topic}&queue={group}/{topic}&routing_key={topic}.{type}.{key}")
    assert (found.exchange_of("orders"), found.queue_of("orders", "billing")) == ("app.orders", "billing/orders")
    assert found.routing_key_of("orders", "7", "order.placed") == "orders.order.placed.7"
    assert found.queue_of("{group}", "x") == "x/{group}"


def test_a_message_without_a_type_is_routed_by_its_topic() -> None:
    assert read("amqp://b").routing_key_of("orders", "7", None) == "orders"
    assert read("amqp://b").routing_key_of("orders", "7", "order.placed") == "order.placed"


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("amqp://", "names no broker"),
        ("amqp://app@b", "a user name and a password go together"),
        ("amqp://b?password=secret", "a user name and a password go together"),
        ("amqp://b?heartbeat=0", "heartbeat='0': must be a whole number from 1"),
        ("amqp://b?partitions=1000", "partitions='1000'"),
        ("amqp://b?queue_type=stream", "must be one of quorum, classic"),
        ("amqp://b?exchange={group}", r"may hold \{topic\}, and must not be empty"),
        ("amqp://b?exchange={topic", r"may hold \{topic\}"),
        ("amqp://b?queue=", r"may hold \{topic\}, \{group\}"),
        ("amqp://b?routing_key={nope}", r"may hold \{topic\}, \{key\}, \{type\}"),
        ("amqp://b?ssl_cafile=ca.pem", "are for amqps://"),
        ("amqps://b?ssl_cafile=/nowhere/ca.pem", "/nowhere/ca.pem"),
        ("amqps://b?ssl_keyfile=k.pem", "without ssl_certfile"),
        ("amqp://b?auth=external", "needs amqps://"),
        ("amqps://app:secret@b?auth=external", "no user name or password"),
        ("amqp://b?prefetch=3", r"no URL parameter prefetch.*known are auth, auto_create"),
        ("amqp://app:sec/ret@b", "percent-encoded"),
    ],
)
def test_what_does_not_fit_is_named(url: str, what: str) -> None:
    with pytest.raises(ConfigurationError, match=what) as caught:
        open_transport(url)
    assert "secret" not in str(caught.value)
    assert "ret@" not in str(caught.value)


def test_a_file_that_is_no_certificate_is_named_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nonsense")
    with pytest.raises(ConfigurationError, match=r"ca\.pem") as caught:
        read(f"amqps://b?ssl_cafile={tmp_path}/ca.pem&ssl_password=secret")
    assert "secret" not in str(caught.value)


def test_the_documentation_names_every_parameter() -> None:
    import outbox.transports.rabbitmq as module

    assert module.__doc__ is not None
    assert [name for name in PARAMETERS if f"``{name}``" not in module.__doc__] == []
