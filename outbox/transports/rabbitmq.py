"""``amqp://user:password@host:5672,host:5672/vhost?…`` and ``amqps://…``: RabbitMQ, by pika's asyncio connection.

A topic is an exchange, a group has a queue for each topic (``orders`` → ``orders.billing``), made and bound when it first
subscribes: it gets what is sent from then on. A message that no queue would get is not sent (`unavailable`, of its topic), so
that it waits in the outbox. Quorum queues, persistent messages, mandatory, publisher confirms: acknowledged means stored by a
majority. Of messages that are under way together one can fail and a later one be stored, so the relay sends the next of a key
when the one before is confirmed.

Each queue delivers to one member of its group at a time (single active consumer), and the others stand by: so a key's
messages are handled in order. With ``partitions=N`` a group has N queues, among which a consistent-hash exchange (a plugin of
the broker's) divides the keys, and its members share these.

URL parameters: ``username`` and ``password`` (or before the hosts; without, guest), ``auth`` (plain, external: the client
certificate's name), ``ssl_cafile``, ``ssl_certfile``, ``ssl_keyfile``, ``ssl_password``, ``ssl_check_hostname``,
``client_id``, ``heartbeat`` (30 seconds), ``delivery_timeout_ms`` (10000: after that a publish counts as not sent),
``max_message_bytes`` (16777216, RabbitMQ 4's own limit), ``auto_create`` (yes: a topic's exchange is made when it is first
used), ``declare`` (yes; no: nothing is ever made, exchanges and queues are only looked for),
``exchange`` ({topic}), ``exchange_type`` (topic), ``routing_key`` ({type}; also {topic}, {key}), ``queue``
({topic}.{group}), ``queue_type`` (quorum, classic), ``binding`` (#), ``partitions`` (1), ``single_active_consumer`` (yes; no:
all members get messages side by side, in no order).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from outbox._outgoing import Outgoing
from outbox.errors import OutboxError, Unavailable
from outbox.transport import Capabilities, Outcome, Revoked, Subscription
from outbox.transports._rabbitmq_link import ERRORS, connect
from outbox.transports._rabbitmq_publish import Publisher
from outbox.transports._rabbitmq_settings import Settings, settings
from outbox.transports._rabbitmq_subscribe import RabbitmqSubscription
from outbox.transports._rabbitmq_topology import declare_exchange, exchange_exists, missing, refusal
from outbox.transports._url import Url, parse


def from_url(url: Url) -> RabbitmqTransport:
    """Raises `ConfigurationError`."""
    return RabbitmqTransport(settings(url))


class RabbitmqTransport:
    """A `Transport`. Belongs to one event loop."""

    def __init__(self, url: str | Settings) -> None:
        self._settings = url if isinstance(url, Settings) else settings(parse(url))
        self._capabilities = Capabilities(
            ordered_pipeline=False,
            history=False,
            delayed=True,
            native_dead_letters=True,
            keeps_keys=False,
            max_message_bytes=self._settings.max_message_bytes,
        )
        self._publisher: Publisher | None = None
        self._subscriptions: list[RabbitmqSubscription] = []
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def name(self) -> str:
        return "rabbitmq"

    async def connect(self) -> None:
        link = await connect(self._settings, "looking")
        await link.close()

    async def publish(self, batch: Sequence[Outgoing]) -> list[Outcome]:
        if self._publisher is None:
            if self._closed:
                error = Unavailable("rabbitmq: this transport is closed")
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
        """``member`` changes nothing: a connection that ends gives back at once what it had."""
        subscription = RabbitmqSubscription(self._settings, topics, group, window=window, revoked=revoked)
        await subscription.join()
        self._subscriptions = [known for known in self._subscriptions if not known.closed]
        self._subscriptions.append(subscription)
        return subscription

    async def declare(self, topics: Sequence[str], *, partitions: int | None = None) -> None:
        """Make the exchanges that do not exist. ``partitions`` is a group's own here: the URL's parameter."""
        link = await connect(self._settings, "declaring")
        try:
            for topic in dict.fromkeys(topics):
                await declare_exchange(link, topic)
        finally:
            await link.close()

    async def check(self, topics: Sequence[str]) -> list[str]:
        try:
            link = await connect(self._settings, "looking")
        except OutboxError as error:
            return [str(error)]
        wrong = []
        try:
            for topic in dict.fromkeys(topics):
                if not await exchange_exists(link, self._settings.exchange_of(topic)):
                    wrong.append(str(missing(self._settings, topic)))
        except ERRORS as error:
            wrong.append(str(refusal(error, f"topic {topic!r} cannot be looked at")))
        finally:
            await link.close()
        return wrong

    async def close(self, *, abort: bool = False) -> None:
        self._closed = True
        subscriptions, self._subscriptions = self._subscriptions, []
        if self._publisher is not None:
            await self._publisher.close(abort=abort)
        await asyncio.gather(*(one.abandon() if abort else one.close() for one in subscriptions))
