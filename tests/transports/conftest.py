"""Transports for the tests of this folder."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from outbox.transport import Transport
from outbox.transports import open_transport
from outbox.transports.kafka import KafkaTransport
from outbox.transports.rabbitmq import RabbitmqTransport
from tests.services import Server
from tests.transports.sqs_tools import QUICK, with_parameters

Open = Callable[..., KafkaTransport]


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Opens transports, with parameters; each is cut off after the test, since its broker may not be there."""
    transports: list[KafkaTransport] = []

    def another(url: str, **parameters: object) -> KafkaTransport:
        query = "&".join(f"{name}={value}" for name, value in ({"session_timeout_ms": 6000} | parameters).items())
        transports.append(KafkaTransport(f"{url}?{query}"))
        return transports[-1]

    yield another
    for transport in transports:
        await transport.close(abort=True)


@pytest.fixture
async def queues() -> AsyncIterator[Callable[..., Transport]]:
    """Opens transports of an SQS server, with parameters; each is cut off after the test, since it may not be there."""
    transports: list[Transport] = []

    def another(server: Server | str, **parameters: Any) -> Transport:
        url = server if isinstance(server, str) else server.url
        transports.append(open_transport(with_parameters(url, **{**QUICK, **parameters})))
        return transports[-1]

    yield another
    for transport in transports:
        await transport.close(abort=True)


@pytest.fixture
async def rabbits() -> AsyncIterator[Callable[..., RabbitmqTransport]]:
    """Opens transports, with parameters; each is cut off after the test, since its broker may not be there."""
    transports: list[RabbitmqTransport] = []

    def another(url: str, **parameters: object) -> RabbitmqTransport:
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        transports.append(RabbitmqTransport(f"{url}?{query}" if query else url))
        return transports[-1]

    yield another
    for transport in transports:
        await transport.close(abort=True)


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"
