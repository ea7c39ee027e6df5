"""A transport between the consumer and the real one, where tests cut, count and change what passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from outbox._outgoing import Outgoing
from outbox.transport import Capabilities, Delivery, Outcome, Revoked, Subscription, Transport

Change = Callable[[Delivery], Delivery]


class WrappedSubscription:
    def __init__(self, subscription: Subscription, transport: WrappedTransport) -> None:
        self._subscription = subscription
        self._transport = transport

    async def fetch(self, limit: int, timeout: float) -> list[Delivery]:
        self._transport.before("fetch")
        deliveries = await self._subscription.fetch(limit, timeout)
        self._transport.out += len(deliveries)
        self._transport.most_out = max(self._transport.most_out, self._transport.out)
        return [self._transport.change(delivery) for delivery in deliveries]

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        self._transport.before("ack")
        self._transport.acked += deliveries
        self._transport.out -= len(deliveries)
        await self._subscription.ack(deliveries)

    async def close(self) -> None:
        await self._subscription.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subscription, name)


class WrappedTransport:
    """``before`` is called with the name of each step and may raise, or kill; ``change`` replaces deliveries. ``out`` are
    deliveries without an acknowledgement."""

    def __init__(self, transport: Transport, *, change: Change | None = None) -> None:
        self._transport = transport
        self.before: Callable[[str], None] = lambda step: None
        self.change: Change = change or (lambda delivery: delivery)
        self.acked: list[Delivery] = []
        self.out = 0
        self.most_out = 0
        self.revoked: Revoked | None = None
        self.generous = False
        """Hand out whatever is fetched, beyond the window."""

    @property
    def capabilities(self) -> Capabilities:
        return self._transport.capabilities

    @property
    def name(self) -> str:
        return self._transport.name

    async def connect(self) -> None:
        self.before("connect")
        await self._transport.connect()

    async def publish(self, batch: Sequence[Outgoing]) -> list[Outcome]:
        return await self._transport.publish(batch)

    async def subscribe(
        self,
        topics: Sequence[str],
        group: str,
        *,
        window: int,
        member: str | None = None,
        revoked: Revoked | None = None,
    ) -> Subscription:
        self.before("subscribe")
        self.revoked = revoked
        window = 1_000_000 if self.generous else window
        inner = await self._transport.subscribe(topics, group, window=window, member=member, revoked=revoked)
        return WrappedSubscription(inner, self)

    async def declare(self, topics: Sequence[str], *, partitions: int | None = None) -> None:
        await self._transport.declare(topics, partitions=partitions)

    async def check(self, topics: Sequence[str]) -> list[str]:
        return await self._transport.check(topics)

    async def close(self, *, abort: bool = False) -> None:
        await self._transport.close(abort=abort)


def foreign(delivery: Delivery) -> Delivery:
    """As a producer delivers it that knows nothing of our headers."""
    headers = [(name, value) for name, value in delivery.headers if not name.startswith("outbox-")]
    return dataclasses.replace(delivery, headers=headers)


def without_offsets(delivery: Delivery) -> Delivery:
    """The same from a broker that numbers nothing."""
    return dataclasses.replace(foreign(delivery), partition=None, offset=None)
