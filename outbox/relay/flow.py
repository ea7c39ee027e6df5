"""From the table to the broker: read, publish, settle, side by side.

Messages of different keys are in flight together; messages of one key follow each other, in one pipeline where the
transport keeps order by itself, else the next after the previous is acknowledged. No database lock is held while the
broker is waited for. What is in memory dies with a database connection or a lease: it is read again, at worst sent twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from outbox._outgoing import Outgoing
from outbox.backoff import Backoff
from outbox.dead_letters.exception_text import stack_of
from outbox.errors import ConfigurationError, LeaseLost, StoreUnavailable
from outbox.relay.circuit import EVERYTHING, Circuits
from outbox.relay.lanes import Lanes
from outbox.relay.leases import Leases
from outbox.relay.parking import ParkedKey, key_of
from outbox.relay.publishing import close, publish
from outbox.relay.retrying import Retrying
from outbox.relay.troubles import Troubles
from outbox.store import Store
from outbox.transport import SENT, Outcome, Transport

log = logging.getLogger("outbox.relay")

PROBE = 16  # rows of one read while something is broken
CONNECT = 30.0  # seconds after which a broker that does not answer at all counts as away


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

    def __init__(
        self,
        store: Store,
        transport: Transport,
        leases: Leases,
        limits: Limits,
        started: asyncio.Event | None = None,
    ) -> None:
        self.store, self.transport, self.leases, self.limits = store, transport, leases, limits
        self.counts = Counts()
        self.circuits = Circuits()
        self.started = started or asyncio.Event()
        """Set once there was something to read from and someone to send to."""
        self.idle = asyncio.Event()
        """Set while the table was found empty, topics that are unavailable left aside, and nothing is in flight."""
        self.connected = False
        self.finishing = False
        self.generation = 0
        """Changes when all that is in memory is forgotten."""
        self._in_flight: dict[int, int] = {}  # position to bucket, of every row from its read until it is settled
        self._bytes = 0
        self._row_bytes = 4096.0  # guess of a row's size
        self._publishing: dict[asyncio.Task[None], None] = {}  # in the order of their beginning
        self._acked: list[Outgoing] = []
        self._quiet = False  # nothing new is handed over until all that was handed over has been answered
        # Key to first position, of what was dropped to be read again since it is quiet
        self._dropped: dict[ParkedKey, int] = {}
        self.troubles = Troubles()
        self._progress = asyncio.Event()
        self._to_settle = asyncio.Event()
        self._wake = asyncio.Event()
        self._lanes = Lanes()
        self.retrying = Retrying(self)

    # ------------------------------------------------------------ told by the relay

    def wake(self) -> None:
        """There may be something to read."""
        self._wake.set()

    def forget(self, why: str) -> None:
        """Forget all that is in memory: it will be read again. Answers that are under way are ignored."""
        if self._in_flight:
            log.warning("forgot %d messages in flight, to be read again: %s", len(self._in_flight), why)
        self.generation += 1
        self._in_flight.clear()
        self._lanes.clear()
        self._acked.clear()
        self._bytes = 0
        self._quiet = True
        self.idle.clear()
        self.retrying.forget()
        self.store.rewind()
        self._progress.set()

    async def abort(self, replace: Callable[[], Transport]) -> None:
        """Our buckets can be someone else's from now on: what was handed over must not be sent any more. Goes on with
        what ``replace`` returns; where that is the same transport, it stays open, since a closed one is so for good."""
        self.forget("the leases ran out")
        self.connected = False
        for task in list(self._publishing):
            task.cancel()
        old, self.transport = self.transport, replace()
        if old is not self.transport:
            await close(old, abort=True)
        await self.retrying.cancel()

    def in_flight_of(self, buckets: Collection[int]) -> bool:
        return self.retrying.busy(buckets) or any(bucket in buckets for bucket in self._in_flight.values())

    def owned(self) -> list[int]:
        """Buckets to read: ours, their parked keys being known, but for those that are about to be handed over."""
        surplus, loaded = self.leases.surplus, self.retrying.loaded
        return [b for b, epoch in self.leases.epochs.items() if b not in surplus and loaded.get(b) == epoch]

    @property
    def ready(self) -> bool:
        """Whether anything new may be sent now."""
        waits = self.circuits.wait(EVERYTHING) or self.troubles.resting()
        return self.connected and self.leases.valid and not waits and not self.finishing

    @property
    def at_rest(self) -> bool:
        """Whether there is nothing to send now."""
        return self.idle.is_set() and not self.retrying.trying

    def current(self, generation: int) -> bool:
        """Whether what was read in that generation may still be handed over."""
        return generation == self.generation and not self._quiet

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
                    pause = await self._step(pause, stopping)
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
            for task in (settling, stopping, *self._publishing):
                task.cancel()
            await asyncio.gather(settling, stopping, *self._publishing, return_exceptions=True)
            await self.retrying.cancel()

    async def _step(self, pause: float, stopping: asyncio.Task[Any]) -> float:
        """One read, or the reason why not; returns how long to pause after it."""
        if self._quiet:
            if self._publishing:
                await self.wait_for_progress()
                return 0.0
            self._quiet = False
            self._dropped.clear()
        wait = max(self.circuits.wait(EVERYTHING), self.troubles.resting())
        if wait:
            return wait
        if not self.connected:
            return await self._connect(stopping)
        if not self.leases.valid or not self.leases.epochs:
            return 0.05
        room = min(
            self.limits.window - len(self._in_flight),
            int((self.limits.window_bytes - self._bytes) / self._row_bytes) or (0 if self._in_flight else 1),
        )
        if room <= 0:
            await self.wait_for_progress()
            return 0.0
        left_out = self.circuits.topics_left_out()
        # while something is broken and may be tried again, few messages probe it
        limit = min(room, PROBE if len(left_out) < len(self.circuits) else self.limits.batch)
        generation = self.generation
        try:
            await self.retrying.load(self.leases.epochs)
            buckets = self.owned()
            if not buckets:
                return 0.05
            rows = await self.store.read(None if len(buckets) == 64 else buckets, self._in_flight, left_out, limit)
        except (StoreUnavailable, LeaseLost) as error:
            log.error("cannot read the outbox: %s", error)
            self.troubles.fails("read", error)
            self.forget("the database cannot be read")
            return max(0.1, min(2.0, pause * 2))
        self.troubles.works("read")
        self.started.set()
        if not self.current(generation) or buckets != self.owned():
            # while this was read, a row before it was dropped to be read again, or a bucket went to another relay
            self.store.rewind()
            return 0.0
        if not rows:
            if not self._in_flight and EVERYTHING not in self.circuits:
                self.idle.set()
            return min(max(pause * 2, 0.005), self.limits.poll)
        self.idle.clear()
        self._take(rows)
        rows = await self.retrying.hold_back(rows, generation)
        if self.current(generation):
            self._hand_over(rows)
        elif generation == self.generation:
            self.drop(rows)
            self.store.rewind()
        return 0.0

    async def _connect(self, stopping: asyncio.Task[Any]) -> float:
        """Reach the broker; returns how long to pause after it. Raises `ConfigurationError`."""
        connecting = asyncio.create_task(self.transport.connect())
        try:
            await asyncio.wait([connecting, stopping], timeout=CONNECT, return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done():
                raise TimeoutError(f"no answer within {CONNECT:.0f} s")
            connecting.result()
        except ConfigurationError:
            raise
        except Exception as error:
            if not stopping.done() and self.circuits.failed(EVERYTHING, str(error) or type(error).__name__):
                log.error("the broker is unavailable, trying again: %s", error)
            return max(0.05, self.circuits.wait(EVERYTHING))
        finally:
            connecting.cancel()
            await asyncio.wait([connecting], timeout=1.0)
        self.connected = True
        if self.circuits.succeeded(EVERYTHING):
            log.info("the broker is available again")
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

    def progress(self) -> None:
        self._progress.set()

    async def wait_for_progress(self) -> None:
        self._progress.clear()
        await self._progress.wait()

    async def _sleep(self, seconds: float) -> None:
        """Pause; `wake` ends it, also one that came after the last read had begun."""
        timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

    # ------------------------------------------------------------ publishing

    def _hand_over(self, rows: list[Outgoing]) -> None:
        """Start publishing, in order. Where the transport cannot keep a key in order by itself, its next message waits."""
        if not self.transport.capabilities.ordered_pipeline:
            rows = [row for row in rows if self._lanes.first_of_its_key(row)]
        if rows:
            self._spawn(self._publish(rows))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._publishing[task] = None
        task.add_done_callback(self._published)

    def _published(self, task: asyncio.Task[None]) -> None:
        self._publishing.pop(task, None)
        self._progress.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("publishing failed in an unforeseen way; what was in flight is read again:\n%s", stack_of(error))
            self.forget("an unforeseen error")
            self.troubles.rest("publish", error)

    async def publish(self, rows: Sequence[Outgoing], *, parked: bool = False) -> list[Outcome]:
        """One call of the transport, if the leases are still ours; its circuits follow the outcomes."""
        if not self.leases.valid:
            return [Outcome.unavailable("the leases ran out before they could be renewed")] * len(rows)
        return await publish(self.transport, rows, self.circuits, parked=parked)

    async def _publish(self, rows: list[Outgoing]) -> None:
        generation = self.generation
        outcomes = await self.publish(rows)
        if generation != self.generation:
            return
        if outcomes.count(SENT) == len(outcomes):
            self._sent(rows)
            self.troubles.works("publish")
            return
        by_kind: dict[str, list[Outgoing]] = {"sent": [], "retry": [], "reject": [], "unavailable": []}
        for row, outcome in zip(rows, outcomes, strict=True):
            by_kind[outcome.kind].append(row)
        self._sent(by_kind["sent"])
        self._read_again(by_kind["unavailable"])
        failed = [(row, o) for row, o in zip(rows, outcomes, strict=True) if o.kind in ("retry", "reject")]
        if failed:
            self.retrying.fails(by_kind["retry"], list(self._publishing))
            await self._failed(failed, generation)
        if generation == self.generation:
            self._publish_next(by_kind["reject"])
        self.troubles.works("publish")

    def _read_again(self, rows: Sequence[Outgoing]) -> None:
        """Not to be sent now. Nothing overtakes them: all that was handed over is answered before the next read."""
        if rows:
            rows = [*rows, *self._lanes.take_behind(rows)]
            for row in rows:
                if (key := key_of(row)) is not None:
                    self._dropped[key] = min(row.position, self._dropped.get(key, row.position))
            self._quiet = True
            self.drop(rows)
            self.store.rewind()

    async def _failed(self, failed: list[tuple[Outgoing, Outcome]], generation: int) -> None:
        if self.transport.capabilities.ordered_pipeline:
            # what was handed over before may hold a predecessor, which must be parked before its successor is
            me = asyncio.current_task()
            while (before := list(takewhile(lambda task: task is not me, self._publishing))) and me is not None:
                await asyncio.wait(before)
            if generation != self.generation:
                return
        # a predecessor that is read again comes first, so these are too
        again = {row.position for row, outcome in failed if outcome.kind == "retry" and self._follows_dropped(row)}
        self._read_again([row for row, _ in failed if row.position in again])
        failed = [(row, o) for row, o in failed if row.position not in again]
        waiting = self._lanes.take_behind([row for row, o in failed if o.kind == "retry"])
        rows = [*(row for row, _ in failed), *waiting]
        if rows:
            await self.guarded(self.retrying.failed(failed, waiting), rows, generation)

    def _follows_dropped(self, row: Outgoing) -> bool:
        key = key_of(row)
        return key is not None and self._dropped.get(key, row.position) < row.position

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

    def _sent(self, rows: Sequence[Outgoing]) -> None:
        if rows:
            self.counts.sent += len(rows)
            self._acked += rows
            self._to_settle.set()
            self._publish_next(rows)

    def _publish_next(self, rows: Sequence[Outgoing]) -> None:
        """These are done; what waited for them goes."""
        if following := self._lanes.next_after(rows):
            self._spawn(self._publish(following))

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
