"""The order in which messages are handled: those of one key one after the other, all others side by side."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable

from outbox.consumer.incoming import Incoming


class Lane:
    """The messages of one key, in order. Its head is what is handled, or waits for its next attempt."""

    __slots__ = ("items", "key", "running", "timer")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.items: deque[Incoming] = deque()
        self.running = False
        self.timer: asyncio.TimerHandle | None = None


class Lanes:
    """All messages that this process has and has not finished. Used from one event loop."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, Lane] = {}
        self._ready: deque[Lane] = deque()
        self._is_ready = asyncio.Event()
        self._changed = asyncio.Event()
        self._count = 0

    @property
    def count(self) -> int:
        """Messages (rows) in memory."""
        return self._count

    def put(self, incoming: Incoming) -> None:
        key: Hashable = incoming.order if incoming.order is not None else incoming
        lane = self._by_key.get(key)
        if lane is None:
            lane = self._by_key[key] = Lane(key)
            lane.items.append(incoming)
            self._next(lane)
        else:
            lane.items.append(incoming)
        self._count += 1

    async def take(self) -> Lane:
        """The next lane whose head is to be handled; it is the caller's until `done`, `again` or `wait`."""
        while not self._ready:
            self._is_ready.clear()
            await self._is_ready.wait()
        lane = self._ready.popleft()
        lane.running = True
        return lane

    def done(self, lane: Lane) -> None:
        """The head is finished, or dropped: the next of its key may be handled."""
        lane.running = False
        lane.items.popleft()
        self._count -= 1
        self._changed.set()
        self._next(lane)

    def again(self, lane: Lane) -> None:
        """Handle the head again, as soon as its turn comes."""
        lane.running = False
        self._make_ready(lane)

    def wait(self, lane: Lane, seconds: float) -> None:
        """Handle the head again after ``seconds``; its successors wait, other keys go on."""
        lane.running = False
        lane.items[0].not_before = asyncio.get_running_loop().time() + seconds
        self._next(lane)

    def drop(self, unwanted: Callable[[Incoming], bool]) -> list[Incoming]:
        """Remove what has not begun; returns what is being handled and was not wanted."""
        running = []
        for lane in list(self._by_key.values()):
            head = lane.items[0] if lane.running else None
            kept = deque(item for item in lane.items if item is head or not unwanted(item))
            dropped = len(lane.items) - len(kept)
            if head is not None and unwanted(head):
                running.append(head)
            if not dropped:
                continue
            first_dropped = not kept or kept[0] is not lane.items[0]
            self._count -= dropped
            lane.items = kept
            if first_dropped and not lane.running:
                if lane.timer is not None:
                    lane.timer.cancel()
                    lane.timer = None
                if lane in self._ready:
                    self._ready.remove(lane)
                self._next(lane)
        self._changed.set()
        return running

    async def changed(self) -> None:
        """Wait until something was finished or dropped."""
        self._changed.clear()
        await self._changed.wait()

    def _next(self, lane: Lane) -> None:
        """What a lane that nobody works on does: wait until its head is due, be ready, or end."""
        if not lane.items:
            del self._by_key[lane.key]
            return
        seconds = lane.items[0].not_before - asyncio.get_running_loop().time() if lane.items[0].not_before else 0.0
        if seconds <= 0:
            self._make_ready(lane)
        else:
            lane.timer = asyncio.get_running_loop().call_later(seconds, self._due, lane)

    def _due(self, lane: Lane) -> None:
        lane.timer = None
        self._make_ready(lane)

    def _make_ready(self, lane: Lane) -> None:
        self._ready.append(lane)
        self._is_ready.set()
