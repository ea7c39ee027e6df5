"""Every transport of ours against the conformance suite."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from outbox.testing.conformance import TransportConformance
from tests.services import Server

LONG = pytest.mark.skipif(
    not os.environ.get("OUTBOX_TEST_LONG"), reason="each server has one kind of queue in every run"
)
SQS = "refresh_ms=300&visibility_timeout_ms=2000&wait_ms=1000&max_message_bytes=20000"


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


class TestSqs(TransportConformance):
    """Where what is sent has to be text, on the strict server."""

    missing_topics = False

    @pytest.fixture
    def transport_url(self, elasticmq: Server) -> str:
        return f"{elasticmq.url}&{SQS}"


class TestSqsElsewhereFifo(TransportConformance):
    missing_topics = False
    holds_keys = True

    @pytest.fixture
    def transport_url(self, sqs: Server) -> str:
        return f"{sqs.url}&{SQS}&fifo=yes"


class TestRabbitmqInPartitions(TransportConformance):
    @pytest.fixture
    def transport_url(self, rabbitmq_url: str) -> str:
        return f"{rabbitmq_url}?auto_create=no&max_message_bytes=20000&partitions=4"


if os.environ.get("OUTBOX_TEST_LONG"):  # else each server has one kind of queue

    class TestSqsFifo(TransportConformance):
        missing_topics = False
        holds_keys = True

        @pytest.fixture
        def transport_url(self, elasticmq: Server) -> str:
            return f"{elasticmq.url}&{SQS}&fifo=yes"

    class TestSqsElsewhere(TransportConformance):
        missing_topics = False

        @pytest.fixture
        def transport_url(self, sqs: Server) -> str:
            return f"{sqs.url}&{SQS}"
