"""Every transport of ours against the conformance suite."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from outbox.testing.conformance import TransportConformance


class TestMemory(TransportConformance):
    takeover = 5.0
    quiet = 0.3

    @pytest.fixture
    def transport_url(self) -> str:
        return f"memory://{uuid.uuid4().hex}?session=1&auto_create=no&max_message_bytes=20000"


class TestLocal(TransportConformance):
    takeover = 5.0
    quiet = 0.4

    @pytest.fixture
    def transport_url(self, tmp_path: Path) -> str:
        return f"local://{tmp_path}/log.db?session=1&auto_create=no&max_message_bytes=20000"


class TestKafka(TransportConformance):
    @pytest.fixture
    def transport_url(self, kafka_url: str) -> str:
        return f"{kafka_url}?session_timeout_ms=6000"  # the least that brokers allow


class TestRabbitmq(TransportConformance):
    shares = False

    @pytest.fixture
    def transport_url(self, rabbitmq_url: str) -> str:
        return f"{rabbitmq_url}?auto_create=no&max_message_bytes=20000"


class TestRabbitmqInPartitions(TransportConformance):
    @pytest.fixture
    def transport_url(self, rabbitmq_url: str) -> str:
        return f"{rabbitmq_url}?auto_create=no&max_message_bytes=20000&partitions=4"
