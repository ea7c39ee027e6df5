"""``sqs://region/?…``: Amazon SQS, by aiobotocore. Credentials come from where AWS's own tools find them.

SQS has queues and no topics, and a message is read by one consumer of its queue. So each group has a queue of its own for
each topic (``orders`` and ``billing``: ``orders__billing``), made when it first subscribes: it gets what is sent from then
on. A message goes to every queue of its topic, and is sent when each of them has it. A publisher looks for a topic's queues
every ``refresh_ms``, for which long a group's very first subscription waits. With ``queue={topic}`` a topic is one queue, for
one consumer, or for a queue that is yours already.

Standard queues keep no order. With ``fifo=yes`` the queues are FIFO, the key is the message group, in which order holds, and
the deduplication id is the message's own, so that what is sent twice within five minutes is there once. Of messages that are
under way together one can fail and a later one be stored, so the relay sends the next of a key when the one before is stored.

A consumer keeps what it has invisible to others for as long as its handlers take; when it is killed, that comes again after
``visibility_timeout_ms``. SQS forgets what nobody reads for 14 days.

URL parameters: ``endpoint_url`` (http://host:port, another server than Amazon's), ``profile`` (of the AWS configuration),
``fifo`` (no), ``queue`` ({topic}__{group}), ``dead_letters`` ({queue}-dlq), ``groups`` (a,b: those of every topic, where
queues may not be listed), ``declare`` (yes: missing queues are made), ``max_message_bytes`` (1048576, or what the queue says
if less), ``delivery_timeout_ms`` (10000: after that a publish counts as not sent), ``visibility_timeout_ms`` (30000),
``wait_ms`` (5000, of one request for messages, in whole seconds), ``refresh_ms`` (5000), ``requests`` (16, at the same
time). An access key and its secret may stand before the region: ``sqs://key:secret@eu-central-1``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from outbox._outgoing import Outgoing
from outbox.errors import ConfigurationError, OutboxError
from outbox.transport import Capabilities, Outcome, Revoked, Subscription
from outbox.transports._sqs_client import ERRORS, Client, code_of, refusal
from outbox.transports._sqs_publish import Publisher
from outbox.transports._sqs_queues import Queues
from outbox.transports._sqs_settings import Settings, settings
from outbox.transports._sqs_subscribe import SqsSubscription
from outbox.transports._url import Url, parse


def from_url(url: Url) -> SqsTransport:
    """Raises `ConfigurationError`."""
    return SqsTransport(settings(url))


class SqsTransport:
    """A `Transport`. Belongs to one event loop."""

    def __init__(self, url: str | Settings) -> None:
        self._settings = url if isinstance(url, Settings) else settings(parse(url))
        self._capabilities = Capabilities(
            ordered_pipeline=False,
            keeps_order=self._settings.fifo,
            history=not self._settings.by_group,
            delayed=True,
            native_dead_letters=True,
            keeps_keys=False,
            max_message_bytes=self._settings.max_message_bytes,
        )
        self._client = Client(self._settings)
        self._queues = Queues(self._settings, self._client)
        self._publisher = Publisher(self._settings, self._client, self._queues)
        self._subscriptions: list[SqsSubscription] = []

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def name(self) -> str:
        return "aws_sqs"

    async def connect(self) -> None:
        client = await self._client.get()
        try:
            await client.list_queues(MaxResults=1)
        except ERRORS as error:
            if "AccessDenied" not in code_of(error):  # which is an answer: it may know its queues without
                raise refusal(error, "the service cannot be asked") from error

    async def publish(self, batch: Sequence[Outgoing]) -> list[Outcome]:
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
        """``member`` and ``revoked`` mean nothing here: nobody owns a part of a queue."""
        subscription = SqsSubscription(self._settings, self._client, self._queues, topics, group, window=window)
        if await subscription.join():
            for topic in topics:
                self._queues.forget(topic)
            if self._settings.by_group:
                await asyncio.sleep(self._settings.refresh)  # until every publisher knows the new queue
        subscription.start()
        self._subscriptions = [known for known in self._subscriptions if not known.closed]
        self._subscriptions.append(subscription)
        return subscription

    async def declare(self, topics: Sequence[str], *, partitions: int | None = None) -> None:
        """Make the queues of topics that have one each. Where each group has its own, there is nothing to make yet."""
        if not self._settings.by_group:
            for topic in dict.fromkeys(topics):
                await self._queues.make(topic)

    async def check(self, topics: Sequence[str]) -> list[str]:
        wrong = []
        for topic in dict.fromkeys(topics):
            self._queues.forget(topic)
            try:
                if not await self._queues.of_topic(topic):
                    names = f"{self._settings.prefix_of(topic)}…" if self._settings.by_group else self._settings.queue
                    wrong.append(f"sqs: topic {topic!r} has no queue ({names}): no group has subscribed to it yet")
            except (ConfigurationError, OutboxError) as error:
                wrong.append(str(error))
        return wrong

    async def close(self, *, abort: bool = False) -> None:
        subscriptions, self._subscriptions = self._subscriptions, []
        await self._publisher.close(abort=abort)
        await asyncio.gather(*(one.abandon() if abort else one.close() for one in subscriptions))
        await self._client.close()
