"""Topics that do not exist, on a broker that makes them for whoever asks carelessly."""

from __future__ import annotations

import asyncio
import time

import pytest

from outbox.errors import Unavailable
from outbox.testing.conformance import message
from tests.transports.conftest import Open


async def test_asking_for_a_topic_does_not_make_it(opened: Open, kafka_url: str, name: str) -> None:
    transport = opened(kafka_url)
    for _ in range(3):
        (outcome,) = await transport.publish([message(name)])
        assert outcome.kind == "unavailable"
        assert outcome.scope == "topic"
        assert "create it, or add auto_create=true" in outcome.reason
    with pytest.raises(Unavailable, match="does not exist"):
        await transport.subscribe([name], "g", window=10)
    assert await opened(kafka_url).check([name]) != []


async def test_auto_create_makes_it(opened: Open, kafka_url: str, name: str) -> None:
    transport = opened(kafka_url, auto_create="true")
    deadline = time.monotonic() + 20
    while (await transport.publish([message(name)]))[0].kind != "sent":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    assert await opened(kafka_url).check([name]) == []
