"""An idempotent producer of aiokafka that can be ended at once. It is used until something goes wrong, then thrown away.

Why so much of aiokafka's inside is touched here (0.14; tests/transports/test_kafka.py fails where that changes):

- After a batch was refused, the sequence numbers of its partition have a hole. The batches behind it are refused
  (`OutOfOrderSequenceNumber`), except where the refused one was this producer's first in that partition: then the broker
  knows no sequence yet and **stores the next batch, which overtakes** (KAFKA-14359). So a refusal ends the producer in the
  very step in which it is read, before anything else can be sent.
- Batches of an idempotent producer never expire, and `stop` waits for them, sends what is queued meanwhile, and does not end
  while the broker is away. So a deadline of ours ends it.
- What the broker says of single records (KIP-467) is dropped, and errors unknown to aiokafka become `UnknownError`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaProducer, errors
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.producer.sender import SendProduceReqHandler
from aiokafka.protocol.produce import ProduceRequest_v8
from aiokafka.structs import TopicPartition

from outbox.errors import Unavailable
from outbox.transports._kafka_client import cancel, ended, hang_up
from outbox.transports._kafka_settings import Settings

T = TypeVar("T")

INVALID_RECORD: Final = 87

MISSING: Final = 2.0
"""Seconds until a topic that the broker does not know any more is taken for deleted; leaders change in less."""


class TopicGone(Unavailable):
    def __init__(self, topic: str) -> None:
        super().__init__(f"kafka: topic {topic!r} does not exist any more")
        self.topic = topic


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the broker said of a batch that it did not take."""

    code: int
    records: dict[int, str]
    """Which of its records are at fault, and why, where the broker says so."""
    text: str


class Producer:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._aio = AIOKafkaProducer(
            **settings.connection(),
            enable_idempotence=True,
            acks="all",
            linger_ms=0,
            compression_type=settings.compression_type,
        )
        self._sender = self._aio._sender
        self._sender._send_produce_req = self._request
        self._requests: set[asyncio.Task[Any]] = set()
        self._ending: set[asyncio.Task[Any]] = set()
        self._unacked: set[asyncio.Future[Any]] = set()
        self.broken: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        """Done, with the reason, once nothing is sent any more."""
        self.calls = 0
        """Publish calls that sent by it and have not returned: the user's count."""
        self.denied: set[str] = set()
        """Topics that we may not write to. Their sequence numbers have holes, so it takes a new producer to try again."""
        self.refusals: dict[tuple[str, int], Refusal] = {}
        self._missing_since: dict[str, float] = {}

    @property
    def client(self) -> Any:
        return self._aio.client

    async def start(self) -> None:
        """Raises KafkaError or TimeoutError; then there is nothing to end."""
        try:
            # aiokafka asks for a producer id until it gets one.
            async with asyncio.timeout(self._settings.delivery_timeout):
                await self.unless_broken(self._aio.start())
        except BaseException as error:
            self.end(error)
            await self.ended()
            raise

    async def unless_broken(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for something that aiokafka might never finish once this has ended. Raises what broke the producer."""
        task = asyncio.get_running_loop().create_task(work)
        try:
            both: set[asyncio.Future[Any]] = {task, self.broken}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if self.broken.done():
                raise self.broken.result()
            return task.result()
        finally:
            await ended(cancel([task]))

    def batch(self, max_bytes: int) -> Any:
        """A builder of a record batch of that size; one record always fits, however large."""
        return BatchBuilder(max_bytes, self._aio._message_accumulator._compression_type)

    async def send(self, builder: Any, topic: str, partition: int) -> asyncio.Future[Any]:
        """Queue a batch behind the others of its partition. Raises KafkaError, or what broke the producer."""
        if self.broken.done():
            raise self.broken.result()
        builder.close()
        future: asyncio.Future[Any] = await self._aio.send_batch(builder, topic, partition=partition)
        self._unacked.add(future)
        future.add_done_callback(self._acked)
        return future

    def _acked(self, future: asyncio.Future[Any]) -> None:
        self._unacked.discard(future)
        if not future.cancelled():
            future.exception()  # seen, also where nobody waits for it any more

    def require(self, topics: Collection[str]) -> None:
        """End when one of these topics, which has batches under way, is gone: aiokafka would try for ever."""
        for topic in topics:
            if self.client.cluster.partitions_for_topic(topic) is not None:
                self._missing_since.pop(topic, None)
            elif time.monotonic() - self._missing_since.setdefault(topic, time.monotonic()) > MISSING:
                self.end(TopicGone(topic))

    async def idle(self) -> None:
        """Wait until all that was sent is acknowledged, or never will be."""
        while self._unacked and not self.broken.done():
            await asyncio.wait({*self._unacked, self.broken}, return_when=asyncio.FIRST_COMPLETED)

    async def _request(self, node: int, batches: dict[TopicPartition, Any]) -> None:
        """In place of `Sender._send_produce_req`."""
        if self.broken.done():
            return
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        try:
            await _Handler(self._sender, batches, self.refusals).do(node)
        finally:
            self._requests.discard(task)
        self._sender._in_flight.remove(node)
        for place, batch in batches.items():
            self._sender._muted_partitions.remove(place)
            if batch.future.done() and not batch.future.cancelled():
                error = batch.future.exception()
                if isinstance(error, errors.TopicAuthorizationFailedError):
                    self._deny(place.topic, error)
                elif error is not None:
                    self.end(error)

    def _deny(self, topic: str, error: BaseException) -> None:
        self.denied.add(topic)
        waiting = self._aio._message_accumulator._batches
        for place in [place for place in waiting if place.topic == topic]:
            for batch in waiting.pop(place):
                _let_through(batch)  # else whoever waits for its place gets this error, for all of its topics
                batch.failure(error)

    def end(self, error: BaseException | None = None) -> None:
        """Send nothing more, from this moment on. What is on the wire may or may not be stored."""
        if not self.broken.done():
            self.broken.set_result(error or Unavailable("kafka: this producer was closed"))
        self._ending |= cancel([self._sender.sender_task, *self._requests, self._aio.client._sync_task])
        hang_up(self._aio.client)
        self._aio._closed = True
        # Whoever waits for a free place in the queue gets one, and learns from `broken` that it is of no use.
        waiting = self._aio._message_accumulator._batches
        for batch in [batch for batches in waiting.values() for batch in batches]:
            _let_through(batch)
        waiting.clear()

    async def ended(self) -> None:
        await ended(self._ending)


def _let_through(batch: Any) -> None:
    if not batch._drain_waiter.done():
        batch._drain_waiter.set_result(None)


class _Handler(SendProduceReqHandler):  # type: ignore[misc]  # aiokafka has no types
    def __init__(self, sender: Any, batches: Any, refusals: dict[tuple[str, int], Refusal]) -> None:
        super().__init__(sender, batches)
        self._refusals = refusals

    def create_request(self) -> Any:
        request = super().create_request()
        # Version 8 tells which records are at fault. aiokafka has it, reads its answers, and does not offer it to brokers.
        request._CLASSES = (*request._CLASSES, ProduceRequest_v8)
        return request

    def handle_response(self, response: Any) -> None:
        for topic, partitions in response.topics:
            for partition, code, *rest in partitions:
                if code:
                    records, text = rest[-2:] if response.API_VERSION >= 8 else ((), "")
                    told = {index: said or text or "" for index, said in records}
                    self._refusals[topic, partition] = Refusal(code, told, text or "")
        super().handle_response(response)
