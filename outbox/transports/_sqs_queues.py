"""Queues: what they are called, which ones a topic has, and how they are made."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from outbox.errors import OutboxError, Unavailable
from outbox.transports._sqs_client import ERRORS, Client, is_missing, refusal
from outbox.transports._sqs_settings import Settings

logger = logging.getLogger("outbox.transports")

LONGEST: Final = "1209600"
"""Seconds that a queue keeps messages: all that SQS allows. Its default would throw them away after four days."""


OLD_LIMIT: Final = 262_144  # bytes, of a message and of a request


@dataclass(frozen=True, slots=True)
class Queue:
    name: str
    url: str
    max_bytes: int
    """Of a message, and of a batch."""


class Queues:
    """What is known of queues, for `Settings.refresh` seconds at the most. Every method raises `OutboxError`."""

    def __init__(self, settings: Settings, client: Client) -> None:
        self._settings, self._client = settings, client
        self._of_topic: dict[str, tuple[float, list[Queue]]] = {}
        self._asking: dict[str, asyncio.Lock] = {}
        self._limits: dict[str, int] = {}

    def forget(self, topic: str) -> None:
        self._of_topic.pop(topic, None)

    async def of_topic(self, topic: str) -> list[Queue]:
        """Those that a message of the topic goes to, of each group one."""
        async with self._asking.setdefault(topic, asyncio.Lock()):
            asked, known = self._of_topic.get(topic, (0.0, []))
            now = time.monotonic()
            if not known or now - asked > self._settings.refresh:
                known = await self._found(topic)
                self._of_topic[topic] = now, known
            return known

    async def of_group(self, topic: str, group: str) -> tuple[Queue, bool]:
        """The group's own, and whether it was made now."""
        name = self._settings.queue_of(topic, group)
        return await self._one(name, f"topic {topic!r}, group {group!r}")

    async def dead_letters(self, queue: Queue) -> Queue:
        return (await self._one(self._settings.dead_letters_of(queue.name), f"dead letters of {queue.name!r}"))[0]

    async def _found(self, topic: str) -> list[Queue]:
        settings = self._settings
        what = f"topic {topic!r}: its queues cannot be looked for"
        if settings.by_group and not settings.groups:
            urls = await self._listed(settings.prefix_of(topic), what)
        else:
            names = {settings.queue_of(topic, group) for group in (settings.groups or ("",))}
            urls = [url for name in sorted(names) if (url := await self._url_of(name, what)) is not None]
        return [await self._queue(url) for url in urls]

    async def _listed(self, prefix: str, what: str) -> list[str]:
        try:
            client = await self._client.get()
            urls: list[str] = []
            more: dict[str, str] = {}
            while True:
                answer = await client.list_queues(QueueNamePrefix=prefix, MaxResults=1000, **more)
                urls += answer.get("QueueUrls", ())
                if not answer.get("NextToken"):
                    break
                more = {"NextToken": answer["NextToken"]}
        except ERRORS as error:
            raise refusal(error, what) from error
        fifo, is_dead_letters = self._settings.fifo, self._settings.is_dead_letters
        return sorted(url for url in urls if _name(url).endswith(".fifo") == fifo and not is_dead_letters(_name(url)))

    async def _url_of(self, name: str, what: str) -> str | None:
        try:
            answer = await (await self._client.get()).get_queue_url(QueueName=name)
        except ERRORS as error:
            if is_missing(error):
                return None
            raise refusal(error, what) from error
        url: str = answer["QueueUrl"]
        return url

    async def _one(self, name: str, whose: str) -> tuple[Queue, bool]:
        url = await self._url_of(name, f"{whose}: queue {name!r} cannot be looked for")
        made = url is None
        if url is None:
            if not self._settings.declare:
                raise Unavailable(f"sqs: {whose}: there is no queue {name!r}; make it, or leave out declare=no")
            url = await self._made(name, whose)
        return await self._queue(url), made

    async def make(self, topic: str) -> None:
        """The one queue of a topic, where all groups share it."""
        await self._one(self._settings.queue_of(topic, ""), f"topic {topic!r}")

    async def _made(self, name: str, whose: str) -> str:
        attributes = {"MessageRetentionPeriod": LONGEST}
        if self._settings.fifo:
            # else 300 messages a second are all that it takes
            attributes |= {
                "FifoQueue": "true",
                "DeduplicationScope": "messageGroup",
                "FifoThroughputLimit": "perMessageGroupId",
            }
        try:
            answer = await (await self._client.get()).create_queue(QueueName=name, Attributes=attributes)
        except ERRORS as error:
            raise refusal(error, f"{whose}: queue {name!r} cannot be made") from error
        logger.info("sqs: made queue %s", name)
        url: str = answer["QueueUrl"]
        return url

    async def _queue(self, url: str) -> Queue:
        limit = self._limits.get(url)
        if limit is None:
            limit = self._limits[url] = await self._limit(url)
        return Queue(_name(url), url, limit)

    def learn_old_limit(self, queue: Queue) -> None:
        """A request was too large: the service is of before August 2025, and did not say so when asked."""
        self._limits[queue.url] = min(OLD_LIMIT, queue.max_bytes)
        self._of_topic.clear()

    async def _limit(self, url: str) -> int:
        most = self._settings.max_message_bytes
        try:
            client = await self._client.get()
            answer = await client.get_queue_attributes(QueueUrl=url, AttributeNames=["MaximumMessageSize"])
            return min(most, int(answer.get("Attributes", {}).get("MaximumMessageSize", most)))
        except (*ERRORS, OutboxError, ValueError) as error:
            # who may not ask finds out by the refusal of a message
            logger.info("sqs: the size limit of %s is not known: %s", _name(url), error)
            return most


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def batches(entries: Sequence[tuple[int, dict[str, Any], int]], limit: int) -> list[list[tuple[int, dict[str, Any]]]]:
    """Up to ten entries of up to ``limit`` bytes together each, in order; of (number, entry, size)."""
    found: list[list[tuple[int, dict[str, Any]]]] = []
    room = 0
    for number, entry, size in entries:
        if not found or len(found[-1]) == 10 or size > room:
            found.append([])
            room = limit
        found[-1].append((number, entry))
        room -= size
    return found
