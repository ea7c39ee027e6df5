"""Publishing by batches of ten, several under way, each message by its own entry in the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from outbox._outgoing import Outgoing
from outbox.errors import ConfigurationError, EncodingError, MessageTooLarge, OutboxError, Refused, Unavailable
from outbox.transport import SENT, Outcome
from outbox.transports._sqs_client import (
    ERRORS,
    NEVER,
    THROTTLED,
    Client,
    is_about_all,
    is_about_content,
    is_missing,
    refusal,
)
from outbox.transports._sqs_message import entry_of
from outbox.transports._sqs_queues import Queue, Queues, batches
from outbox.transports._sqs_settings import Settings

Entry = tuple[int, dict[str, Any], int]  # number of the message in the call, entry, size in bytes

CLOSED: Final = "sqs: this transport is closed"


class Publisher:
    """All publishing of one transport. Belongs to one event loop."""

    def __init__(self, settings: Settings, client: Client, queues: Queues) -> None:
        self._settings, self._client, self._queues = settings, client, queues
        self._requests = asyncio.Semaphore(settings.requests)
        self._under_way: set[asyncio.Task[None]] = set()
        self._closed = False

    async def publish(self, batch: Sequence[Outgoing]) -> list[Outcome]:
        if self._closed:
            return [Outcome.unavailable(CLOSED, Unavailable(CLOSED))] * len(batch)
        call = _Call(batch)
        by_topic = self._encode(call)
        if by_topic:
            task = asyncio.create_task(self._send(call, by_topic))
            self._under_way.add(task)
            try:
                await asyncio.wait([task], timeout=self._settings.delivery_timeout)
            finally:
                self._under_way.discard(task)
                if not task.done():
                    task.cancel()
            if task.done() and not task.cancelled():
                task.result()
        return call.outcomes(self._settings.delivery_timeout)

    def _encode(self, call: _Call) -> dict[str, list[Entry]]:
        """By topic, in order: what can be refused is refused before anything is sent."""
        ready: dict[str, list[Entry]] = {}
        most = self._settings.max_message_bytes
        for at, message in enumerate(call.batch):
            try:
                if len(message.payload or b"") > most:
                    raise _too_large(message, len(message.payload or b""), most)
                self._settings.prefix_of(message.topic)
                entry, size = entry_of(message, fifo=self._settings.fifo)
                if size > most:
                    raise _too_large(message, size, most)
            except (EncodingError, ConfigurationError, OutboxError, UnicodeError, ValueError) as error:
                call.settle(at, _rejected(message, error))
            else:
                ready.setdefault(message.topic, []).append((at, entry, size))
        return ready

    async def _send(self, call: _Call, by_topic: dict[str, list[Entry]]) -> None:
        await asyncio.gather(*(self._send_topic(call, topic, entries) for topic, entries in by_topic.items()))

    async def _send_topic(self, call: _Call, topic: str, entries: list[Entry]) -> None:
        try:
            queues = await self._queues.of_topic(topic)
            if not queues:
                name = self._settings.queue_of(topic, "GROUP" if self._settings.by_group else "")
                raise Unavailable(
                    f"sqs: topic {topic!r} has no queue ({name}): no group has subscribed to it yet, or its queue is made "
                    "elsewhere"
                )
        except ConfigurationError as error:
            call.settle_all(entries, Outcome.reject(str(error), error))
            return
        except OutboxError as error:
            cause = error.__cause__
            about_all = cause is not None and is_about_all(cause)
            call.settle_all(entries, Outcome.unavailable(str(error), error, "transport" if about_all else "topic"))
            return
        limit = min(queue.max_bytes for queue in queues)
        fits = []
        for entry in entries:
            if entry[2] > limit:
                message = call.batch[entry[0]]
                call.settle(entry[0], _rejected(message, _too_large(message, entry[2], limit)))
            else:
                fits.append(entry)
        call.copies.update({at: len(queues) for at, _, _ in fits})
        await asyncio.gather(*(self._send_queue(call, topic, queue, fits) for queue in queues))

    async def _send_queue(self, call: _Call, topic: str, queue: Queue, entries: list[Entry]) -> None:
        """Of a FIFO queue's group one after the other: of entries in one request, one may fail and a later one not."""
        waves = _waves(entries) if self._settings.fifo else [entries]
        failed: set[str] = set()
        for wave in waves:
            going = []
            for entry in wave:
                if entry[1].get("MessageGroupId") in failed:
                    call.settle(entry[0], Outcome.retry("sqs: waits behind a message of its key"))
                else:
                    going.append(entry)
            await asyncio.gather(
                *(self._send_batch(call, topic, queue, some) for some in batches(going, queue.max_bytes))
            )
            failed.update(
                entry[1]["MessageGroupId"] for entry in going if call.failed(entry[0]) and self._settings.fifo
            )

    async def _send_batch(
        self, call: _Call, topic: str, queue: Queue, entries: list[tuple[int, dict[str, Any]]]
    ) -> None:
        request = [{"Id": str(at), **entry} for at, entry in entries]
        try:
            async with self._requests:
                client = await self._client.get()
                answer = await client.send_message_batch(QueueUrl=queue.url, Entries=request)
        except (*ERRORS, OutboxError) as error:
            if is_missing(error):
                self._queues.forget(topic)
            if is_about_content(error):
                await self._send_parts(call, topic, queue, entries, error)
                return
            outcome = _of_request(refusal(error, f"topic {topic!r}, queue {queue.name!r} cannot be written to"), error)
            for at, _ in entries:
                call.settle(at, outcome)
            return
        for stored in answer.get("Successful", ()):
            call.stored(int(stored["Id"]))
        for refused in answer.get("Failed", ()):
            at = int(refused["Id"])
            call.settle(at, _of_entry(call.batch[at], refused))

    async def _send_parts(
        self, call: _Call, topic: str, queue: Queue, entries: list[tuple[int, dict[str, Any]]], error: BaseException
    ) -> None:
        """A request was refused as a whole for what is in it: too large together, or one of them is wrong."""
        half = len(entries) // 2
        if half:
            self._queues.learn_old_limit(queue)
            await self._send_batch(call, topic, queue, entries[:half])
            await self._send_batch(call, topic, queue, entries[half:])
        else:
            (at, _) = entries[0]
            call.settle(at, _rejected(call.batch[at], refusal(error, f"queue {queue.name!r}")))

    async def close(self, *, abort: bool) -> None:
        self._closed = True
        under_way = list(self._under_way)
        if under_way and not abort:
            await asyncio.wait(under_way, timeout=self._settings.delivery_timeout)
        for task in under_way:
            task.cancel()
        if under_way:
            await asyncio.wait(under_way, timeout=1.0)


class _Call:
    """What is known of the messages of one publish call. A message is sent when each of the topic's queues has it."""

    def __init__(self, batch: Sequence[Outgoing]) -> None:
        self.batch = batch
        self.copies: dict[int, int] = {}
        """Number of a message to the queues that have yet to store it."""
        self._outcomes: list[Outcome | None] = [None] * len(batch)

    def settle(self, at: int, outcome: Outcome) -> None:
        """It is not sent; the first reason counts."""
        known = self._outcomes[at]
        if known is None or known is SENT:
            self._outcomes[at] = outcome

    def settle_all(self, entries: Sequence[Entry], outcome: Outcome) -> None:
        for at, _, _ in entries:
            self.settle(at, outcome)

    def stored(self, at: int) -> None:
        self.copies[at] -= 1
        if not self.copies[at] and self._outcomes[at] is None:
            self._outcomes[at] = SENT

    def failed(self, at: int) -> bool:
        outcome = self._outcomes[at]
        return outcome is not None and outcome.kind in ("retry", "unavailable")

    def outcomes(self, seconds: float) -> list[Outcome]:
        if None not in self._outcomes:
            return self._outcomes  # type: ignore[return-value]
        error = Unavailable(f"sqs: not confirmed within {seconds:g} s")
        unknown = Outcome.unavailable(str(error), error)
        return [outcome if outcome is not None else unknown for outcome in self._outcomes]


def _waves(entries: list[Entry]) -> list[list[Entry]]:
    """The first of each group, the second of each group, …"""
    waves: list[list[Entry]] = []
    count: dict[str, int] = {}
    for entry in entries:
        group = entry[1]["MessageGroupId"]
        number = count[group] = count.get(group, -1) + 1
        if number == len(waves):
            waves.append([])
        waves[number].append(entry)
    return waves


def _of_request(error: OutboxError, cause: BaseException) -> Outcome:
    if isinstance(error, Refused):
        return Outcome.reject(str(error), error)
    return Outcome.unavailable(str(error), error, "transport" if is_about_all(cause) else "topic")


def _of_entry(message: Outgoing, refused: dict[str, Any]) -> Outcome:
    code, said = str(refused.get("Code", "")), str(refused.get("Message") or "")
    text = f"sqs: message {message.id} for {message.topic!r} was refused: {said or 'no reason given'} ({code})"
    if code.rpartition(".")[2] in NEVER:
        return Outcome.reject(text, Refused(text))
    if code in THROTTLED or code.lower().startswith("kms") or not refused.get("SenderFault"):
        return Outcome.unavailable(text, Unavailable(text), "topic")
    return Outcome.retry(text, Refused(text))


def _too_large(message: Outgoing, size: int, limit: int) -> MessageTooLarge:
    return MessageTooLarge(
        f"sqs: message {message.id} for {message.topic!r} has {size} bytes with its headers, and {limit} are possible"
    )


def _rejected(message: Outgoing, error: BaseException) -> Outcome:
    if not isinstance(error, MessageTooLarge):
        refused = Refused(f"sqs: message {message.id} for {message.topic!r} cannot be sent: {error}")
        refused.__cause__ = error
        error = refused
    return Outcome.reject(str(error), error)
