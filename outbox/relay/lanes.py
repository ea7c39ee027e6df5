"""One message of a key at a time, for transports that cannot keep a key in order in their own pipeline."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from outbox._outgoing import Outgoing
from outbox.relay.parking import ParkedKey, key_of


class Lanes:
    """What waits in memory for the message before it to be answered."""

    def __init__(self) -> None:
        self._lanes: dict[ParkedKey, deque[Outgoing]] = {}

    def __len__(self) -> int:
        """Keys with a message on its way."""
        return len(self._lanes)

    def clear(self) -> None:
        self._lanes.clear()

    def first_of_its_key(self, row: Outgoing) -> bool:
        """Whether it can go now. If not, it waits from here on."""
        key = key_of(row)
        if key is None:
            return True
        lane = self._lanes.get(key)
        if lane is None:
            self._lanes[key] = deque()
            return True
        lane.append(row)
        return False

    def next_after(self, rows: Iterable[Outgoing]) -> list[Outgoing]:
        """These are done: what can go now."""
        following: list[Outgoing] = []
        if self._lanes:
            for row in rows:
                if (key := key_of(row)) is not None and (lane := self._lanes.get(key)) is not None:
                    if lane:
                        following.append(lane.popleft())
                    else:
                        del self._lanes[key]
        return following

    def take_behind(self, rows: Iterable[Outgoing]) -> list[Outgoing]:
        """What waits behind these, taken out of here."""
        waiting: list[Outgoing] = []
        for row in rows:
            if (key := key_of(row)) is not None:
                waiting += self._lanes.pop(key, ())
        return waiting
