"""What an ``amqp://`` or ``amqps://`` URL says."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from typing import Final

from outbox.errors import ConfigurationError
from outbox.transports._url import Url, a_count, one_of, require_known, yes_or_no

PARAMETERS: Final = (
    "auth",
    "auto_create",
    "binding",
    "client_id",
    "declare",
    "delivery_timeout_ms",
    "exchange",
    "exchange_type",
    "heartbeat",
    "max_message_bytes",
    "partitions",
    "password",
    "queue",
    "queue_type",
    "routing_key",
    "single_active_consumer",
    "ssl_cafile",
    "ssl_certfile",
    "ssl_check_hostname",
    "ssl_keyfile",
    "ssl_password",
    "username",
)

DEFAULT_MAX_MESSAGE: Final = 16_777_216
"""Bytes of a payload: the broker's default ``max_message_size`` since RabbitMQ 4.0 (before: 134,217,728)."""

_PLACEHOLDER: Final = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to talk to a broker, and what topics and groups are called there. Durations in seconds, sizes in bytes."""

    servers: tuple[tuple[str, int], ...]
    vhost: str = "/"
    username: str = "guest"
    password: str = field(default="guest", repr=False)
    external: bool = False
    """The user is whoever the client's certificate names, not a name and a password."""
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False)
    client_id: str = "pyoutbox"
    delivery_timeout: float = 10.0
    """How long a publish may take until its messages count as not sent, whatever the cause."""
    heartbeat: int = 30
    max_message_bytes: int = DEFAULT_MAX_MESSAGE
    auto_create: bool = True
    """Whether a topic's exchange is made when it is first used."""
    declare: bool = True
    """Whether exchanges and queues that are missing are made at all; else they are only looked for."""
    exchange: str = "{topic}"
    exchange_type: str = "topic"
    routing_key: str = "{type}"
    queue: str = "{topic}.{group}"
    queue_type: str = "quorum"
    binding: str = "#"
    partitions: int = 1
    """Queues of a group and topic; with several, messages go to one of them by their key."""
    single_active_consumer: bool = True

    @property
    def request_timeout(self) -> float:
        return self.delivery_timeout / 2

    def exchange_of(self, topic: str) -> str:
        return self.exchange.replace("{topic}", topic)

    def queue_of(self, topic: str, group: str) -> str:
        return _PLACEHOLDER.sub(lambda match: {"topic": topic, "group": group}[match[1]], self.queue)

    def routing_key_of(self, topic: str, key: str | None, type: str | None) -> str:
        """``{type}`` of a message without one is its topic."""
        if self.routing_key == "{type}":
            return topic if type is None else type
        values = {"topic": topic, "key": key or "", "type": type or topic}
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.routing_key)


def settings(url: Url) -> Settings:
    """Raises `ConfigurationError` for whatever does not fit together."""
    require_known(url, PARAMETERS)
    tls = url.scheme == "amqps"
    servers = tuple(_server(host, 5671 if tls else 5672) for host in url.hosts.split(",") if host)
    if not servers:
        raise ConfigurationError(
            f"{url.scheme}: the URL names no broker; write {url.scheme}://user:password@host/vhost"
        )
    external = url.parameter("auth", "plain", one_of("plain", "external")) == "external"
    username = url.username if url.username is not None else url.parameters.get("username")
    password = url.password if url.password is not None else url.parameters.get("password")
    if external and (username is not None or password is not None or not tls):
        raise ConfigurationError(
            f"{url.scheme}: auth=external takes the user from the client's certificate: it needs amqps:// and ssl_certfile, "
            "and no user name or password"
        )
    if (username is None) != (password is None):
        raise ConfigurationError(f"{url.scheme}: a user name and a password go together; the URL has only one of them")
    if not tls and any(name.startswith("ssl_") for name in url.parameters):
        raise ConfigurationError("amqp: the ssl_… parameters are for amqps://")
    return Settings(
        servers,
        vhost=url.path[1:] or "/",
        username=username if username is not None else "guest",
        password=password if password is not None else "guest",
        external=external,
        ssl_context=_ssl_context(url) if tls else None,
        client_id=url.parameters.get("client_id", "pyoutbox"),
        delivery_timeout=url.parameter("delivery_timeout_ms", 10_000, a_count(100, 3_600_000)) / 1000,
        heartbeat=url.parameter("heartbeat", 30, a_count(1, 65_535)),
        max_message_bytes=url.parameter("max_message_bytes", DEFAULT_MAX_MESSAGE, a_count(1000, 536_870_912)),
        auto_create=url.parameter("auto_create", True, yes_or_no),
        declare=url.parameter("declare", True, yes_or_no),
        exchange=url.parameter("exchange", "{topic}", _template("topic")),
        exchange_type=url.parameters.get("exchange_type", "topic"),
        routing_key=url.parameter("routing_key", "{type}", _template("topic", "key", "type")),
        queue=url.parameter("queue", "{topic}.{group}", _template("topic", "group")),
        queue_type=url.parameter("queue_type", "quorum", one_of("quorum", "classic")),
        binding=url.parameters.get("binding", "#"),
        partitions=url.parameter("partitions", 1, a_count(1, 256)),
        single_active_consumer=url.parameter("single_active_consumer", True, yes_or_no),
    )


class _template:
    """A reader of text with some placeholders, for `Url.parameter`."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __call__(self, text: str) -> str:
        strange = [name for name in _PLACEHOLDER.findall(text) if name not in self._names]
        rest = _PLACEHOLDER.sub("", text)
        if strange or "{" in rest or "}" in rest or not text:
            raise ValueError(
                "may hold " + ", ".join("{" + name + "}" for name in self._names) + ", and must not be empty"
            )
        return text


def _server(host: str, port: int) -> tuple[str, int]:
    name, colon, number = host.rpartition(":")
    if colon and number.isdecimal():
        return name.strip("[]"), int(number)
    return host.strip("[]"), port


def _ssl_context(url: Url) -> ssl.SSLContext:
    certfile, keyfile = url.parameters.get("ssl_certfile"), url.parameters.get("ssl_keyfile")
    if keyfile is not None and certfile is None:
        raise ConfigurationError("amqps: ssl_keyfile is of no use without ssl_certfile")
    try:
        context = ssl.create_default_context(cafile=url.parameters.get("ssl_cafile"))
        if certfile is not None:
            context.load_cert_chain(certfile, keyfile, url.parameters.get("ssl_password", ""))
    except (OSError, ssl.SSLError) as error:
        names = ", ".join(f"{name}={url.parameters[name]}" for name in sorted(url.parameters) if name.endswith("file"))
        raise ConfigurationError(f"amqps: cannot be used: {names} ({error})") from error
    if not url.parameter("ssl_check_hostname", True, yes_or_no):
        context.check_hostname = False
    return context
