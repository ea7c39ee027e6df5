"""A member of a group: its queues, each through a channel of its own."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import Final

from pika import exceptions

from outbox._outgoing import Outgoing
from outbox.errors import ConfigurationError, OutboxError, Unavailable
from outbox.transport import SENT, Delivery, Revoked
from outbox.transports import _rabbitmq_link as link_
from outbox.transports._rabbitmq_confirms import Call, Confirmed
from outbox.transports._rabbitmq_feed import Feed, token_of
from outbox.transports._rabbitmq_link import CLOSE, ERRORS, Channel, Link, connect
from outbox.transports._rabbitmq_settings import Settings
from outbox.transports._rabbitmq_topology import GroupQueues, consumers, declare_group, declare_retry, refusal
from outbox.transports._revoking import LET_GO, ask_to_let_go
from outbox.transports._waiting import wait

logger = logging.getLogger("outbox.transports")

BALANCE: Final = 1.0
"""Seconds between looks at how many members there are."""
MOST_UNACKED: Final = 65_535
"""The largest prefetch that AMQP can say."""


class RabbitmqSubscription:
    def __init__(
        self, settings: Settings, topics: Sequence[str], group: str, *, window: int, revoked: Revoked | None
    ) -> None:
        if window < 1 or not topics or not group:
            raise ConfigurationError("a subscription needs topics, a group and a window of at least one message")
        self._settings = settings
        self._topics = tuple(dict.fromkeys(topics))
        self._group = group
        self._window = window
        self._revoked = revoked
        self._link: Link | None = None
        self._feeds: list[Feed] = []
        self._counting: list[tuple[Channel, GroupQueues]] = []
        self._hungry: dict[str, Channel] = {}
        self._sending: Confirmed | None = None
        """Of what waits for its next delivery."""
        self._paused: frozenset[tuple[str, int]] = frozenset()
        self._first = 0
        """Where the next hand-out begins among the feeds, so that none is always last."""
        self._awake = asyncio.Event()
        self._reopening = asyncio.Lock()
        self._failure: OutboxError | None = None
        self._lost: OutboxError | None = None
        self._balancing: asyncio.Task[None] | None = None
        self.closed = False

    async def join(self) -> None:
        """Raises `Unavailable`, also for a topic that does not exist, and `ConfigurationError`."""
        link = await connect(self._settings, f"consuming {self._group}")
        try:
            feeds: list[Feed] = []
            counting: list[tuple[Channel, GroupQueues]] = []
            for topic in self._topics:
                queues = await declare_group(link, topic, self._group)
                if self._shares and len(queues.queues) > 1:
                    counting.append((await _count_me(link, queues.members), queues))
                for part in range(len(queues.queues)):
                    feeds.append(await self._feed(link, queues, part))
        except ERRORS as error:
            await link.abort()
            raise refusal(error, f"group {self._group!r} cannot read") from error
        except BaseException:
            await link.abort()
            raise
        if self._ended():  # meanwhile
            await link.abort()
            return
        self._link, self._feeds, self._counting, self._sending = link, feeds, counting, None
        self._hungry = {}
        self._lost = None
        link.lost.add_done_callback(lambda _: self._awake.set())
        if counting and self._balancing is None:
            self._balancing = asyncio.create_task(self._balance())

    @property
    def _shares(self) -> bool:
        """Whether members take turns at queues that deliver to one of them."""
        return self._settings.single_active_consumer and self._settings.partitions > 1

    async def _feed(self, link: Link, queues: GroupQueues, part: int) -> Feed:
        channel = await link.channel()
        feed = Feed(queues, part, channel, self._awake)
        channel.on_lost = lambda reason: self._feed_lost(feed, reason)
        await channel.call(channel.pika.basic_qos, prefetch_count=min(self._window, MOST_UNACKED))
        await channel.call(channel.pika.basic_consume, feed.queue, feed.received)
        return feed

    def _feed_lost(self, feed: Feed, reason: BaseException) -> None:
        """The broker gives to others what this channel had."""
        feed.waiting.clear()
        feed.out.clear()
        if not feed.leaving and not self.closed and self._lost is None:
            self._lost = link_.unavailable(reason, f"queue {feed.queue!r} cannot be read")
        self._awake.set()

    # ---- reading

    async def fetch(self, limit: int, timeout: float) -> list[Delivery]:
        if self.closed:
            raise RuntimeError("this subscription is closed")
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout
        while not self._ended():
            if self._failure is not None:
                raise self._failure
            if self._lost is not None or self._link is None or not self._link.is_open:
                await self._recover()
            self._awake.clear()
            found = self._hand_out(limit)
            if found:
                return found
            left = deadline - clock()
            if left <= 0:
                break
            await wait(self._awake, left)
        return []

    def _ended(self) -> bool:
        """`closed`, in a form that a type checker does not take for constant across an await."""
        return self.closed

    def _hand_out(self, limit: int) -> list[Delivery]:
        room = min(limit, self._window - sum(len(feed.out) for feed in self._feeds))
        found: list[Delivery] = []
        count = len(self._feeds)
        self._first += 1
        for at in range(count):
            feed = self._feeds[(self._first + at) % count]
            if feed.leaving or feed.place in self._paused:
                continue
            while feed.waiting and len(found) < room:
                found.append(feed.hand_out())
        return found

    async def _recover(self) -> None:
        """After the connection or a channel was lost: tell it, once, and make all anew. Raises `Unavailable`."""
        async with self._reopening:
            if self._ended():
                return
            lost, link = self._lost, self._link
            if lost is None and link is not None and link.is_open:
                return  # somebody else has
            self._lost = None
            if link is not None:
                if lost is None:
                    reason = link.lost.result() if link.lost.done() else exceptions.ConnectionClosed(0, "it is closing")
                    lost = link_.unavailable(reason, f"group {self._group!r} lost its connection")
                places = frozenset(feed.place for feed in self._feeds)
                self._link, self._feeds = None, []
                link.hang_up()
                await ask_to_let_go(self._revoked, places, self._group)
                raise lost
            await self.join()

    # ---- settling

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        by_feed: dict[Feed, set[int]] = {}
        for one in deliveries:
            feed, tag = token_of(one)
            by_feed.setdefault(feed, set()).add(tag)
        for feed, tags in by_feed.items():
            if feed.out and feed.channel.pika.is_open:
                feed.ack(tags)
        self._awake.set()

    async def retry(self, delivery: Delivery, after: float) -> None:
        """It waits in a queue for the next of 1, 2, 4, … seconds, and comes back at the end of its own."""
        feed, tag = token_of(delivery)
        if tag in feed.out:
            try:
                queue = await declare_retry(feed.channel.link, feed.queue, after)
                await self._move(feed, tag, queue)
            except ERRORS as error:
                raise refusal(error, f"a message of {feed.queue!r} cannot wait for its next delivery") from error
            await self.ack([delivery])

    async def reject(self, delivery: Delivery) -> None:
        feed, tag = token_of(delivery)
        if tag in feed.out:
            try:
                await self._move(feed, tag, feed.queues.dead_letters)
            except ERRORS as error:
                raise refusal(error, f"a message of {feed.queue!r} cannot go to the dead letters") from error
            await self.ack([delivery])

    async def _move(self, feed: Feed, tag: int, queue: str) -> None:
        """Have another queue store it, and confirm that: a crash between this and the acknowledgement leaves it in both.
        Raises `Unavailable` and pika's errors."""
        _, properties, body = feed.out[tag]
        if self._sending is None or not self._sending.usable:
            self._sending = await Confirmed.open(feed.channel.link)
        call = Call.of([Outgoing(0, properties.message_id, queue, None, None, body, None, None, 0)])
        self._sending.publish("", queue, body, properties, (call, 0))
        async with asyncio.timeout(self._settings.delivery_timeout):
            await call.done.wait()
        (outcome,) = call.outcomes
        if outcome is not None and outcome is not SENT:
            raise Unavailable(outcome.reason)

    def pause(self, topics_partitions: frozenset[tuple[str, int]]) -> None:
        self._paused |= topics_partitions

    def resume(self, topics_partitions: frozenset[tuple[str, int]]) -> None:
        self._paused -= topics_partitions
        self._awake.set()

    # ---- sharing

    async def _balance(self) -> None:
        """Of a group's queues each member keeps its share, and lets the others have the rest. Their queues deliver to one
        member at a time: the first that came, and when that lets go, the one that waits longest."""
        while not self._ended():
            await asyncio.sleep(BALANCE)
            link = self._link
            if link is None or not link.is_open:
                continue
            try:
                for _, queues in list(self._counting):
                    await self._keep_share(link, queues)
            except (*ERRORS, OutboxError) as error:
                if link.is_open and not self._ended():
                    logger.warning("group %s: cannot share its queues: %s", self._group, link_.text(error))

    async def _keep_share(self, link: Link, queues: GroupQueues) -> None:
        parts, members = len(queues.queues), await consumers(link, queues.members)
        active = [feed for feed in self._feeds if feed.queues is queues and feed.active]
        await self._be_hungry(link, queues, not active)
        share = math.ceil(parts / max(1, members))
        if len(active) == share and await consumers(link, queues.hungry):
            share = max(1, parts // members)  # those that have one more than others leave it to who has none
        surplus = active[share:]
        if surplus:
            await ask_to_let_go(self._hold(surplus), frozenset(feed.place for feed in surplus), self._group)
            for feed in surplus:
                await self._let_go(link, feed)

    async def _be_hungry(self, link: Link, queues: GroupQueues, hungry: bool) -> None:
        known = self._hungry.pop(queues.topic, None)
        if known is not None and (not hungry or not known.is_open):
            await known.close()
            known = None
        if hungry and known is None:
            known = await _count_me(link, queues.hungry)
        if known is not None:
            self._hungry[queues.topic] = known

    def _hold(self, feeds: list[Feed]) -> Revoked | None:
        for feed in feeds:
            feed.leaving = True
        return self._revoked

    async def _let_go(self, link: Link, feed: Feed) -> None:
        """Close its channel, which gives back what was not handed out, in order; then stand in line again."""
        if feed.out and self._revoked is None:
            feed.drained.clear()
            await wait(feed.drained, LET_GO)
        await feed.channel.close()
        again = await self._feed(link, feed.queues, feed.part)
        if feed in self._feeds:
            self._feeds[self._feeds.index(feed)] = again

    # ---- the end

    async def close(self) -> None:
        """Every acknowledgement has been seen by the broker when this returns, unless it does not answer."""
        if self.closed:
            return
        self.closed = True
        self._awake.set()
        await self._stop_balancing()
        if self._link is not None:
            for feed in self._feeds:
                if not await feed.channel.close():
                    await self._link.abort()
                    return
            await self._link.close()

    async def abandon(self) -> None:
        self.closed = True
        self._awake.set()
        if self._link is not None:
            await self._link.abort()
        await self._stop_balancing()

    async def _stop_balancing(self) -> None:
        task, self._balancing = self._balancing, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task], timeout=CLOSE)


async def _count_me(link: Link, queue: str) -> Channel:
    channel = await link.channel()
    await channel.call(channel.pika.basic_consume, queue, lambda *_: None, auto_ack=True)
    return channel
