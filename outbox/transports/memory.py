"""``memory://name``: topics, partitions and groups in this process, for tests and for trying things out. Whoever opens the
same name shares it, in any thread and event loop. It lasts until the process ends or `forget` is called: nothing
survives a crash, and it grows with every message."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeVar, TypeVarTuple

from outbox.errors import ConfigurationError
from outbox.transports._group import Group, TopicPartition
from outbox.transports._log import Bell, Row, Stored, Topic
from outbox.transports._log_transport import LogTransport, options
from outbox.transports._url import Url

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


def from_url(url: Url) -> LogTransport:
    """``memory:``, ``memory://name``, with the parameters partitions, session, auto_create and max_message_bytes."""
    if url.username is not None:
        raise ConfigurationError("memory: a URL has a name at the most, as in memory://name")
    return LogTransport("memory", _log(url.hosts + url.path), **options(url))


def forget(name: str | None = None) -> None:
    """Drop everything under that name (None: under every name). Transports that are open keep what they have."""
    with _lock:
        if name is None:
            _logs.clear()
        else:
            _logs.pop(name, None)


_lock = threading.Lock()
_logs: dict[str, MemoryLog] = {}


def _log(name: str) -> MemoryLog:
    with _lock:
        if name not in _logs:
            _logs[name] = MemoryLog()
        return _logs[name]


class MemoryLog:
    """A `Log` in dictionaries and lists."""

    def __init__(self) -> None:
        self.bell = Bell()
        self._lock = threading.RLock()
        self._topics: dict[str, Topic] = {}
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._groups: dict[str, Group] = {}

    async def run(self, work: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        with self._lock:
            result = work(*arguments)
        await asyncio.sleep(0)  # a reader that always finds something must not keep the loop for itself
        return result

    def another(self) -> MemoryLog:
        return self

    def open(self) -> None:
        pass

    def topics(self, names: Sequence[str], create: int | None) -> dict[str, Topic]:
        found = {}
        for name in names:
            topic = self._topics.get(name)
            if topic is None and create is not None:
                topic = self._topics[name] = Topic(uuid.uuid4().hex, create)
                for partition in range(create):
                    self._partitions[name, partition] = _Partition()
            if topic is not None:
                found[name] = topic
        return found

    def append(self, rows: Mapping[TopicPartition, Sequence[Row]]) -> None:
        now = datetime.now(UTC)
        for place, new in rows.items():
            self._partitions[place].append(new, now)

    def read(self, wanted: Sequence[tuple[TopicPartition, int, int]], limit: int) -> dict[TopicPartition, list[Stored]]:
        found = {}
        for place, offset, most in wanted:
            rows = self._partitions[place].read(offset, min(most, limit))
            if rows:
                found[place] = rows
                limit -= len(rows)
                if not limit:
                    break
        return found

    def with_group(self, name: str, change: Callable[[Group, float], T]) -> T:
        return change(self._groups.setdefault(name, Group()), time.time())

    async def close(self, *, abort: bool = False) -> None:
        pass


class _Partition:
    # A tuple a batch, because the garbage collector walks through a list of all messages again and again, which made up
    # most of the cost from 100,000 messages on; it leaves tuples alone that hold nothing but bytes and numbers.
    def __init__(self) -> None:
        self._batches: list[tuple[Stored, ...]] = []
        self._starts: list[int] = []
        self._end = 0

    def append(self, rows: Sequence[Row], now: datetime) -> None:
        self._starts.append(self._end)
        self._batches.append(
            tuple(
                [(offset, key, payload, headers, now) for offset, (key, payload, headers) in enumerate(rows, self._end)]
            )
        )
        self._end += len(rows)

    def read(self, offset: int, most: int) -> list[Stored]:
        found: list[Stored] = []
        at = bisect_right(self._starts, offset) - 1
        while at >= 0 and at < len(self._batches) and len(found) < most:
            skip = max(0, offset - self._starts[at])
            found += self._batches[at][skip : skip + most - len(found)]
            at += 1
        return found
