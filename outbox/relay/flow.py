"""From the table to the broker: read, publish, settle, side by side.

Messages of different keys are in flight together; messages of one key follow each other, in one pipeline where the
transport keeps order by itself, else the next after the previous is acknowledged. No database lock is held while the
broker is waited for. What is in memory dies with a database connection or a lease: it is read again, at worst sent twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from outbox._outgoing import Outgoing
from outbox.backoff import Backoff
from outbox.dead_letters.exception_text import stack_of
from outbox.errors import ConfigurationError, LeaseLost, StoreUnavailable
from outbox.relay.leases import Leases
from outbox.relay.publishing import publish
from outbox.relay.retrying import Retrying
from outbox.relay.routes import Route, Routes
from outbox.relay.troubles import Troubles
from outbox.store import Store
from outbox.transport import SENT, Outcome

log = logging.getLogger("outbox.relay")

PROBE = 16  # rows that are handed to a broker that was away, until one of them is sent


@dataclass(frozen=True, slots=True)
class Limits:
    """How much at once, how often, how long. Times in seconds."""

    batch: int = 2000
    """Rows of one read and one publish call."""
    window: int = 8000
    """Rows in memory, read and not settled yet: of each route so many."""
    window_bytes: int = 32 << 20
    """Payload bytes in memory, about: the size of the next rows is guessed from the last ones. Routes share it evenly."""
    poll: float = 0.1
    """The longest pause between two reads of an empty table; the shortest is 5 ms."""
    attempts: int = 8
    """How often a message is tried before it becomes a dead letter."""
    backoff: Backoff = field(default_factory=lambda: Backoff(first=0.5, factor=2.0, most=300.0))


@dataclass(slots=True)
class Counts:
    """What this relay has done since it was started, in messages."""

    sent: int = 0
    parked: int = 0
    dead: int = 0


class Flow:
    """One relay's stream of messages. `Relay` renews the leases and tells it what it owns."""

    def __init__(
        self,
        store: Store,
        routes: Routes,
        leases: Leases,
        limits: Limits,
        started: asyncio.Event | None = None,
    ) -> None:
        self.store, self.routes, self.leases, self.limits = store, routes, leases, limits
        self.counts = Counts()
        self.started = started or asyncio.Event()
        """Set once there was something to read from and someone to send to."""
        self.idle = asyncio.Event()
        """Set while the table was found empty, what is unavailable left aside, and nothing is in flight."""
        self.finishing = False
        self.generation = 0
        """Changes when all that is in memory is forgotten."""
        self._in_flight: dict[int, int] = {}  # position to bucket, of every row from its read until it is settled
        self._acked: list[Outgoing] = []
        self.troubles = Troubles()
        self._progress = asyncio.Event()
        self._to_settle = asyncio.Event()
        self._wake = asyncio.Event()
        self.retrying = Retrying(self)

    # ------------------------------------------------------------ told by the relay

    def wake(self) -> None:
        """There may be something to read."""
        self._wake.set()
        self._progress.set()

    def forget(self, why: str) -> None:
        """Forget all that is in memory: it will be read again. Answers that are under way are ignored."""
        if self._in_flight:
            log.warning("forgot %d messages in flight, to be read again: %s", len(self._in_flight), why)
        self.generation += 1
        self._in_flight.clear()
        self._acked.clear()
        for route in self.routes:
            route.forget()
        self.idle.clear()
        self.retrying.forget()
        self.store.rewind()
        self._progress.set()

    async def abort(self) -> None:
        """Our buckets can be someone else's from now on: what was handed over must not be sent any more."""
        self.forget("the leases ran out")
        await self.routes.abort()
        await self.retrying.cancel()

    def in_flight_of(self, buckets: Collection[int]) -> bool:
        return self.retrying.busy(buckets) or any(bucket in buckets for bucket in self._in_flight.values())

    def owned(self) -> list[int]:
        """Buckets to read: ours, their parked keys being known, but for those that are about to be handed over."""
        surplus, loaded = self.leases.surplus, self.retrying.loaded
        return [b for b, epoch in self.leases.epochs.items() if b not in surplus and loaded.get(b) == epoch]

    @property
    def ready(self) -> bool:
        """Whether anything may be sent now, by the routes that can be reached."""
        return self.leases.valid and not self.troubles.resting() and not self.finishing

    @property
    def at_rest(self) -> bool:
        """Whether there is nothing to send now."""
        return self.idle.is_set() and not self.retrying.trying

    def current(self, generation: int, route: Route) -> bool:
        """Whether what was read in that generation may still be handed over."""
        return generation == self.generation and not route.quiet

    # ------------------------------------------------------------ reading

    async def run(self, stop: asyncio.Event) -> None:
        """Read and hand over until ``stop``; then finish what is in flight. Never returns with a row half-done. Raises
        `ConfigurationError` where the broker can never be reached; nothing else ends it."""
        settling = asyncio.create_task(self._settle_until_cancelled())
        stopping = asyncio.create_task(stop.wait())
        stopping.add_done_callback(lambda _: self.wake())
        pause = 0.0
        try:
            while not stop.is_set():
                self._wake.clear()
                try:
                    pause = await self._step(pause)
                except ConfigurationError:
                    raise
                except Exception as error:
                    log.error("reading failed in an unforeseen way; it is tried again:\n%s", stack_of(error))
                    self.forget("an unforeseen error")
                    pause = min(max(pause * 2, 0.1), 5.0)
                if pause:
                    await self._sleep(pause)
            self.finishing = True
            while self._in_flight:
                await self.wait_for_progress()
            await self.retrying.finish()
        finally:
            for task in (settling, stopping):
                task.cancel()
            await asyncio.gather(settling, stopping, return_exceptions=True)
            await self.routes.cancel()
            await self.retrying.cancel()

    async def _step(self, pause: float) -> float:
        """One read, or the reason why not; returns how long to pause after it. Raises `ConfigurationError`."""
        if wait := self.troubles.resting():
            return wait
        for route in self.routes:
            route.calm()
            route.connect(self.wake)
        if not self.leases.valid or not self.leases.epochs:
            return 0.05
        reading, room = self._reading()
        if room <= 0:
            await self.wait_for_progress(self.routes.waits)
            return 0.0
        generation = self.generation
        try:
            await self.retrying.load(self.leases.epochs)
            buckets = self.owned()
            if not buckets:
                return 0.05
            rows = await self.store.read(
                None if len(buckets) == 64 else buckets, self._in_flight, self.routes.without(reading), room
            )
        except (StoreUnavailable, LeaseLost) as error:
            self.troubles.fails("read", error)
            if self.troubles.is_news("read"):
                log.error("cannot read the outbox: %s", error)
            self.forget("the database cannot be read")
            return max(0.1, min(2.0, pause * 2))
        self.troubles.works("read")
        self.started.set()
        if generation != self.generation or buckets != self.owned():
            # while this was read, a bucket went to another relay
            self.store.rewind()
            return 0.0
        if not rows:
            if not self._in_flight and not self.routes.all_down and all(r in reading or r.down for r in self.routes):
                self.idle.set()
            return min(max(pause * 2, 0.005), self.limits.poll)
        self.idle.clear()
        await self._hand_over(self._take(rows, reading), generation)
        return 0.0

    def _reading(self) -> tuple[list[Route], int]:
        """The routes to read for now, and how many rows; none where there is nothing to do but wait."""
        limits, reading, room = self.limits, [], self.limits.batch
        for route in self.routes:
            if route.open:
                left = route.room(limits.window, limits.window_bytes / len(self.routes))
                if len(self.routes) == 1 or not route.is_aside(left, limits.window):
                    reading.append(route)
                    room = min(room, left)
        if all(route.down for route in reading):
            room = min(room, PROBE)
        return reading, room if reading else 0

    def _take(self, rows: list[Outgoing], reading: Collection[Route]) -> list[tuple[Route, list[Outgoing]]]:
        """Of each route what may be handed over. The others are read again."""
        taken, left = [], len(rows)
        for route, mine in self.routes.split(rows):
            # while this was read, a row before it may have been dropped to be read again
            if route.quiet or route not in reading:
                continue
            if route.down:
                del mine[PROBE:]
            for row in mine:
                self._in_flight[row.position] = row.bucket
            route.take(mine)
            taken.append((route, mine))
            left -= len(mine)
        if left:
            self.store.rewind()
        return taken

    def drop(self, rows: Sequence[Outgoing]) -> None:
        """These are no longer in memory."""
        for route, mine in self.routes.split([*rows]):
            route.let_go([row for row in mine if self._in_flight.pop(row.position, None) is not None])
        self._progress.set()

    def progress(self) -> None:
        self._progress.set()

    async def wait_for_progress(self, most: float = 60.0) -> None:
        """Until something was answered, or it is to be read again, or after so many seconds."""
        self._progress.clear()
        await _wait(self._progress, most)

    async def _sleep(self, seconds: float) -> None:
        """Pause; `wake` ends it, also one that came after the last read had begun."""
        await _wait(self._wake, seconds)

    # ------------------------------------------------------------ publishing

    async def _hand_over(self, taken: Sequence[tuple[Route, list[Outgoing]]], generation: int) -> None:
        """Start publishing, in order, but for what waits behind a parked message."""
        for route, read in taken:
            rows = await self.retrying.hold_back(route, read, generation)
            if self.current(generation, route):
                self._begin(route, rows)
            elif generation == self.generation:
                self.drop(rows)
                self.store.rewind()

    def _begin(self, route: Route, rows: list[Outgoing]) -> None:
        """Where the transport cannot keep a key in order by itself, its next message waits."""
        if not route.transport.capabilities.ordered_pipeline:
            rows = [row for row in rows if route.lanes.first_of_its_key(row)]
        if rows:
            self._spawn(route, rows)

    def _spawn(self, route: Route, rows: list[Outgoing]) -> None:
        task = asyncio.create_task(self._publish(route, rows))
        route.begun(task)
        task.add_done_callback(self._published)

    def _published(self, task: asyncio.Task[None]) -> None:
        self._progress.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("publishing failed in an unforeseen way; what was in flight is read again:\n%s", stack_of(error))
            self.forget("an unforeseen error")
            self.troubles.rest("publish", error)

    async def publish(self, route: Route, rows: Sequence[Outgoing], *, parked: bool = False) -> list[Outcome]:
        """One call of the transport, if the leases are still ours; its circuits follow the outcomes."""
        if not self.leases.valid:
            return [Outcome.unavailable("the leases ran out before they could be renewed")] * len(rows)
        return await publish(route.transport, rows, route.circuits, parked=parked)

    async def _publish(self, route: Route, rows: list[Outgoing]) -> None:
        generation = self.generation
        outcomes = await self.publish(route, rows)
        if generation != self.generation:
            return
        if outcomes.count(SENT) == len(outcomes):
            self._sent(route, rows)
            self.troubles.works("publish")
            return
        by_kind: dict[str, list[Outgoing]] = {"sent": [], "retry": [], "reject": [], "unavailable": []}
        for row, outcome in zip(rows, outcomes, strict=True):
            by_kind[outcome.kind].append(row)
        self._sent(route, by_kind["sent"])
        self._read_again(route, by_kind["unavailable"])
        failed = [(row, o) for row, o in zip(rows, outcomes, strict=True) if o.kind in ("retry", "reject")]
        if failed:
            self.retrying.fails(by_kind["retry"], list(route.publishing))
            await self._failed(route, failed, generation)
        if generation == self.generation:
            self._publish_next(route, by_kind["reject"])
        self.troubles.works("publish")

    def _read_again(self, route: Route, rows: Sequence[Outgoing]) -> None:
        """Not to be sent now. Nothing overtakes them: all that was handed to this route is answered before the next read."""
        if rows:
            self.drop(route.read_again(rows))
            self.store.rewind()

    async def _failed(self, route: Route, failed: list[tuple[Outgoing, Outcome]], generation: int) -> None:
        if route.transport.capabilities.ordered_pipeline:
            # what was handed over before may hold a predecessor, which must be parked before its successor is
            me = asyncio.current_task()
            while (before := list(takewhile(lambda task: task is not me, route.publishing))) and me is not None:
                await asyncio.wait(before)
            if generation != self.generation:
                return
        # a predecessor that is read again comes first, so these are too
        again = {row.position for row, outcome in failed if outcome.kind == "retry" and route.follows_dropped(row)}
        self._read_again(route, [row for row, _ in failed if row.position in again])
        failed = [(row, o) for row, o in failed if row.position not in again]
        waiting = route.lanes.take_behind([row for row, o in failed if o.kind == "retry"])
        rows = [*(row for row, _ in failed), *waiting]
        if rows:
            await self.guarded(self.retrying.failed(failed, waiting), rows, generation)

    async def guarded(self, work: Awaitable[None], rows: Sequence[Outgoing], generation: int) -> None:
        """A transaction about these rows. If it fails they are forgotten and read again, by whoever owns them then."""
        try:
            await work
        except LeaseLost as error:
            log.warning("%s: its messages are left to the new owner", error)
            self.forget(str(error))
        except StoreUnavailable as error:
            log.error("cannot store the fate of %d messages, they are read again: %s", len(rows), error)
            self.forget("the database cannot be written")
            self.troubles.rest("park", error)
        else:
            self.troubles.works("park")
            if generation == self.generation:
                self.drop(rows)

    def _sent(self, route: Route, rows: Sequence[Outgoing]) -> None:
        if rows:
            self.counts.sent += len(rows)
            self._acked += rows
            self._to_settle.set()
            self._publish_next(route, rows)

    def _publish_next(self, route: Route, rows: Sequence[Outgoing]) -> None:
        """These are done; what waited for them goes."""
        if following := route.lanes.next_after(rows):
            self._spawn(route, following)

    # ------------------------------------------------------------ settling

    async def _settle_until_cancelled(self) -> None:
        while True:
            await self._to_settle.wait()
            self._to_settle.clear()
            while self._acked:
                rows, self._acked = self._acked, []
                generation = self.generation
                try:
                    await self.store.settle(rows)
                except Exception as error:
                    # never repeated: after a fail-over a position can be another message
                    unforeseen = None if isinstance(error, StoreUnavailable) else error
                    log.error(
                        "cannot settle %d messages, they will be sent again: %s", len(rows), error, exc_info=unforeseen
                    )
                    self.forget("the database cannot be written")
                    self.troubles.rest("settle", error)
                    continue
                self.troubles.works("settle")
                if generation == self.generation:
                    self.drop(rows)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Until it is set; it is, after so many seconds."""
    timer = asyncio.get_running_loop().call_later(seconds, event.set)
    try:
        await event.wait()
    finally:
        timer.cancel()
