"""A member of a group: it polls the group's queue of each topic, and keeps what it has invisible to others."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from outbox import wire
from outbox.backoff import Backoff
from outbox.errors import ConfigurationError, OutboxError
from outbox.transport import Delivery
from outbox.transports._sqs_client import ERRORS, Client, is_missing, refusal
from outbox.transports._sqs_message import read
from outbox.transports._sqs_queues import Queue, Queues
from outbox.transports._sqs_settings import Settings
from outbox.transports._waiting import wait

logger = logging.getLogger("outbox.transports")

AT_ONCE: Final = 10  # messages of one request
LONGEST_DELAY: Final = 43_200  # seconds; of a message's invisibility
AGAIN: Final = Backoff(first=0.2, factor=2.0, most=5.0)
SHORT: Final = 0.2  # seconds after a poll that found nothing and did not wait
LATE: Final = 2.0  # seconds that a close waits for polls longer than they take: an answer unheard hides its messages


@dataclass(eq=False, slots=True)
class Held:
    """A message that is ours for the moment."""

    feed: Feed
    raw: dict[str, Any]

    @property
    def handle(self) -> str:
        handle: str = self.raw["ReceiptHandle"]
        return handle


@dataclass(eq=False, slots=True)
class Feed:
    """One queue, as far as this member goes."""

    topic: str
    queue: Queue
    waiting: deque[Held] = field(default_factory=deque)
    out: set[Held] = field(default_factory=set)
    asked: int = 0
    """Messages that the polls under way may bring."""
    polls: set[asyncio.Task[None]] = field(default_factory=set)
    failures: int = 0

    @property
    def held(self) -> int:
        return len(self.waiting) + len(self.out) + self.asked


class SqsSubscription:
    def __init__(
        self, settings: Settings, client: Client, queues: Queues, topics: Sequence[str], group: str, *, window: int
    ) -> None:
        if window < 1 or not topics or not group:
            raise ConfigurationError("a subscription needs topics, a group and a window of at least one message")
        self._settings, self._client, self._queues = settings, client, queues
        self._topics, self._group, self._window = tuple(dict.fromkeys(topics)), group, window
        self._feeds: list[Feed] = []
        self._paused: frozenset[tuple[str, int]] = frozenset()
        self._first = 0
        self._awake = asyncio.Event()
        self._room = asyncio.Event()
        self._lost: OutboxError | None = None
        self._work: set[asyncio.Task[None]] = set()
        self.closed = False

    async def join(self) -> bool:
        """Find or make the queues; returns whether any was made. Raises `Unavailable` and `ConfigurationError`."""
        made = False
        for topic in self._topics:
            queue, new = await self._queues.of_group(topic, self._group)
            made = made or new
            self._feeds.append(Feed(topic, queue))
        return made

    def start(self) -> None:
        self._spawn(self._keep())
        for feed in self._feeds:
            self._poll(feed)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    # ---- reading

    async def fetch(self, limit: int, timeout: float) -> list[Delivery]:
        if self.closed:
            raise RuntimeError("this subscription is closed")
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout
        while not self._ended():
            self._awake.clear()
            found = self._hand_out(limit)
            if found:
                return found
            if (lost := self._lost) is not None:
                self._lost = None
                raise lost
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
        self._first += 1
        for at in range(len(self._feeds)):
            feed = self._feeds[(self._first + at) % len(self._feeds)]
            while feed.waiting and len(found) < room and (feed.topic, 0) not in self._paused:
                held = feed.waiting.popleft()
                feed.out.add(held)
                found.append(_delivery(held))
        if found:
            self._room.set()
        return found

    # ---- polling: one request waits for messages; where they come by tens there are more of them

    def _poll(self, feed: Feed) -> None:
        task = self._spawn(self._poll_until_empty(feed))
        feed.polls.add(task)
        task.add_done_callback(feed.polls.discard)

    async def _poll_until_empty(self, feed: Feed) -> None:
        """One of a feed's polls stays for good; the others end when there is little to get."""
        while not self._ended():
            count = self._ask_for(feed)
            if not count:
                if self._is_too_many(feed):
                    return
                self._room.clear()
                await wait(self._room, 1.0)
                continue
            feed.asked += count
            try:
                messages = await self._receive(feed, count)
                feed.failures = 0
            except (*ERRORS, OutboxError) as error:
                await self._failed(feed, error)
                continue
            finally:
                feed.asked -= count
            feed.waiting.extend(Held(feed, message) for message in messages)
            if messages:
                self._awake.set()
            if len(messages) == count and len(feed.polls) < self._settings.requests:
                self._poll(feed)
            elif not messages:
                if self._is_too_many(feed):
                    return
                if not self._settings.wait:
                    self._room.clear()
                    await wait(self._room, SHORT)

    def _is_too_many(self, feed: Feed) -> bool:
        """Whether the poll that asks may end; if so, it counts no longer."""
        task = asyncio.current_task()
        if task is None or len(feed.polls) < 2:
            return False
        feed.polls.discard(task)
        return True

    def _ask_for(self, feed: Feed) -> int:
        """As many as the window has room for; at least one where the feed has nothing, so that none is left out."""
        if (feed.topic, 0) in self._paused:
            return 0
        room = self._window - sum(one.held for one in self._feeds)
        return min(AT_ONCE, room) if room > 0 else int(feed.held == 0)

    async def _receive(self, feed: Feed, count: int) -> list[dict[str, Any]]:
        client = await self._client.get()
        answer = await client.receive_message(
            QueueUrl=feed.queue.url,
            MaxNumberOfMessages=count,
            WaitTimeSeconds=self._settings.wait,
            VisibilityTimeout=self._invisible,
            AttributeNames=["All"],
            MessageAttributeNames=["All"],
        )
        found: list[dict[str, Any]] = answer.get("Messages", [])
        return found

    @property
    def _invisible(self) -> int:
        return math.ceil(self._settings.visibility_timeout)

    async def _failed(self, feed: Feed, error: BaseException) -> None:
        feed.failures += 1
        what = f"group {self._group!r}: queue {feed.queue.name!r} cannot be read"
        if not self._ended():
            self._lost = refusal(error, what)
            self._awake.set()
        await asyncio.sleep(AGAIN.delay(feed.failures))
        if is_missing(error) and not self._ended():
            try:
                feed.queue, _ = await self._queues.of_group(feed.topic, self._group)
            except OutboxError as other:
                self._lost = other

    # ---- what is ours stays invisible to others

    async def _keep(self) -> None:
        while not self._ended():
            await asyncio.sleep(self._settings.visibility_timeout / 3)
            for feed in self._feeds:
                held = [*feed.waiting, *feed.out]
                for lost in await self._hide(feed, held, self._invisible):
                    logger.warning("sqs: a message of %s is handed out to another member too", feed.queue.name)
                    if lost in feed.waiting:
                        feed.waiting.remove(lost)

    async def _hide(self, feed: Feed, held: Sequence[Held], seconds: int) -> list[Held]:
        """For so long from now on; returns those that are not ours any more."""

        async def some(part: Sequence[Held]) -> list[Held]:
            entries = [
                {"Id": str(at), "ReceiptHandle": one.handle, "VisibilityTimeout": seconds}
                for at, one in enumerate(part)
            ]
            client = await self._client.get()
            answer = await client.change_message_visibility_batch(QueueUrl=feed.queue.url, Entries=entries)
            refused = [part[int(entry["Id"])] for entry in answer.get("Failed", ())]
            return [one for one in refused if one in feed.out or one in feed.waiting]

        return await self._in_batches(feed, held, some, "its visibility cannot be changed")

    async def _in_batches(
        self,
        feed: Feed,
        held: Sequence[Held],
        do: Callable[[Sequence[Held]], Coroutine[Any, Any, list[Held]]],
        what: str,
    ) -> list[Held]:
        parts = [held[at : at + AT_ONCE] for at in range(0, len(held), AT_ONCE)]
        limit = asyncio.Semaphore(self._settings.requests)
        failed: list[Held] = []

        async def one(part: Sequence[Held]) -> None:
            async with limit:
                try:
                    failed.extend(await do(part))
                except (*ERRORS, OutboxError) as error:
                    logger.warning("%s", refusal(error, f"messages of queue {feed.queue.name!r}: {what}"))

        await asyncio.gather(*map(one, parts))
        return failed

    # ---- settling

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Deleted when this returns. What cannot be is logged, and comes again."""
        for feed, held in self._ours(deliveries):
            await self._in_batches(feed, held, lambda part, feed=feed: self._delete(feed, part), "it cannot be deleted")  # type: ignore[misc]
            feed.out.difference_update(held)
        self._room.set()
        self._awake.set()

    async def _delete(self, feed: Feed, part: Sequence[Held]) -> list[Held]:
        entries = [{"Id": str(at), "ReceiptHandle": one.handle} for at, one in enumerate(part)]
        client = await self._client.get()
        answer = await client.delete_message_batch(QueueUrl=feed.queue.url, Entries=entries)
        for refused in answer.get("Failed", ()):
            logger.warning("sqs: a message of %s was not deleted: %s", feed.queue.name, refused.get("Message"))
        return []

    def _ours(self, deliveries: Iterable[Delivery]) -> Iterable[tuple[Feed, list[Held]]]:
        by_feed: dict[Feed, list[Held]] = {}
        for one in deliveries:
            held = _token(one)
            if held in held.feed.out:
                by_feed.setdefault(held.feed, []).append(held)
        return by_feed.items()

    async def retry(self, delivery: Delivery, after: float) -> None:
        """Up to 12 hours, in whole seconds."""
        for feed, held in self._ours([delivery]):
            await self._hide(feed, held, min(LONGEST_DELAY, max(0, math.ceil(after))))
            feed.out.difference_update(held)
        self._room.set()
        self._awake.set()

    async def reject(self, delivery: Delivery) -> None:
        """Stored among the dead letters before it is deleted: a crash in between leaves it in both."""
        for feed, (held,) in self._ours([delivery]):
            raw = held.raw
            what = f"a message of {feed.queue.name!r} cannot go to the dead letters"
            more = {
                name: raw["Attributes"][name]
                for name in ("MessageGroupId", "MessageDeduplicationId")
                if name in raw.get("Attributes", {})
            }
            try:
                queue = await self._queues.dead_letters(feed.queue)
                attributes = raw.get("MessageAttributes") or {}
                client = await self._client.get()
                await client.send_message(
                    QueueUrl=queue.url, MessageBody=raw["Body"], MessageAttributes=attributes, **more
                )
            except ERRORS as error:
                raise refusal(error, what) from error
            await self.ack([delivery])

    def pause(self, topics_partitions: frozenset[tuple[str, int]]) -> None:
        self._paused |= topics_partitions

    def resume(self, topics_partitions: frozenset[tuple[str, int]]) -> None:
        self._paused -= topics_partitions
        self._room.set()
        self._awake.set()

    # ---- the end

    async def close(self) -> None:
        """What is not acknowledged is visible to others at once."""
        if self.closed:
            return
        self.closed = True
        self._awake.set()
        self._room.set()
        polls = [poll for feed in self._feeds for poll in feed.polls]
        if polls:
            await asyncio.wait(polls, timeout=self._settings.wait + LATE)
        await self._end()
        for feed in self._feeds:
            held = [*feed.waiting, *feed.out]
            feed.waiting.clear()
            feed.out.clear()
            await self._hide(feed, held, 0)

    async def abandon(self) -> None:
        self.closed = True
        self._awake.set()
        await self._end()

    async def _end(self) -> None:
        work = list(self._work)
        for task in work:
            task.cancel()
        if work:
            await asyncio.wait(work, timeout=LATE)


def _token(delivery: Delivery) -> Held:
    if not isinstance(delivery.token, Held):
        raise ValueError("this delivery is of another transport")
    return delivery.token


def _delivery(held: Held) -> Delivery:
    payload, headers = read(held.raw)
    system = held.raw.get("Attributes") or {}
    key = next((value for name, value in headers if name == wire.KEY), None)
    return Delivery(
        topic=held.feed.topic,
        payload=payload,
        key=key,
        headers=headers,
        timestamp=_time(system.get("SentTimestamp")),
        suspect=str(system.get("ApproximateReceiveCount", "1")) != "1",
        token=held,
    )


def _time(milliseconds: Any) -> datetime | None:
    try:
        return datetime.fromtimestamp(int(milliseconds) / 1000, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None
