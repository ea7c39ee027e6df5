"""``kafka://host:9092,host:9092?…``: Apache Kafka, by aiokafka.

Messages of a key go to one partition, chosen as the Java client does. Acknowledged means: by all replicas that are in sync
(acks=all), by an idempotent producer, so that a repeated request is not stored twice. A crash between the broker's word and
the relay's delete sends the message again. Consumers read what is committed only, and commit their offsets themselves.

URL parameters, by Kafka's own names where it has one: ``security_protocol`` (PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL),
``sasl_mechanism`` (PLAIN, SCRAM-SHA-256, SCRAM-SHA-512; OAUTHBEARER in code only), ``username`` and ``password`` (or before
the hosts), ``ssl_cafile``, ``ssl_certfile``, ``ssl_keyfile``, ``ssl_password``, ``ssl_check_hostname``, ``client_id``,
``compression_type`` (gzip, snappy, lz4, zstd), ``delivery_timeout_ms`` (10000: after that a publish counts as not sent),
``session_timeout_ms`` (10000: after that a silent consumer's partitions go to others), ``max_message_bytes`` (of a record
batch; without it the topics are asked), ``auto_create`` (no: asking for a topic does not make it; yes: it does where the
broker's auto.create.topics.enable is on), ``acks`` (only all). A topic that is deleted while it is sent to is made anew by
such a broker all the same, since aiokafka goes on asking for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from aiokafka import errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.client import AIOKafkaClient

from outbox._outgoing import Outgoing
from outbox.errors import ConfigurationError, OutboxError, Unavailable
from outbox.transport import Capabilities, Outcome, Revoked, Subscription
from outbox.transports._kafka_client import TopicFacts, describe, diagnose, unavailable
from outbox.transports._kafka_publish import Publisher
from outbox.transports._kafka_settings import DEFAULT_MAX_MESSAGE, Settings, settings
from outbox.transports._kafka_subscribe import KafkaSubscription
from outbox.transports._url import Url, parse

T = TypeVar("T")


def from_url(url: Url) -> KafkaTransport:
    """Raises `ConfigurationError`."""
    return KafkaTransport(settings(url))


class KafkaTransport:
    """A `Transport`. Belongs to one event loop."""

    def __init__(self, url: str | Settings, *, token: Callable[[], Awaitable[str]] | None = None) -> None:
        """``token``: fetches an OAUTHBEARER token whenever a connection is made."""
        self._settings = url if isinstance(url, Settings) else settings(parse(url), token)
        self._capabilities = Capabilities(
            ordered_pipeline=True,
            partitions=True,
            max_message_bytes=self._settings.max_message_bytes or DEFAULT_MAX_MESSAGE,
        )
        self._publisher: Publisher | None = None
        self._subscriptions: list[KafkaSubscription] = []
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def name(self) -> str:
        return "kafka"

    async def connect(self) -> None:
        try:
            async with asyncio.timeout(self._settings.delivery_timeout):
                await diagnose(self._settings)
                client = AIOKafkaClient(**self._settings.connection())
                try:
                    await client.bootstrap()
                    await _require_advertised(client, self._settings)
                finally:
                    await client.close()
        except (errors.KafkaError, TimeoutError) as error:
            raise unavailable(error, f"no answer from {', '.join(self._settings.servers)}") from error

    async def publish(self, batch: Sequence[Outgoing]) -> list[Outcome]:
        if self._publisher is None:
            if self._closed:
                error = Unavailable("kafka: this transport is closed")
                return [Outcome.unavailable(str(error), error)] * len(batch)
            self._publisher = Publisher(self._settings)
        return await self._publisher.publish(batch)

    async def subscribe(
        self,
        topics: Sequence[str],
        group: str,
        *,
        window: int,
        member: str | None = None,
        revoked: Revoked | None = None,
    ) -> Subscription:
        subscription = KafkaSubscription(self._settings, topics, group, window=window, member=member, revoked=revoked)
        await subscription.join()
        self._subscriptions = [known for known in self._subscriptions if not known.closed]
        self._subscriptions.append(subscription)
        return subscription

    async def declare(self, topics: Sequence[str], *, partitions: int | None = None) -> None:
        """With the broker's default number of replicas, and of partitions where none is given."""
        await self._with_admin(lambda admin: self._declare(admin, topics, partitions))

    async def _declare(self, admin: AIOKafkaAdminClient, topics: Sequence[str], partitions: int | None) -> None:
        wanted = [NewTopic(topic, 1, 1) for topic in dict.fromkeys(topics)]
        for new in wanted:
            # -1 is the broker's default since Kafka 2.4 (KIP-464); NewTopic's own check does not know that.
            new.num_partitions, new.replication_factor = partitions or -1, -1
        answer = await admin.create_topics(wanted)
        for topic, code, text in answer.topic_errors:
            error = errors.for_code(code)
            if error is errors.NoError or error is errors.TopicAlreadyExistsError:
                continue
            why = text or error.__name__
            if issubclass(error, errors.TopicAuthorizationFailedError | errors.ClusterAuthorizationFailedError):
                raise Unavailable(f"kafka: topic {topic!r}: this user may not create topics ({why})")
            raise ConfigurationError(f"kafka: topic {topic!r} cannot be created: {why}")
        missing = list(topics)
        while missing:  # created is not yet known to all, nor led by one
            missing = [topic for topic, found in await self._leaderless(admin, missing) if found]
            if missing:
                await asyncio.sleep(0.05)

    async def _leaderless(self, admin: AIOKafkaAdminClient, topics: Sequence[str]) -> list[tuple[str, bool]]:
        described = await admin.describe_topics(list(topics))
        return [
            (topic["topic"], topic["error_code"] != 0 or any(p["leader"] == -1 for p in topic["partitions"]))
            for topic in described
        ]

    async def check(self, topics: Sequence[str]) -> list[str]:
        try:
            return await self._with_admin(lambda admin: self._check(admin, topics))
        except OutboxError as error:
            return [str(error)]

    async def _check(self, admin: AIOKafkaAdminClient, topics: Sequence[str]) -> list[str]:
        wrong = []
        found = await describe(admin._client, list(dict.fromkeys(topics)), self._settings)
        for topic, fact in found.items():
            if not isinstance(fact, TopicFacts):
                wrong.append(str(fact))
            elif any(leaderless for _, leaderless in await self._leaderless(admin, [topic])):
                wrong.append(f"kafka: topic {topic!r} has a partition without a leader: its brokers are down")
        return wrong

    async def _with_admin(self, work: Callable[[AIOKafkaAdminClient], Awaitable[T]]) -> T:
        admin = AIOKafkaAdminClient(**self._settings.connection())
        try:
            async with asyncio.timeout(self._settings.delivery_timeout):
                await admin.start()
                return await work(admin)
        except (errors.KafkaError, TimeoutError) as error:
            if isinstance(error, errors.KafkaConnectionError):
                await diagnose(self._settings)
            raise unavailable(error) from error
        finally:
            await admin.close()

    async def close(self, *, abort: bool = False) -> None:
        self._closed = True
        if self._publisher is not None:
            await self._publisher.close(abort=abort)
        for subscription in self._subscriptions:
            await (subscription.abandon() if abort else subscription.close())


async def _require_advertised(client: AIOKafkaClient, settings: Settings) -> None:
    """The brokers must be reachable under the addresses that they give, not only under those in the URL."""
    for broker in client.cluster.brokers():
        if await client.ready(broker.nodeId):
            return
    names = ", ".join(f"{broker.host}:{broker.port}" for broker in client.cluster.brokers())
    raise Unavailable(
        f"kafka: {', '.join(settings.servers)} answers, but calls its brokers {names}, and there nobody does: "
        "see advertised.listeners in the broker's configuration"
    )
