"""The order of several publish calls under way, when one of them fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection
from typing import Final

EVERYTHING: Final = ""
"""In place of a topic: the whole transport failed."""


class Pipeline:
    """Keeps the promise of `Capabilities.ordered_pipeline`: once a message is not sent, none of its key that was handed
    over behind it, before its caller could know, is stored.

    A topic (or everything) that failed in one call fails also in every call that entered before that one returned, and
    in those that enter before these have returned: each of them could hold a successor of a message that was not sent.
    A caller that backs off, as `unavailable` asks of it, lets the last of them return, and the topic is open again.
    """

    def __init__(self) -> None:
        # A log finds a failure in its own thread, while calls enter and leave in the loop's.
        self._lock = threading.Lock()
        self._entered = 0
        self._failing: dict[str, int] = {}
        """How many calls that failed the topic have not returned."""
        self._closed_until: dict[str, int] = {}
        """Calls up to this number entered before a failed one returned."""

    def enter(self) -> int:
        """A call begins; its number. To be taken before the first await of the call."""
        with self._lock:
            self._entered += 1
            return self._entered

    def blocked(self, call: int, topic: str) -> bool:
        """Whether the topic failed before, so that this call must not send to it. `EVERYTHING` is asked for by itself."""
        return topic in self._failing or call <= self._closed_until.get(topic, 0)

    def fail(self, topic: str) -> None:
        """The topic fails in a call, from now on. Once a call and topic; `leave` gets the same topics."""
        with self._lock:
            self._failing[topic] = self._failing.get(topic, 0) + 1

    def leave(self, failed: Collection[str]) -> None:
        """The call returns, having failed these topics."""
        if failed:
            # Two turns of the loop later, because whoever awaits the task of that call is woken only in the next.
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._left, tuple(failed))

    def _left(self, failed: tuple[str, ...]) -> None:
        with self._lock:
            for topic in failed:
                still = self._failing[topic] - 1
                if still:
                    self._failing[topic] = still
                else:
                    del self._failing[topic]
                self._closed_until[topic] = self._entered
            if len(self._closed_until) > 1000:  # names of topics that do not exist
                recent = self._entered - 1000  # more calls than that are never under way
                self._closed_until = {topic: call for topic, call in self._closed_until.items() if call > recent}
