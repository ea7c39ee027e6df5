"""From the table to the broker: read, publish, settle, side by side.

Messages of different keys are in flight together; messages of one key follow each other, in one pipeline where the
transport keeps order by itself, else the next after the previous is acknowledged. No database lock is held while the
broker is waited for. What is in memory dies with a database connection or a lease: it is read again, at worst sent twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from outbox._message import Outgoing
from outbox.backoff import Backoff
from outbox.errors import LeaseLost, StoreUnavailable
from outbox.relay.circuit import EVERYTHING, Circuits
from outbox.relay.leases import Leases
from outbox.relay.parking import ParkedKey
from outbox.relay.retrying import Retrying
from outbox.store import Store
from outbox.transport import SENT, Outcome, Transport

log = logging.getLogger("outbox.relay")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much at once, how often, how long. Times in seconds."""

    batch: int = 2000
    """Rows of one read and one publish call."""
    window: int = 8000
    """Rows in memory: read and not settled yet."""
    window_bytes: int = 32 << 20
    """Payload bytes in memory, about: the size of the next rows is guessed from the last ones."""
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

    def __init__(self, store: Store, transport: Transport, leases: Leases, limits: Limits) -> None:
        self.store, self.transport, self.leases, self.limits = store, transport, leases, limits
        self.counts = Counts()
        self.circuits = Circuits()
        self.idle = asyncio.Event()
        """Set while the table was found empty and nothing is in flight."""
        self._in_flight: dict[int, int] = {}  # position to bucket, of every row from its read until it is settled
        self._bytes = 0
        self._row_bytes = 4096.0  # guess of a row's size
        self._publishing: set[asyncio.Task[None]] = set()
        self._acked: list[Outgoing] = []
        self._generation = 0  # changes when all that is in memory is forgotten
        self._quiet = False  # nothing new is handed over until all that was handed over has been answered
        self._progress = asyncio.Event()
        self._to_settle = asyncio.Event()
        self._wake = asyncio.Event()
        self._lanes: dict[ParkedKey, deque[Outgoing]] = {}
        self.retrying = Retrying(self)

    # ------------------------------------------------------------ told by the relay

    def wake(self) -> None:
        """There may be something to read."""
        self._wake.set()

    def forget(self, why: str) -> None:
        """Forget all that is in memory: it will be read again. Answers that are under way are ignored."""
        if self._in_flight:
            log.warning("forgot %d messages in flight, to be read again: %s", len(self._in_flight), why)
        self._generation += 1
        self._in_flight.clear()
        self._lanes.clear()
        self._acked.clear()
        self._bytes = 0
        self._quiet = True
        self.store.rewind()
        self._progress.set()

    def in_flight_of(self, buckets: Collection[int]) -> bool:
        return bool(buckets) and any(bucket in buckets for bucket in self._in_flight.values())

    def owned(self) -> list[int]:
        """Buckets to read: ours, but for those that are about to be handed over."""
        return [bucket for bucket in self.leases.epochs if bucket not in self.leases.surplus]

    # ------------------------------------------------------------ reading

    async def run(self, stop: asyncio.Event) -> None:
        """Read and hand over until ``stop``; then finish what is in flight. Never returns with a row half-done."""
        settling = asyncio.create_task(self._settle_until_cancelled())
        pause = 0.0
        try:
            while not stop.is_set():
                pause = await self._step(pause)
                if pause:
                    await self._sleep(pause, stop)
            while self._in_flight:
                await self._wait_for_progress()
        finally:
            settling.cancel()
            for task in list(self._publishing):
                task.cancel()
            await asyncio.gather(settling, *self._publishing, return_exceptions=True)

    async def _step(self, pause: float) -> float:
        """One read, or the reason why not; returns how long to pause after it."""
        if self._quiet:
            if self._publishing:
                await self._wait_for_progress()
                return 0.0
            self._quiet = False
        if not self.leases.valid or not self.leases.epochs:
            return 0.05
        wait = self.circuits.wait(EVERYTHING)
        if wait:
            return wait
        room = min(
            self.limits.window - len(self._in_flight),
            int((self.limits.window_bytes - self._bytes) / self._row_bytes) or (0 if self._in_flight else 1),
        )
        if room <= 0:
            await self._wait_for_progress()
            return 0.0
        # while something is broken, few messages probe it
        limit = min(room, 16 if self.circuits else self.limits.batch)
        generation = self._generation
        buckets = self.owned()
        try:
            rows = await self.store.read(
                None if len(buckets) == 64 else buckets, self._in_flight, self.circuits.topics_left_out(), limit
            )
        except StoreUnavailable as error:
            log.error("cannot read the outbox: %s", error)
            self.forget("the database cannot be read")
            return max(0.1, min(2.0, pause * 2))
        if generation != self._generation:
            self.store.rewind()
            return 0.0
        if not rows:
            if not self._in_flight and not self.circuits:
                self.idle.set()
            return min(max(pause * 2, 0.005), self.limits.poll)
        self.idle.clear()
        self._take(rows)
        if self.retrying.keys:
            rows = await self.retrying.hold_back(rows, generation)
        if rows and generation == self._generation:
            self._hand_over(rows)
        return 0.0

    def _take(self, rows: Sequence[Outgoing]) -> None:
        size = 0
        for row in rows:
            self._in_flight[row.position] = row.bucket
            size += len(row.payload) if row.payload else 0
        self._bytes += size
        self._row_bytes = max(256.0, size / len(rows) + 200, self._row_bytes * 0.5)

    def drop(self, rows: Sequence[Outgoing]) -> None:
        """These are no longer in memory."""
        for row in rows:
            if self._in_flight.pop(row.position, None) is not None:
                self._bytes -= len(row.payload) if row.payload else 0
        self._progress.set()

    async def _wait_for_progress(self) -> None:
        self._progress.clear()
        await self._progress.wait()

    async def _sleep(self, seconds: float, stop: asyncio.Event) -> None:
        """Pause; `wake` and ``stop`` end it."""
        self._wake.clear()
        waiting = [asyncio.ensure_future(self._wake.wait()), asyncio.ensure_future(stop.wait())]
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()

    # ------------------------------------------------------------ publishing

    def _hand_over(self, rows: list[Outgoing]) -> None:
        """Start publishing, in order. Where the transport cannot keep a key in order by itself, its next message waits."""
        if not self.transport.capabilities.ordered_pipeline:
            rows = [row for row in rows if self._first_of_its_key(row)]
        if rows:
            self.spawn(self._publish(rows))

    def _first_of_its_key(self, row: Outgoing) -> bool:
        if row.key is None:
            return True
        lane = self._lanes.get((row.topic, row.key))
        if lane is None:
            self._lanes[(row.topic, row.key)] = deque()
            return True
        lane.append(row)
        return False

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._publishing.add(task)
        task.add_done_callback(self._published)

    def _published(self, task: asyncio.Task[None]) -> None:
        self._publishing.discard(task)
        self._progress.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("publishing failed in an unforeseen way; what was in flight is read again", exc_info=error)
            self.forget("an unforeseen error")
            self.circuits.failed(EVERYTHING, f"{type(error).__name__}: {error}")

    async def publish(self, rows: Sequence[Outgoing]) -> list[Outcome]:
        """One call of the transport, if the leases are still ours; its circuits follow the outcomes."""
        if not self.leases.valid:
            return [Outcome.unavailable("the leases ran out before they could be renewed")] * len(rows)
        outcomes = await self.transport.publish(rows)
        if outcomes.count(SENT) == len(outcomes):
            if self.circuits:
                self._works({row.topic for row in rows})
            return outcomes
        self._works({row.topic for row, o in zip(rows, outcomes, strict=True) if o.kind == "sent"})
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome.kind == "unavailable":
                scope = EVERYTHING if outcome.scope == "transport" else row.topic
                if self.circuits.failed(scope, outcome.reason):
                    what = "the broker" if scope == EVERYTHING else f"topic {scope!r}"
                    log.error("%s is unavailable, no attempt is spent: %s", what, outcome.reason)
        return outcomes

    def _works(self, topics: set[str]) -> None:
        for scope in (EVERYTHING, *topics) if topics else ():
            if self.circuits.succeeded(scope):
                what = "the broker" if scope == EVERYTHING else f"topic {scope!r}"
                log.info("%s is available again", what)

    async def _publish(self, rows: list[Outgoing]) -> None:
        generation = self._generation
        outcomes = await self.publish(rows)
        if generation != self._generation:
            return
        if outcomes.count(SENT) == len(outcomes):
            self._sent(rows)
            return
        by_kind: dict[str, list[Outgoing]] = {"sent": [], "retry": [], "reject": [], "unavailable": []}
        for row, outcome in zip(rows, outcomes, strict=True):
            by_kind[outcome.kind].append(row)
        if by_kind["sent"]:
            self._sent(by_kind["sent"])
        if by_kind["unavailable"]:
            # read again later; and nothing overtakes: all that was handed over is answered before the next read
            self.drop([*by_kind["unavailable"], *self._lanes_of(by_kind["unavailable"])])
            self._quiet = True
            self.store.rewind()
        failed = [(row, o) for row, o in zip(rows, outcomes, strict=True) if o.kind in ("retry", "reject")]
        if failed:
            waiting = self._lanes_of([row for row, o in failed if o.kind == "retry"])
            await self.guarded(
                self.retrying.failed(failed, waiting), [*(row for row, _ in failed), *waiting], generation
            )
            if generation == self._generation:
                self._next_in_lanes([row for row, o in failed if o.kind == "reject"])

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
        else:
            if generation == self._generation:
                self.drop(rows)

    def _sent(self, rows: Sequence[Outgoing]) -> None:
        self.counts.sent += len(rows)
        self._acked += rows
        self._to_settle.set()
        self._next_in_lanes(rows)

    def _next_in_lanes(self, rows: Sequence[Outgoing]) -> None:
        if not self._lanes:
            return
        following = []
        for row in rows:
            if row.key is not None and (lane := self._lanes.get((row.topic, row.key))) is not None:
                if lane:
                    following.append(lane.popleft())
                else:
                    del self._lanes[(row.topic, row.key)]
        if following:
            self.spawn(self._publish(following))

    def _lanes_of(self, rows: Sequence[Outgoing]) -> list[Outgoing]:
        """What waits in memory behind these, taken out of there."""
        waiting: list[Outgoing] = []
        for row in rows:
            if row.key is not None:
                waiting += self._lanes.pop((row.topic, row.key), ())
        return waiting

    # ------------------------------------------------------------ settling

    async def _settle_until_cancelled(self) -> None:
        while True:
            await self._to_settle.wait()
            self._to_settle.clear()
            while self._acked:
                rows, self._acked = self._acked, []
                generation = self._generation
                try:
                    await self.store.settle([row.position for row in rows])
                except StoreUnavailable as error:
                    # never repeated: after a fail-over a position can be another message
                    log.error("cannot settle %d messages, they will be sent again: %s", len(rows), error)
                    self.forget("the database cannot be written")
                    continue
                if generation == self._generation:
                    self.drop(rows)
