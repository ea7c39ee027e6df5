"""The transport over a log that needs no broker."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from typing import Final, TypedDict

from outbox._outgoing import Outgoing
from outbox.errors import DecodingError, MessageTooLarge, OutboxError, Unavailable
from outbox.transport import SENT, Capabilities, Outcome, Revoked, Subscription
from outbox.transports._group import TopicPartition
from outbox.transports._log import Log, Row, Topic, pack_headers
from outbox.transports._log_subscription import LogSubscription
from outbox.transports._partition import KeyHashes
from outbox.transports._pipeline import EVERYTHING, Pipeline
from outbox.transports._url import Url, a_count, a_number, require_known, yes_or_no
from outbox.wire import headers

DEFAULT_PARTITIONS: Final = 4
DEFAULT_SESSION: Final = 3.0


class Options(TypedDict):
    partitions: int
    session: float
    auto_create: bool
    max_message_bytes: int | None


def options(url: Url, *others: str) -> Options:
    """The URL parameters that every log has. ``others``: further ones that are known."""
    require_known(url, [*Options.__annotations__, *others])
    return {
        "partitions": url.parameter("partitions", DEFAULT_PARTITIONS, a_count(1, 10_000)),
        "session": url.parameter("session", DEFAULT_SESSION, a_number(0.1, 3600)),
        "auto_create": url.parameter("auto_create", True, yes_or_no),
        "max_message_bytes": url.parameter("max_message_bytes", None, a_count(1, 1 << 30)),
    }


class LogTransport:
    """A `Transport` over a `Log`."""

    def __init__(
        self,
        name: str,
        log: Log,
        *,
        partitions: int = DEFAULT_PARTITIONS,
        session: float = DEFAULT_SESSION,
        auto_create: bool = True,
        max_message_bytes: int | None = None,
    ) -> None:
        """``partitions``: of topics that are made here. ``session``: seconds after which a member that was killed loses
        its partitions. ``auto_create``: topics are made when they are first written or read. ``max_message_bytes``: of
        payload, key and headers together."""
        self._name = name
        self._log = log
        self._partitions = partitions
        self._session = session
        self._create = partitions if auto_create else None
        self._limit = max_message_bytes
        self._capabilities = Capabilities(ordered_pipeline=True, partitions=True, max_message_bytes=max_message_bytes)
        self._pipeline = Pipeline()
        self._hashes = KeyHashes()
        # A random start, because each of many short-lived processes would put its one keyless message in partition 0.
        self._turn = itertools.count(uuid.uuid4().int & 0xFFFF)
        self._subscriptions: list[LogSubscription] = []
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def name(self) -> str:
        return self._name

    async def connect(self) -> None:
        await self._log.run(self._log.open)

    async def publish(self, batch: Sequence[Outgoing]) -> list[Outcome]:
        call = self._pipeline.enter()
        failed: set[str] = set()
        try:
            if self._closed:
                raise Unavailable(f"{self._name}: this transport is closed")
            return await self._log.run(self._store, batch, call, failed)
        except OutboxError as error:
            self._fail(failed, EVERYTHING)
            return [Outcome.unavailable(str(error), error)] * len(batch)
        except BaseException:  # cancelled: whether the batch will be stored, nobody knows
            self._fail(failed, EVERYTHING)
            raise
        finally:
            self._pipeline.leave(failed)

    def _fail(self, failed: set[str], topic: str) -> None:
        if topic not in failed:
            failed.add(topic)
            self._pipeline.fail(topic)

    def _store(self, batch: Sequence[Outgoing], call: int, failed: set[str]) -> list[Outcome]:
        """In the log's thread, one call after the other."""
        if self._pipeline.blocked(call, EVERYTHING):
            raise Unavailable(f"{self._name}: an earlier batch was not stored, so this one is held back")
        names = {message.topic for message in batch}
        topics = self._log.topics(sorted(names), self._create)
        for topic in names:
            if topic not in topics or self._pipeline.blocked(call, topic):
                self._fail(failed, topic)
        rows: dict[TopicPartition, list[Row]] = {}
        outcomes = [self._prepare(message, topics, failed, rows) for message in batch]
        if rows:
            self._log.append(rows)
        self._hashes.bound()
        self._log.bell.ring()
        return outcomes

    def _prepare(
        self,
        message: Outgoing,
        topics: Mapping[str, Topic],
        failed: set[str],
        rows: dict[TopicPartition, list[Row]],
    ) -> Outcome:
        topic = message.topic
        if topic in failed:
            return _unavailable(topic, topics)
        try:
            found = headers(message)
        except DecodingError as error:
            return Outcome.reject(str(error), error)
        key = message.key
        row = (None if key is None else key.encode(), message.payload, pack_headers(found))
        if self._limit is not None and (size := _size(row, found)) > self._limit:
            large = MessageTooLarge(f"message {message.id} for {topic!r} has {size} bytes, the limit is {self._limit}")
            return Outcome.reject(str(large), large)
        partition = (next(self._turn) if key is None else self._hashes[key]) % topics[topic].partitions
        rows.setdefault((topic, partition), []).append(row)
        return SENT

    async def subscribe(
        self,
        topics: Sequence[str],
        group: str,
        *,
        window: int,
        member: str | None = None,
        revoked: Revoked | None = None,
    ) -> Subscription:
        subscription = LogSubscription(
            self._log.another(),
            topics,
            group,
            window=window,
            member=member,
            revoked=revoked,
            session=self._session,
            create=self._create,
        )
        await subscription.join()
        self._subscriptions = [known for known in self._subscriptions if not known.closed]
        self._subscriptions.append(subscription)
        return subscription

    async def declare(self, topics: Sequence[str], *, partitions: int | None = None) -> None:
        await self._log.run(self._log.topics, topics, partitions or self._partitions)

    async def check(self, topics: Sequence[str]) -> list[str]:
        try:
            known = await self._log.run(self._log.topics, topics, None)
        except OutboxError as error:
            return [str(error)]
        if self._create is not None:
            return []
        return [f"topic {topic!r} does not exist; declare it first" for topic in topics if topic not in known]

    async def close(self, *, abort: bool = False) -> None:
        self._closed = True
        for subscription in self._subscriptions:
            await (subscription.abandon() if abort else subscription.close())
        await self._log.close(abort=abort)


def _unavailable(topic: str, topics: Mapping[str, Topic]) -> Outcome:
    why = "is held back behind a batch that failed" if topic in topics else "does not exist"
    return Outcome.unavailable(f"topic {topic!r} {why}", scope="topic")


def _size(row: Row, found: list[tuple[str, bytes]]) -> int:
    """Bytes of everything that the message brings along."""
    key, payload, _ = row
    return len(payload or b"") + len(key or b"") + sum(len(name.encode()) + len(value) for name, value in found)
