"""The transport contract: what a broker must do for the relay and the consumer, and what it promises.

A transport is one file in ``outbox/transports/`` (or in a package of yours, named by the entry point group
``outbox.transports``), maps its driver's errors at its edge, and passes ``outbox.testing.conformance``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal, Protocol

from outbox._outgoing import Outgoing


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a transport can do, for the relay to choose how to drive it and for people to compare."""

    ordered_pipeline: bool
    """Several ``publish`` calls may be under way; messages of one key are stored in the order of the calls, and once one
    is not sent, none of that key handed over after it is stored in that pipeline (a `reject` excepted)."""
    keeps_order: bool = True
    """Messages of one key, each sent after the one before was `sent`, are delivered in this order."""
    partitions: bool = False
    """Deliveries carry a partition and an offset; acknowledgement is a position, committed contiguously."""
    delayed: bool = False
    """`Subscription.retry` can wait in the broker, without holding up the deliveries behind it."""
    native_dead_letters: bool = False
    """`Subscription.reject` moves the message to a dead-letter queue of the broker's own."""
    history: bool = True
    """A new group starts at the earliest message. Else it gets what is sent after it first subscribed, and a message that
    no group would get is `unavailable`."""
    transactions: bool = False
    """Publishing can be exactly-once for readers that ask for it."""
    keeps_keys: bool = True
    """The broker has a place for the key; else it travels as the header ``outbox-key``."""
    max_message_bytes: int | None = None
    """The largest message, where that is known beforehand."""


OutcomeKind = Literal["sent", "retry", "reject", "unavailable"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one message.

    ``sent``: stored by the broker, by its own word. ``retry``: this message failed and may succeed later. ``reject``: the
    broker will never take it as it is. ``unavailable``: not this message's fault: the broker, or all of its topic, cannot
    be used now, so no attempt is spent. In doubt between retry and unavailable, unavailable.
    """

    kind: OutcomeKind
    reason: str = ""
    error: BaseException | None = field(default=None, compare=False, repr=False)
    partition: int | None = None
    offset: int | None = None
    scope: Literal["transport", "topic"] = "transport"
    """What an ``unavailable`` is about: everything, or this topic alone (authorisation, unknown topic)."""

    @staticmethod
    def retry(reason: str, error: BaseException | None = None) -> Outcome:
        return Outcome("retry", reason, error)

    @staticmethod
    def reject(reason: str, error: BaseException | None = None) -> Outcome:
        return Outcome("reject", reason, error)

    @staticmethod
    def unavailable(
        reason: str, error: BaseException | None = None, scope: Literal["transport", "topic"] = "transport"
    ) -> Outcome:
        return Outcome("unavailable", reason, error, scope=scope)


SENT: Final = Outcome("sent")
"""The outcome of nearly every message, shared so that the hot path makes no object: compare with ``is`` first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One message as the broker hands it out: bytes, nothing decoded, also a foreign producer's."""

    topic: str
    payload: bytes | None = field(repr=False)
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes]] = field(default=(), repr=False)
    partition: int | None = None
    offset: int | None = None
    topic_id: str | None = None
    """The broker's own id of the topic, where it has one: a recreated topic repeats its name and its offsets."""
    timestamp: datetime | None = None
    suspect: bool = False
    """It may have been in flight when a previous owner ended: the first window after an assignment, or what the broker
    flags as redelivered."""
    token: object = field(default=None, repr=False, compare=False)
    """Whatever the transport needs to acknowledge it."""


Revoked = Callable[[frozenset[tuple[str, int]]], Awaitable[None]]
"""Called with the (topic, partition) pairs that are about to be given up, before they are; afterwards their offsets are
committed. Returning late makes the group wait, and at some time goes on without us. Called as well for pairs that were lost
(the member had been silent for too long): what is acked of them then is not committed. Not called by `Subscription.close`."""


class Subscription(Protocol):
    """A member's share of some topics. Not thread-safe; used from one event loop."""

    async def fetch(self, limit: int, timeout: float) -> list[Delivery]:
        """Up to ``limit`` deliveries (rows), waiting at most ``timeout`` seconds for the first. Messages of one key
        come in order. Raises `Unavailable` while the broker cannot be asked: call again. Raises `ConfigurationError` where
        it is known that another process has joined under this member's name: then it never will work again. Returns
        nothing when the subscription is closed meanwhile; after that, raises RuntimeError."""
        ...

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """These are done, in any order. Where acknowledgement is a position, it is committed up to the first delivery
        that is not acked: a crash redelivers some that were done, and never skips one that was not. A delivery whose
        partition has been given up is ignored."""
        ...

    async def retry(self, delivery: Delivery, after: float) -> None:
        """Deliver this again, not before ``after`` seconds. Only with `Capabilities.delayed`; else `NotImplementedError`."""
        ...

    async def reject(self, delivery: Delivery) -> None:
        """Give this to the broker's own dead-letter queue. Only with `Capabilities.native_dead_letters`."""
        ...

    def pause(self, topics_partitions: frozenset[tuple[str, int]]) -> None:
        """Fetch nothing from these until `resume`. Membership is kept."""
        ...

    def resume(self, topics_partitions: frozenset[tuple[str, int]]) -> None: ...

    async def close(self) -> None:
        """Commit what is acked, leave the group at once (a static member excepted), never hang."""
        ...


class Publisher(Protocol):
    """What a relay needs of a broker."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def name(self) -> str:
        """The messaging system, as OpenTelemetry names it: kafka, rabbitmq, aws_sqs, …"""
        ...

    async def connect(self) -> None:
        """Reach the broker. Raises `Unavailable` (try again later) or `ConfigurationError` (never will work)."""
        ...

    async def publish(self, batch: Sequence[Outgoing]) -> list[Outcome]:
        """Send messages (rows) and wait for the broker's word on each; one outcome a message, in order. Never raises for
        a message or for a broker that is away. What can be refused is refused before anything of its key is sent."""
        ...

    async def close(self, *, abort: bool = False) -> None:
        """Let go of the broker, and close the subscriptions. ``abort``: at once, as if the process were killed (nothing is
        committed, no group is left), and nothing that was handed over before is sent afterwards. What is on the wire at
        that moment may still be stored."""
        ...


class Transport(Publisher, Protocol):
    """One broker. Made from a URL or by hand; nothing is connected until the first call that needs it."""

    async def subscribe(
        self,
        topics: Sequence[str],
        group: str,
        *,
        window: int,
        member: str | None = None,
        revoked: Revoked | None = None,
    ) -> Subscription:
        """Join ``group``. At most ``window`` deliveries (rows) are out without an ack, and of one partition no more than that
        without a commit. ``member`` makes the membership static: a restart under that name gets its partitions back at
        once. A new group starts at the earliest message (see `Capabilities.history`). Raises `Unavailable`, also for a topic
        that does not exist."""
        ...

    async def declare(self, topics: Sequence[str], *, partitions: int | None = None) -> None:
        """Make the topics that do not exist."""
        ...

    async def check(self, topics: Sequence[str]) -> list[str]:
        """What is wrong with these topics, one sentence each; empty if nothing is."""
        ...
