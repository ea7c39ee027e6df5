"""What aiokafka's clients lack: why a broker cannot be reached, what it knows of a topic, and an end that is an end."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import errors
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import create_conn
from aiokafka.protocol.admin import DescribeConfigsRequest
from aiokafka.protocol.metadata import MetadataRequest

from outbox.errors import ConfigurationError, OutboxError, Refused, Unavailable
from outbox.transports._kafka_settings import DEFAULT_MAX_MESSAGE, Settings

_TOPIC_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")
_TOPIC_RESOURCE: Final = 2
_LINGER_NOT: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class TopicFacts:
    partitions: int
    max_bytes: int
    """Of a record batch, headers and all."""
    certain: bool
    """Whether the broker (or the URL) said so; else it is the usual limit."""


async def diagnose(settings: Settings) -> None:
    """Connect to the first of the servers that answers, and log in. Raises `Unavailable` that names the hosts and why, or
    `ConfigurationError` where the broker refuses us. aiokafka's own error says only that there is no broker."""
    found: list[str] = []
    for server in settings.servers:
        host, _, port = server.rpartition(":")
        arguments = settings.connection()
        del arguments["bootstrap_servers"]
        try:
            conn = await create_conn(host.strip("[]"), int(port), **arguments)
            try:
                await conn.send(MetadataRequest([]))  # a port that wants SASL hangs up only now
            finally:
                closed = conn.close()
        except (errors.SaslAuthenticationFailed, errors.AuthenticationFailedError) as error:
            raise ConfigurationError(
                f"kafka: {server} refuses user {settings.username!r} ({settings.sasl_mechanism}): wrong user name or password"
            ) from error
        except errors.UnsupportedSaslMechanismError as error:
            raise ConfigurationError(
                f"kafka: {server} does not offer sasl_mechanism={settings.sasl_mechanism}"
            ) from error
        except errors.IllegalSaslStateError as error:
            raise ConfigurationError(
                f"kafka: {server} takes no user name: its security_protocol is not {settings.security_protocol}"
            ) from error
        except ssl.SSLCertVerificationError as error:
            raise ConfigurationError(
                f"kafka: the certificate of {server} is not trusted ({error.verify_message}); "
                "give its authority as ssl_cafile"
            ) from error
        except (OSError, TimeoutError, ssl.SSLError, ValueError, errors.KafkaError) as error:
            found.append(f"{server}: {_reason(error, settings)}")
        else:
            if closed is not None:
                await closed
            return
    raise Unavailable(f"kafka: cannot reach a broker ({'; '.join(found)})")


def _reason(error: BaseException, settings: Settings) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, TimeoutError):
        return f"no answer within {settings.request_timeout:g} s"
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused, nothing listens there"
    if isinstance(cause, socket.gaierror):
        return "there is no such host"
    if isinstance(cause, EOFError | ConnectionResetError):
        return f"the broker hangs up at once; is its security_protocol {settings.security_protocol}?"
    return str(cause) or type(cause).__name__


def unavailable(error: BaseException, what: str = "the broker cannot be asked") -> OutboxError:
    """The error of ours for one of aiokafka's."""
    if isinstance(error, OutboxError):
        return error
    detail = str(error) or type(error).__name__
    mapped = Unavailable(f"kafka: {what}: {detail}")
    mapped.__cause__ = error
    return mapped


async def describe(
    client: AIOKafkaClient, topics: Sequence[str], settings: Settings
) -> dict[str, TopicFacts | OutboxError]:
    """What the broker says of each topic: facts; `Unavailable` where it does not exist or we may not see it; `Refused`
    where no topic can have that name. Raises KafkaError while the broker cannot be asked."""
    found: dict[str, TopicFacts | OutboxError] = {}
    for topic in topics:
        if not _TOPIC_NAME.fullmatch(topic) or topic in (".", ".."):
            found[topic] = Refused(
                f"kafka: {topic!r} can be no topic; names have 1 to 249 characters out of a-z, A-Z, 0-9, '.', '_', '-'"
            )
    possible = [topic for topic in topics if topic not in found]
    if not possible:
        return found
    node = client.get_random_node()
    answer = await client.send(node, MetadataRequest(possible, allow_auto_topic_creation=settings.auto_create))
    partitions: dict[str, int] = {}
    for code, topic, _, places in answer.topics:
        error = errors.for_code(code)
        if error is errors.NoError:
            partitions[topic] = len(places)
        elif error is errors.TopicAuthorizationFailedError:
            found[topic] = Unavailable(f"kafka: topic {topic!r} does not exist, or this user may not see it")
        elif error is errors.UnknownTopicOrPartitionError:
            found[topic] = Unavailable(f"kafka: topic {topic!r} does not exist{_remedy(settings)}")
        elif error is errors.InvalidTopicError:
            found[topic] = Refused(f"kafka: the broker says that {topic!r} can be no topic")
        else:
            found[topic] = Unavailable(f"kafka: topic {topic!r}: {error.__name__}")
    limits = await _limits(client, node, list(partitions), settings)
    for topic, count in partitions.items():
        found[topic] = TopicFacts(count, limits.get(topic, DEFAULT_MAX_MESSAGE), topic in limits)
    return found


def _remedy(settings: Settings) -> str:
    if settings.auto_create:
        return (
            " yet; auto_create asked the broker to make it, which it does where its auto.create.topics.enable is true. "
            "Elsewhere create it (kafka-topics.sh --create)"
        )
    return (
        " and is not made by itself: create it, or add auto_create=true to the transport's URL where the broker allows that "
        "(auto.create.topics.enable)"
    )


async def _limits(client: AIOKafkaClient, node: object, topics: list[str], settings: Settings) -> dict[str, int]:
    if settings.max_message_bytes is not None:
        return dict.fromkeys(topics, settings.max_message_bytes)
    limits: dict[str, int] = {}
    if topics:
        resources = [(_TOPIC_RESOURCE, topic, ["max.message.bytes"]) for topic in topics]
        try:
            answer = await client.send(node, DescribeConfigsRequest(resources, False))
        except errors.IncompatibleBrokerVersion:
            return limits
        for code, _, _, topic, entries in answer.resources:
            for entry in entries if code == 0 else ():  # else: we may not read settings, and the default has to do
                if entry[0] == "max.message.bytes" and entry[1]:
                    limits[topic] = int(entry[1])
    return limits


def hang_up(client: AIOKafkaClient) -> None:
    """Drop the client's connections, and what they have not sent yet with them: aiokafka's `close` lets asyncio, and the
    kernel after it, go on sending what is in their buffers."""
    for conn in list(client._conns.values()):
        conn._on_close_cb = None  # it would ask for new metadata
        if conn._writer is not None:
            transport = conn._writer.transport
            sock = transport.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
            transport.abort()
        conn.close()
    client._conns.clear()


def cancel(tasks: Iterable[asyncio.Task[Any] | None]) -> set[asyncio.Task[Any]]:
    """Cancel those that run; returns them, to be waited for by `ended`."""
    running = {task for task in tasks if task is not None and not task.done()}
    for task in running:
        task.cancel()
    return running


async def ended(tasks: set[asyncio.Task[Any]], timeout: float = 5.0) -> None:
    """Wait until cancelled tasks have ended, for ``timeout`` seconds at the most, and take no notice of how."""
    if tasks:
        done, _ = await asyncio.wait(tasks, timeout=timeout)
        for task in done:
            if not task.cancelled():
                task.exception()
