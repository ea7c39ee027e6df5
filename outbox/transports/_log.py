"""The contract of a log that needs no broker, which `memory` and `local` each keep in their own way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeAlias, TypeVar, TypeVarTuple

import msgspec

from outbox.transports._group import Group, TopicPartition

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


# Plain tuples, and headers packed into bytes: of millions of them the garbage collector stops looking at those that hold
# only bytes and numbers, which in memory is half of the cost of a message.
Row: TypeAlias = tuple[bytes | None, bytes | None, bytes]
"""A message as a log keeps it: key, payload, packed headers."""

Stored: TypeAlias = tuple[int, bytes | None, bytes | None, bytes, datetime]
"""A message as a log gives it back: offset, key, payload, packed headers, the time at which it was stored."""

pack_headers: Callable[[list[tuple[str, bytes]]], bytes] = msgspec.msgpack.Encoder().encode
unpack_headers: Callable[[bytes], list[tuple[str, bytes]]] = msgspec.msgpack.Decoder(list[tuple[str, bytes]]).decode


@dataclass(frozen=True, slots=True)
class Topic:
    id: str
    """Not the same after the topic was removed and made again."""
    partitions: int


class Log(Protocol):
    """Topics, their partitions, and groups that read them. All but `run`, `another`, `close` and `bell` are called inside
    `run` only. They raise `Unavailable` when the log cannot be used now, `ConfigurationError` when it never will be."""

    bell: Bell
    """Rung in this process whenever something was appended."""

    async def run(self, work: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        """Call ``work``, after all that was handed in before it, without holding up the event loop for long."""
        ...

    def another(self) -> Log:
        """The same log for another user, whose `run` does not wait for this one's."""
        ...

    def open(self) -> None: ...

    def topics(self, names: Sequence[str], create: int | None) -> dict[str, Topic]:
        """Those that exist; with ``create``, the others are made with that many partitions."""
        ...

    def append(self, rows: Mapping[TopicPartition, Sequence[Row]]) -> None:
        """All of them or none."""
        ...

    def read(self, wanted: Sequence[tuple[TopicPartition, int, int]], limit: int) -> dict[TopicPartition, list[Stored]]:
        """From each (partition, offset, most), up to ``limit`` in all."""
        ...

    def with_group(self, name: str, change: Callable[[Group, float], T]) -> T:
        """Call ``change`` with the group and the time, alone, and keep what it did. May call it twice."""
        ...

    async def close(self, *, abort: bool = False) -> None:
        """Let go of what this user holds. ``abort``: work that waits in `run` is not done any more."""
        ...


class Bell:
    """Wakes readers in any event loop of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    def listen(self, event: asyncio.Event) -> None:
        """From the loop that the event is awaited in."""
        with self._lock:
            self._listeners[event] = asyncio.get_running_loop()

    def forget(self, event: asyncio.Event) -> None:
        with self._lock:
            self._listeners.pop(event, None)

    def ring(self) -> None:
        with self._lock:
            listeners = list(self._listeners.items())
        for event, loop in listeners:
            if event.is_set():
                continue
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # its loop was closed without leaving: as if killed
                self.forget(event)
