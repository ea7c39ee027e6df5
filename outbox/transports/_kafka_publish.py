"""Publishing to Kafka: whole record batches, several calls under way, order kept per key whatever fails."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aiokafka import errors
from aiokafka.structs import TopicPartition

from outbox._outgoing import Outgoing
from outbox.errors import DecodingError, MessageTooLarge, OutboxError, Refused, Unavailable
from outbox.transport import SENT, Outcome
from outbox.transports._kafka_client import TopicFacts, describe, diagnose, unavailable
from outbox.transports._kafka_producer import INVALID_RECORD, Producer, TopicGone
from outbox.transports._kafka_settings import Settings
from outbox.transports._partition import KeyHashes
from outbox.transports._pipeline import EVERYTHING, Pipeline
from outbox.wire import headers

FACTS_AGE: Final = 30.0
"""Seconds until a topic's number of partitions and limit are asked for again."""

BATCH_BYTES: Final = 1 << 20
"""A record batch is no larger than this, nor than the topic allows. Large, because aiokafka sends one batch of a partition
at a time."""

KEYLESS_RUN: Final = 20
"""So many messages without a key go to one partition, then to the next: not one record batch for each."""

_OF_THE_RECORDS: Final = (
    errors.UnknownError,
    errors.CorruptRecordException,
    errors.InvalidTimestampError,
    errors.PolicyViolationError,
    errors.UnsupportedForMessageFormatError,
)
"""Refusals that may be the fault of one record in the batch. UnknownError is also what aiokafka makes of INVALID_RECORD."""


@dataclass(slots=True)
class _Batch:
    """One record batch, and where its messages are in the call."""

    topic: str
    partition: int
    builder: Any
    append: Callable[..., Any]
    most: int
    """Records."""
    at: list[int] = field(default_factory=list)
    future: asyncio.Future[Any] | None = None


class _Filling:
    """The record batches of one topic that are being filled, by partition."""

    __slots__ = ("batches", "fact", "large")

    def __init__(self, fact: TopicFacts) -> None:
        self.fact = fact
        self.batches: list[_Batch | None] = [None] * fact.partitions
        # Payload or headers beyond this: only then the size is looked at. Keys and the rest are small.
        self.large = fact.max_bytes // 4


@dataclass(slots=True)
class _Call:
    """One call of `publish`."""

    number: int
    messages: Sequence[Outgoing]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    """What is decided; a message that is not in it and was acknowledged is sent."""
    failed: set[str] = field(default_factory=set)
    batches: list[_Batch] = field(default_factory=list)
    producer: Producer | None = None


class Publisher:
    """One idempotent producer at a time. Belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pipeline = Pipeline()
        # First come, first served (asyncio.Lock is), so that calls hand over in the order in which they were made.
        self._turn = asyncio.Lock()
        self._producer: Producer | None = None
        self._facts: dict[str, tuple[TopicFacts, float]] = {}
        self._capacity: dict[str, int] = {}
        """Bytes of a batch that a topic refused, halved, where its limit is not known."""
        self._most: dict[tuple[str, int], int] = {}
        """Records in a batch, for partitions that refused one for a reason that nobody knows: halved until it is found."""
        self._hashes = KeyHashes()
        self._keyless = 0
        self._closed = False

    async def publish(self, messages: Sequence[Outgoing]) -> list[Outcome]:
        call = _Call(self._pipeline.enter(), messages)
        try:
            async with asyncio.timeout(self._settings.delivery_timeout):
                async with self._turn:
                    await self._hand_over(call)
                await self._acknowledged(call)
        except TimeoutError:
            what = "no answer from a broker" if call.producer is None else "not acknowledged"
            late = Unavailable(f"kafka: {what} within {self._settings.delivery_timeout:g} s")
            if call.producer is not None:
                call.producer.end(late)
            self._conclude(call, late)
        except (errors.KafkaError, OutboxError) as error:
            if call.producer is not None:
                call.producer.end(error)
            self._conclude(call, unavailable(error))
        except BaseException as error:  # cancelled: nobody will hear what becomes of it, so no successor may be sent
            if call.producer is not None:
                call.producer.end(error)
            self._fail(call, EVERYTHING)
            raise
        else:
            broken = call.producer.broken if call.producer is not None else None
            if broken is not None and broken.done():
                self._conclude(call, unavailable(broken.result()))
            else:
                self._conclude(call, None)
        finally:
            if call.producer is not None:
                call.producer.calls -= 1
            self._pipeline.leave(call.failed)
        if not call.outcomes:
            return [SENT] * len(messages)
        return [call.outcomes.get(at, SENT) for at in range(len(messages))]

    def _fail(self, call: _Call, topic: str) -> None:
        if topic not in call.failed:
            call.failed.add(topic)
            self._pipeline.fail(topic)

    # ---- handing over, one call at a time

    async def _hand_over(self, call: _Call) -> None:
        if self._closed:
            raise Unavailable("kafka: this transport is closed")
        held_back = self._producer is not None and self._producer.broken.done() and self._producer.calls > 0
        if held_back or self._pipeline.blocked(call.number, EVERYTHING):
            raise Unavailable("kafka: an earlier batch was not stored, so this one is held back")
        topics = {message.topic for message in call.messages}
        producer = await self._usable(topics)
        facts = await self._facts_of(producer, topics, call)
        # From here on an error ends the producer.
        call.producer = producer
        producer.calls += 1
        self._pack(call, facts, producer)
        # A partition's second batch waits until its first is on the wire, so the first ones of all go first.
        for batch in call.batches:
            batch.future = await producer.send(batch.builder, batch.topic, batch.partition)
        self._hashes.bound()

    async def _usable(self, topics: set[str]) -> Producer:
        producer = self._producer
        if producer is not None and not producer.denied.isdisjoint(topics):
            await producer.idle()
            producer.end()
        if producer is None or producer.broken.done():
            producer = self._producer = Producer(self._settings)
            self._facts.clear()
            try:
                await producer.start()
            except errors.KafkaError as error:
                await diagnose(self._settings)  # says why, where it fails as well
                raise unavailable(error) from error
        return producer

    async def _facts_of(self, producer: Producer, topics: set[str], call: _Call) -> dict[str, TopicFacts]:
        now = time.monotonic()
        asked = [topic for topic in topics if topic not in self._facts or self._facts[topic][1] + FACTS_AGE < now]
        wrong: dict[str, OutboxError] = {}
        if asked:
            answer = await producer.unless_broken(describe(producer.client, sorted(asked), self._settings))
            for topic, found in answer.items():
                if isinstance(found, TopicFacts):
                    self._facts[topic] = found, now
                    await producer.unless_broken(_known(producer.client, topic, found.partitions))
                else:
                    self._facts.pop(topic, None)
                    wrong[topic] = found
        for topic in topics:
            if topic not in wrong and self._pipeline.blocked(call.number, topic):
                wrong[topic] = Unavailable(f"kafka: topic {topic!r} is held back behind a batch that failed")
        for topic, error in wrong.items():
            if isinstance(error, Refused):
                outcome = Outcome.reject(str(error), error)
            else:
                outcome = Outcome.unavailable(str(error), error, scope="topic")
                self._fail(call, topic)
            call.outcomes.update((at, outcome) for at, message in enumerate(call.messages) if message.topic == topic)
        return {topic: self._facts[topic][0] for topic in topics if topic not in wrong}

    def _pack(self, call: _Call, facts: dict[str, TopicFacts], producer: Producer) -> None:
        """Messages into record batches. This loop is most of what publishing costs."""
        now = int(time.time() * 1000)
        hashes = self._hashes
        filling = {topic: _Filling(fact) for topic, fact in facts.items()}
        full: list[_Batch] = []
        for at, message in enumerate(call.messages):
            topic, key, payload, text = message.topic, message.key, message.payload, message.headers
            target = filling.get(topic)
            if target is None:
                continue
            if key is None:
                self._keyless += 1
                partition, key_bytes = self._keyless // KEYLESS_RUN % target.fact.partitions, None
            else:
                partition, key_bytes = hashes[key] % target.fact.partitions, key.encode()
            try:
                found = headers(message)
            except DecodingError as error:
                call.outcomes[at] = Outcome.reject(str(error), error)
                continue
            batch = target.batches[partition]
            large = target.large
            if (payload is not None and len(payload) > large) or (text is not None and len(text) > large):
                fresh = self._new(producer, topic, partition, target.fact)
                fresh.append(timestamp=now, key=key_bytes, value=payload, headers=found)
                size = fresh.builder.size()
                if target.fact.certain and size > target.fact.max_bytes:
                    call.outcomes[at] = _too_large(
                        message, f"has {size} bytes, and the topic allows {target.fact.max_bytes}"
                    )
                    continue
            elif (
                batch is not None
                and len(batch.at) < batch.most
                and batch.append(timestamp=now, key=key_bytes, value=payload, headers=found) is not None
            ):
                batch.at.append(at)
                continue
            else:
                fresh = self._new(producer, topic, partition, target.fact)
                fresh.append(timestamp=now, key=key_bytes, value=payload, headers=found)
            if batch is not None:
                full.append(batch)
            fresh.at.append(at)
            target.batches[partition] = fresh
        open_ones = [batch for target in filling.values() for batch in target.batches if batch is not None]
        call.batches = _firsts_first([*full, *open_ones])

    def _new(self, producer: Producer, topic: str, partition: int, fact: TopicFacts) -> _Batch:
        capacity = min(fact.max_bytes, self._capacity.get(topic, BATCH_BYTES), BATCH_BYTES)
        builder = producer.batch(capacity)
        return _Batch(topic, partition, builder, builder.append, self._most.get((topic, partition), 1 << 30))

    # ---- what became of it

    async def _acknowledged(self, call: _Call) -> None:
        producer = call.producer
        if producer is None:
            return
        pending = {batch.future: batch.topic for batch in call.batches if batch.future is not None}
        while pending and not producer.broken.done():
            done, _ = await asyncio.wait({*pending, producer.broken}, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                producer.require(set(pending.values()))
            for future in done:
                pending.pop(future, None)

    def _conclude(self, call: _Call, error: OutboxError | None) -> None:
        """Decide on every message that was not sent. ``error``: why the producer, or the call, ended."""
        producer = call.producer
        for batch in call.batches:
            future = batch.future
            if future is not None and future.done() and not future.cancelled():
                refused = future.exception()
                if refused is None:
                    self._most.pop((batch.topic, batch.partition), None)
                else:
                    self._refused(call, batch, refused)
            elif isinstance(error, TopicGone) and error.topic == batch.topic:
                self._unsent_topic(call, batch, error)
            else:
                self._unsent(call, batch.at, error or Unavailable("kafka: not acknowledged"))
        if error is not None and (producer is None or not call.batches):
            self._unsent(call, range(len(call.messages)), error)

    def _unsent(self, call: _Call, at: Sequence[int], error: OutboxError) -> None:
        outcome = Outcome.unavailable(str(error), error)
        for one in at:
            if call.outcomes.setdefault(one, outcome) is outcome:
                self._fail(call, EVERYTHING)

    def _unsent_topic(self, call: _Call, batch: _Batch, error: OutboxError) -> None:
        call.outcomes.update(dict.fromkeys(batch.at, Outcome.unavailable(str(error), error, scope="topic")))
        self._fail(call, batch.topic)

    def _refused(self, call: _Call, batch: _Batch, error: BaseException) -> None:
        """Blame the messages that are at fault, if that can be told; the others of the batch are unavailable."""
        assert call.producer is not None
        refusal = call.producer.refusals.get((batch.topic, batch.partition))
        said = (refusal.text if refusal is not None else "") or str(error) or type(error).__name__
        single = len(batch.at) == 1
        if isinstance(error, errors.TopicAuthorizationFailedError | errors.UnknownTopicOrPartitionError):
            self._unsent_topic(call, batch, unavailable(error, f"topic {batch.topic!r} cannot be written to"))
        elif isinstance(error, errors.MessageSizeTooLargeError | errors.RecordListTooLargeError):
            self._facts.pop(batch.topic, None)
            if single:
                call.outcomes[batch.at[0]] = _too_large(call.messages[batch.at[0]], f"is refused by the broker: {said}")
            else:
                self._capacity[batch.topic] = max(1000, batch.builder.size() // 2)
        elif refusal is not None and refusal.records:
            for record, why in refusal.records.items():
                if record < len(batch.at):
                    call.outcomes[batch.at[record]] = self._blame(call, batch.at[record], Outcome.reject, why, error)
        elif single and isinstance(error, _OF_THE_RECORDS):
            # An error of the broker that it does not explain may pass.
            certain = not isinstance(error, errors.UnknownError) or (refusal and refusal.code == INVALID_RECORD)
            kind = Outcome.reject if certain else Outcome.retry
            call.outcomes[batch.at[0]] = self._blame(call, batch.at[0], kind, said, error)
        elif isinstance(error, _OF_THE_RECORDS):
            self._most[batch.topic, batch.partition] = max(1, len(batch.at) // 2)
        self._unsent(call, batch.at, unavailable(error, f"topic {batch.topic!r} refused a batch"))

    @staticmethod
    def _blame(
        call: _Call, at: int, kind: Callable[[str, BaseException], Outcome], why: str, error: BaseException
    ) -> Outcome:
        message = call.messages[at]
        refused = Refused(f"kafka: message {message.id} is refused by topic {message.topic!r}: {why}")
        refused.__cause__ = error
        return kind(str(refused), refused)

    async def close(self, *, abort: bool) -> None:
        self._closed = True
        producer = self._producer
        if producer is None:
            return
        if not abort:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.delivery_timeout):
                    async with self._turn:
                        await producer.idle()
        producer.end()
        await producer.ended()


def _too_large(message: Outgoing, how: str) -> Outcome:
    error = MessageTooLarge(f"kafka: message {message.id} for {message.topic!r} {how}")
    return Outcome.reject(str(error), error)


def _firsts_first(batches: list[_Batch]) -> list[_Batch]:
    """First the first batch of each partition, then the second ones; each partition's in its order."""
    seen: dict[tuple[str, int], int] = {}
    ranked = []
    for batch in batches:
        place = batch.topic, batch.partition
        seen[place] = rank = seen.get(place, 0) + 1
        ranked.append((rank, batch))
    ranked.sort(key=lambda pair: pair[0])
    return [batch for _, batch in ranked]


async def _known(client: Any, topic: str, partitions: int) -> None:
    """Wait until aiokafka knows the topic as well: it waits for ever for a partition that it does not."""
    client.add_topic(topic)
    while any(client.cluster.leader_for_partition(TopicPartition(topic, at)) is None for at in range(partitions)):
        await client.force_metadata_update()
