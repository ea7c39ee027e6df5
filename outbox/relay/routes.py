"""Where a message goes: one transport a pattern of topics, each with what is on its way to it. An outage of one does not
hold up the others: each has its own connection, circuits and share of the memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

from outbox._outgoing import Outgoing
from outbox.errors import ConfigurationError
from outbox.relay.circuit import EVERYTHING, Circuits
from outbox.relay.lanes import Lanes
from outbox.relay.nowhere import Nowhere
from outbox.relay.parking import ParkedKey, key_of
from outbox.relay.publishing import close
from outbox.transport import Publisher

log = logging.getLogger("outbox.relay")

ALL: Final = "*"  # the pattern of the route that takes what no other one does
CONNECT: Final = 30.0  # seconds after which a broker that does not answer at all counts as away
SLOW: Final = 1.0  # seconds that a publish call takes, after which a full route holds up no other


class Route:
    """One transport, and what this relay has handed to it or holds for it."""

    def __init__(self, pattern: str, opener: Callable[[], Publisher], *, alone: bool) -> None:
        self.pattern, self._opener = pattern, opener
        self.transport = opener()
        self.name = "the broker" if alone else f"{self.transport.name} ({pattern})"
        self.circuits = Circuits(name=self.name)
        self.connected = False
        self.lanes = Lanes()
        self.topics: set[str] = set()
        """Those of which a message was read."""
        self.publishing: dict[asyncio.Task[None], float] = {}
        """The calls that are under way to their beginnings (monotonic seconds), in this order."""
        self.quiet = False
        """Nothing new is handed over until all that was handed over has been answered."""
        # Key to first position, of what was dropped to be read again since it is quiet
        self._dropped: dict[ParkedKey, int] = {}
        self._rows = self._bytes = 0  # in memory: read and not settled yet
        self._row_bytes = 4096.0  # guess of a row's size
        self._aside = False
        self._connecting: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ whether it can take anything

    @property
    def reachable(self) -> bool:
        """Whether its broker may be tried now."""
        return self.connected and not self.circuits.wait(EVERYTHING)

    @property
    def down(self) -> bool:
        return EVERYTHING in self.circuits

    @property
    def open(self) -> bool:
        """Whether anything new may be read for it."""
        return self.reachable and not self.quiet

    def room(self, rows: int, size: float) -> int:
        """How many more rows it may hold, of so many rows and bytes in all. At least one where it holds none."""
        return min(rows - self._rows, int((size - self._bytes) / self._row_bytes) or (0 if self._rows else 1))

    def is_aside(self, room: int, window: int) -> bool:
        """Whether it is so slow that others are read past its messages: from when it is full until it is half empty. Not
        where it goes on within a moment: to read around a long backlog costs a walk over it."""
        if room <= 0 and self.publishing and time.monotonic() - next(iter(self.publishing.values())) > SLOW:
            self._aside = True
        elif room >= window // 2 or not self.publishing:
            self._aside = False
        return self._aside

    # ------------------------------------------------------------ what is in memory

    def take(self, rows: Sequence[Outgoing]) -> None:
        size = sum([len(row.payload) for row in rows if row.payload])
        self._rows += len(rows)
        self._bytes += size
        self._row_bytes = max(256.0, size / len(rows) + 200, self._row_bytes * 0.5)

    def let_go(self, rows: Sequence[Outgoing]) -> None:
        self._rows -= len(rows)
        self._bytes -= sum([len(row.payload) for row in rows if row.payload])

    def forget(self) -> None:
        """Nothing is in memory any more."""
        self._rows = self._bytes = 0
        self.lanes.clear()
        self.quiet = True

    def read_again(self, rows: Sequence[Outgoing]) -> list[Outgoing]:
        """Not to be sent now, and nothing overtakes them; returns these and what waited behind them."""
        rows = [*rows, *self.lanes.take_behind(rows)]
        for row in rows:
            if (key := key_of(row)) is not None:
                self._dropped[key] = min(row.position, self._dropped.get(key, row.position))
        self.quiet = True
        return rows

    def follows_dropped(self, row: Outgoing) -> bool:
        """Whether a predecessor is to be read again."""
        key = key_of(row)
        return key is not None and self._dropped.get(key, row.position) < row.position

    def begun(self, task: asyncio.Task[None]) -> None:
        """A call is under way, until this has ended."""
        self.publishing[task] = time.monotonic()
        task.add_done_callback(lambda ended: self.publishing.pop(ended, None))

    def calm(self) -> None:
        """Where all that was handed over has been answered, something new may be."""
        if self.quiet and not self.publishing:
            self.quiet = False
            self._dropped.clear()

    # ------------------------------------------------------------ its connection

    def connect(self, done: Callable[[], None]) -> None:
        """Begin to reach the broker, where that is due; calls ``done`` when it has succeeded or failed. Raises the
        `ConfigurationError` of one that never can be reached."""
        connecting = self._connecting
        if connecting is not None and connecting.done():
            self._connecting = None
            connecting.result()
        elif connecting is None and not self.connected and not self.circuits.wait(EVERYTHING):
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(lambda _: done())

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(CONNECT):
                await self.transport.connect()
        except ConfigurationError:
            raise
        except Exception as error:
            away = isinstance(error, TimeoutError) and not str(error)
            said = f"no answer within {CONNECT:.0f} s" if away else str(error) or type(error).__name__
            if self.circuits.failed(EVERYTHING, said):
                log.error("%s is unavailable, trying again: %s", self.name, said)
        else:
            self.connected = True
            if self.circuits.succeeded(EVERYTHING):
                log.info("%s is available again", self.name)

    def cancel(self) -> list[asyncio.Task[None]]:
        """Cancel all that is under way; returns it."""
        tasks = [*self.publishing, *([self._connecting] if self._connecting is not None else [])]
        for task in tasks:
            task.cancel()
        return tasks

    async def abort(self) -> None:
        """What was handed over must not be sent any more. Goes on with the same transport where it was given as one, and
        it stays open then, since a closed one is so for good."""
        self.cancel()
        self.connected, self._connecting = False, None
        old, self.transport = self.transport, self._opener()
        if old is not self.transport:
            await close(old, abort=True)


class Routes:
    """The routes of one relay. A topic goes by its own name, else by the first pattern that fits (``*``, ``?``, ``[…]``),
    where ``*`` alone is the last of all."""

    def __init__(self, openers: Mapping[str, Callable[[], Publisher]]) -> None:
        """Of each pattern what makes its transport. Nothing is connected yet. Raises what they raise."""
        alone = list(openers) == [ALL]
        ordered = sorted(openers, key=lambda pattern: pattern == ALL)
        self._routes = [Route(pattern, openers[pattern], alone=alone) for pattern in ordered]
        self.brokers = tuple(self._routes)
        """All but the one for topics that have none."""
        if ALL not in openers:
            self._routes.append(Route(ALL, lambda: Nowhere(ordered), alone=False))
        self._of: dict[str, Route] = {}

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def __len__(self) -> int:
        return len(self._routes)

    def of(self, topic: str) -> Route:
        route = self._of.get(topic)
        if route is None:
            route = next((route for route in self._routes if route.pattern == topic), None) or next(
                route for route in self._routes if fnmatchcase(topic, route.pattern)
            )
            self._of[topic] = route
            route.topics.add(topic)
        return route

    def split(self, rows: list[Outgoing]) -> list[tuple[Route, list[Outgoing]]]:
        """Of each route its rows, in order."""
        if len(self._routes) == 1:
            return [(self._routes[0], rows)]
        found: dict[Route, list[Outgoing]] = {}
        for row in rows:
            found.setdefault(self.of(row.topic), []).append(row)
        return list(found.items())

    def without(self, reading: Collection[Route]) -> list[str]:
        """Topics to leave out of what is read for these routes: those of all others, and those that are unavailable."""
        return [
            topic
            for route in self._routes
            for topic in (route.circuits.topics_left_out() if route in reading else sorted(route.topics))
        ]

    @property
    def all_down(self) -> bool:
        return all(route.down for route in self.brokers)

    @property
    def waits(self) -> float:
        """Seconds until the next broker may be tried that may not be now; at most one."""
        return min([wait for route in self._routes if (wait := route.circuits.wait(EVERYTHING))], default=1.0)

    async def cancel(self) -> None:
        """End all that is under way, but do not wait long for a driver that does not let itself be cancelled."""
        if tasks := [task for route in self._routes for task in route.cancel()]:
            await asyncio.wait(tasks, timeout=1.0)

    async def abort(self) -> None:
        for route in self._routes:
            route.cancel()
        await asyncio.gather(*(route.abort() for route in self._routes))

    async def close(self, *, abort: bool) -> None:
        await asyncio.gather(*(close(route.transport, abort=abort) for route in self._routes))

    @property
    def name(self) -> str:
        """Of the messaging systems."""
        return ", ".join(sorted({route.transport.name for route in self.brokers}))

    def troubles(self) -> dict[str, dict[str, Any]]:
        """What is unavailable, for people and for `outbox status`: to reason and since when (epoch seconds). Named by
        topic, by route where there are several, and `EVERYTHING` where all of them are."""
        found: dict[str, dict[str, Any]] = {}
        for route in self._routes:
            for scope, state in route.circuits.state().items():
                found[route.name if scope == EVERYTHING and len(self._routes) > 1 else scope] = state
        if len(self._routes) > 1 and self.all_down:
            states = [found[route.name] for route in self.brokers]
            reason = "; ".join(f"{route.name}: {found[route.name]['reason']}" for route in self.brokers)
            return {EVERYTHING: {"reason": reason, "since": min(state["since"] for state in states)}}
        return found


def parse_routes(texts: Iterable[str]) -> dict[str, str]:
    """Pattern to URL, of texts ``pattern=URL``. Raises `ConfigurationError`, without the URL, which may hold a password."""
    found: dict[str, str] = {}
    for text in texts:
        pattern, _, url = text.partition("=")
        if not pattern or not url or ":" in pattern:
            raise ConfigurationError("a route is PATTERN=URL, for example 'audit.*=sqs://eu-central-1'")
        if pattern in found:
            raise ConfigurationError(f"the route {pattern!r} is given twice")
        found[pattern] = url
    return found
