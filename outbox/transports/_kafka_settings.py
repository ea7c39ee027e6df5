"""What a ``kafka://`` URL says."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from aiokafka.abc import AbstractTokenProvider
from aiokafka.helpers import create_ssl_context

from outbox.errors import ConfigurationError
from outbox.transports._url import Url, a_count, one_of, require_known, yes_or_no

PARAMETERS: Final = (
    "acks",
    "auto_create",
    "client_id",
    "compression_type",
    "delivery_timeout_ms",
    "max_message_bytes",
    "password",
    "sasl_mechanism",
    "security_protocol",
    "session_timeout_ms",
    "ssl_cafile",
    "ssl_certfile",
    "ssl_check_hostname",
    "ssl_keyfile",
    "ssl_password",
    "username",
)

DEFAULT_MAX_MESSAGE: Final = 1_048_588
"""Bytes of a record batch: the broker's default ``message.max.bytes``, for topics whose own limit we may not read."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to talk to a cluster. Durations in seconds, sizes in bytes."""

    servers: tuple[str, ...]
    client_id: str = "pyoutbox"
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str = "PLAIN"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False)
    token: AbstractTokenProvider | None = field(default=None, repr=False)
    compression_type: str | None = None
    max_message_bytes: int | None = None
    """Where it is given, the topics are not asked for their limits."""
    delivery_timeout: float = 10.0
    """How long a publish may take until its messages count as not sent, whatever the cause."""
    session_timeout: float = 10.0
    """How long a member of a group may be silent until its partitions go to others."""
    auto_create: bool = False
    """Whether asking for a topic may create it, where the broker is set to do so."""

    @property
    def request_timeout(self) -> float:
        """Half of the delivery's time, so that a broker that does not answer can be given up for another one within it."""
        return self.delivery_timeout / 2

    def connection(self) -> dict[str, Any]:
        """The arguments that every client of aiokafka takes."""
        arguments: dict[str, Any] = {
            "bootstrap_servers": list(self.servers),
            "client_id": self.client_id,
            "request_timeout_ms": int(self.request_timeout * 1000),
            "security_protocol": self.security_protocol,
            "ssl_context": self.ssl_context,
        }
        if self.security_protocol.startswith("SASL_"):
            arguments["sasl_mechanism"] = self.sasl_mechanism
            arguments["sasl_plain_username"] = self.username
            arguments["sasl_plain_password"] = self.password
            arguments["sasl_oauth_token_provider"] = self.token
        return arguments


class _Token(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka has no types
    def __init__(self, token: Callable[[], Awaitable[str]]) -> None:
        self._token = token

    async def token(self) -> str:
        return await self._token()


def settings(url: Url, token: Callable[[], Awaitable[str]] | None = None) -> Settings:
    """Raises `ConfigurationError` for whatever does not fit together."""
    require_known(url, PARAMETERS)
    if url.path.strip("/"):
        raise ConfigurationError(
            "kafka: a URL ends with its hosts and parameters, as in kafka://host:9092?client_id=shop"
        )
    servers = tuple(_server(host) for host in url.hosts.split(",") if host)
    if not servers:
        raise ConfigurationError("kafka: the URL names no broker; write kafka://host:9092,host:9092")
    url.parameter("acks", "all", one_of("all"))
    protocol = url.parameter("security_protocol", "PLAINTEXT", one_of("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"))
    mechanism = url.parameter(
        "sasl_mechanism", "PLAIN", one_of("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")
    )
    username = url.username or url.parameters.get("username")
    password = url.password if url.password is not None else url.parameters.get("password")
    _require_matching(protocol, mechanism, username, password, token)
    return Settings(
        servers,
        client_id=url.parameters.get("client_id", "pyoutbox"),
        security_protocol=protocol,
        sasl_mechanism=mechanism,
        username=username,
        password=password,
        ssl_context=_ssl_context(url) if protocol.endswith("SSL") else None,
        token=None if token is None else _Token(token),
        compression_type=url.parameter("compression_type", None, one_of("gzip", "snappy", "lz4", "zstd")),
        max_message_bytes=url.parameter("max_message_bytes", None, a_count(1000, 1 << 30)),
        delivery_timeout=url.parameter("delivery_timeout_ms", 10_000, a_count(100, 3_600_000)) / 1000,
        session_timeout=url.parameter("session_timeout_ms", 10_000, a_count(100, 3_600_000)) / 1000,
        auto_create=url.parameter("auto_create", False, yes_or_no),
    )


def _server(host: str) -> str:
    return host if host.rpartition(":")[2].isdecimal() else f"{host}:9092"


def _require_matching(
    protocol: str,
    mechanism: str,
    username: str | None,
    password: str | None,
    token: Callable[[], Awaitable[str]] | None,
) -> None:
    sasl = protocol.startswith("SASL_")
    if not sasl and (username or password or token):
        raise ConfigurationError(
            f"kafka: a user name or token is of no use with security_protocol={protocol}; "
            "add security_protocol=SASL_SSL (or SASL_PLAINTEXT)"
        )
    if sasl and mechanism == "OAUTHBEARER" and token is None:
        raise ConfigurationError(
            "kafka: sasl_mechanism=OAUTHBEARER needs a function that fetches tokens: make the transport in code, "
            "KafkaTransport(url, token=…)"
        )
    if sasl and mechanism != "OAUTHBEARER" and (username is None or password is None):
        raise ConfigurationError(f"kafka: {protocol} with {mechanism} needs a user name and a password")


def _ssl_context(url: Url) -> ssl.SSLContext:
    given = url.parameters
    if "ssl_keyfile" in given and "ssl_certfile" not in given:
        raise ConfigurationError("kafka: ssl_keyfile needs ssl_certfile beside it")
    try:
        context = create_ssl_context(
            cafile=given.get("ssl_cafile"),
            certfile=given.get("ssl_certfile"),
            keyfile=given.get("ssl_keyfile"),
            password=given.get("ssl_password"),
        )
    except (OSError, ssl.SSLError) as error:  # a wrong key password is an SSLError that does not show it
        raise ConfigurationError(f"kafka: the ssl_… files cannot be used: {error}") from error
    context.check_hostname = url.parameter("ssl_check_hostname", True, yes_or_no)
    return context  # type: ignore[no-any-return]
