"""The consumer at work: fetch, handle side by side and in order, acknowledge; replays out of the database beside it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Final

from outbox.backoff import Backoff
from outbox.consumer.attempts import Attempts
from outbox.consumer.effect import DatabaseTrouble
from outbox.consumer.incoming import Identify, Incoming, from_attempt, from_delivery
from outbox.consumer.lanes import Lane, Lanes
from outbox.consumer.processing import Database, Next, Processing, Wait
from outbox.consumer.state import State
from outbox.consumer.transactions import Transactions
from outbox.dead_letters.exception_text import stack_of
from outbox.errors import TransportError, Unavailable
from outbox.transport import Delivery, Subscription, Transport

log = logging.getLogger("outbox.consumer")

FETCH: Final = 500  # deliveries (rows) of one fetch
FETCH_SECONDS: Final = 1.0
REPLAY_POLL: Final = 0.5  # seconds between two looks for replays
REPLAY_LEASE: Final = 60.0  # seconds after which another process takes the replays of a dead one
LET_GO: Final = 20.0  # seconds that handlers get when their partition goes to another member
BROKER: Final = Backoff(first=0.2, factor=2.0, most=10.0)
DEFECT: Final = Backoff(first=5.0, factor=2.0, most=300.0)


class Runtime:
    """One run of a consumer, from subscribing to the last acknowledgement. Used from one event loop."""

    def __init__(
        self,
        name: str,
        topics: tuple[str, ...],
        transport: Transport,
        transactions: Transactions,
        attempts: Attempts,
        processing: Processing,
        state: State,
        *,
        keep_order: bool,
        concurrency: int,
        window: int,
        member: str | None,
        identify: Identify | None,
    ) -> None:
        self.name, self.topics = name, topics
        self.transport, self.transactions = transport, transactions
        self.attempts, self.processing, self.state = attempts, processing, state
        self.database: Database = processing.database
        self.keep_order, self.concurrency, self.window = keep_order, concurrency, window
        self.member, self.identify = member, identify
        self.lanes = Lanes()
        self._subscription: Subscription | None = None
        self._loading: list[Incoming] = []
        self._replays: set[Incoming] = set()
        """Taken from the database and not finished."""
        self._replay_done = asyncio.Event()
        """The next one of its key may be due now."""
        self._acks: list[Delivery] = []
        self._ack_now = asyncio.Event()
        self._acking = asyncio.Lock()

    async def run(self, stop: asyncio.Event, deadline: float) -> None:
        """Work until ``stop`` is set, then finish what is being handled, for ``deadline`` seconds at the most. Raises what
        makes going on pointless (`ConfigurationError` of the transport); a broker or database that is away does not."""
        workers = [asyncio.create_task(self._work(), name=f"outbox-{self.name}") for _ in range(self.concurrency)]
        sources = [asyncio.create_task(self._receive()), asyncio.create_task(self._replay())]
        acker = asyncio.create_task(self._acknowledge())
        stopping = asyncio.create_task(_wait_for(stop))
        tasks = [*workers, *sources, acker]
        try:
            done, _ = await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                await task  # raises what ended it
            await _cancel(sources)
            await self._finish(lambda _: True, deadline)
            log.info("consumer %s stops: %s", self.name, self.state.counts.said())
        finally:
            await _cancel([stopping, *tasks])
            self.state.subscribed.clear()
            await self._leave()
            await self._release_replays()
            await self.database.close()

    async def _leave(self) -> None:
        """The last acknowledgements; then out of the group."""
        subscription, self._subscription = self._subscription, None
        if subscription is None:
            return
        try:
            if self._acks:
                await subscription.ack(self._acks)
        except TransportError as error:
            log.warning(
                "the last %d messages could not be acknowledged and will come again: %s", len(self._acks), error
            )
        await subscription.close()

    async def _release_replays(self) -> None:
        """Let another process have what was taken and not finished; without this it would wait for the lease."""
        ids = [incoming.message.id for incoming in self._replays]
        if ids:
            with contextlib.suppress(DatabaseTrouble, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self.transactions.run(lambda connection: self.attempts.release_replays(connection, ids))

    # ------------------------------------------------------------ from the broker

    async def _receive(self) -> None:
        tries = 0
        while True:
            try:
                if self._subscription is None:
                    await self.transport.connect()
                    self._subscription = await self.transport.subscribe(
                        self.topics, self.name, window=self.window, member=self.member, revoked=self._revoked
                    )
                    self.state.subscribed.set()
                    log.info("consumer %s reads %s from %s", self.name, ", ".join(self.topics), self.transport.name)
                while True:
                    await self._fetch(self._subscription)
                    tries, self.state.broker = 0, None
            except Unavailable as error:
                tries += 1
                if str(error) != self.state.broker:  # once for each reason, not for each try
                    log.error("consumer %s cannot read from the broker, and tries again: %s", self.name, error)
                self.state.broker = str(error)
                await asyncio.sleep(BROKER.delay(tries))

    async def _fetch(self, subscription: Subscription) -> None:
        while (room := self.window - self.lanes.count) <= 0:
            await self.lanes.changed()
        await self.database.up()  # what could not be handled need not be in memory
        deliveries = await subscription.fetch(min(room, FETCH), FETCH_SECONDS)
        if not deliveries:
            return
        self.state.counts.received += len(deliveries)
        self._loading = [from_delivery(d, identify=self.identify, keep_order=self.keep_order) for d in deliveries]
        await self._recall([i for i in self._loading if i.delivery is not None and i.delivery.suspect])
        loaded, self._loading = self._loading, []
        for incoming in loaded:
            # its partition may have gone while the database was asked
            if not incoming.given_up:
                self._put(incoming)

    async def _recall(self, suspects: list[Incoming]) -> None:
        """What the previous owner has seen fail: its back-off goes on, so that a restart is no attempt for free."""
        if not suspects:
            return
        ids = {incoming.message.id for incoming in suspects}
        known = await self.database.patiently(lambda connection: self.attempts.known(connection, ids))
        now = asyncio.get_running_loop().time()
        for incoming in suspects:
            if (waiting := known.get(incoming.message.id)) is not None:
                incoming.failures = waiting.attempts
                incoming.not_before = now + waiting.seconds

    async def _revoked(self, places: frozenset[tuple[str, int]]) -> None:
        """These partitions go to another member: drop what has not begun, finish what has, acknowledge that. Handlers that
        take longer than `LET_GO` go on without us; the inbox keeps their effect from happening twice."""
        for incoming in self._loading:
            if incoming.place in places:
                incoming.given_up = True
        await self._finish(lambda incoming: incoming.place in places, LET_GO)
        try:
            await self._flush()
        except TransportError as error:
            log.warning("messages of revoked partitions could not be acknowledged and will come again: %s", error)

    # ------------------------------------------------------------ from the database

    async def _replay(self) -> None:
        """Take dead letters that were handed back; they need no broker."""
        clock = asyncio.get_running_loop().time
        held = clock()
        while True:
            await self.database.up()
            try:
                if clock() - held > REPLAY_LEASE / 3:
                    held = clock()
                    await self._keep_replays()
                await self._take_replays()
            except DatabaseTrouble as trouble:
                self.database.failed(trouble)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPLAY_POLL):
                    await self._replay_done.wait()
            self._replay_done.clear()

    async def _keep_replays(self) -> None:
        ids = [incoming.message.id for incoming in self._replays]
        if ids:
            await self.transactions.run(lambda c: self.attempts.keep_replays(c, ids, REPLAY_LEASE))

    async def _take_replays(self) -> None:
        room = self.concurrency - len(self._replays)
        if room <= 0:
            return
        rows = await self.transactions.run(
            lambda c: self.attempts.take_replays(c, room, REPLAY_LEASE, keep_order=self.keep_order)
        )
        for row in rows:
            incoming = from_attempt(row, keep_order=self.keep_order)
            self.state.counts.replays += 1
            self._replays.add(incoming)
            self._put(incoming)

    # ------------------------------------------------------------ handling

    def _put(self, incoming: Incoming) -> None:
        self.lanes.put(incoming)
        self.state.in_memory = self.lanes.count

    async def _work(self) -> None:
        """One of ``concurrency`` workers: a message that waits for its next attempt occupies none."""
        while True:
            await self.database.up()
            lane = await self.lanes.take()
            if not self.database.is_up:
                self.lanes.again(lane)
                continue
            task = lane.items[0].task = asyncio.create_task(self._one(lane, lane.items[0]))
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                task.cancel()
                raise

    async def _one(self, lane: Lane, incoming: Incoming) -> None:
        try:
            outcome = await self.processing.process(incoming)
        except asyncio.CancelledError:
            self._let_go(lane, incoming)
            raise
        except Exception as error:
            # Not the handler's: nothing is lost, its key waits, the others go on. Without what SQL errors quote.
            message = incoming.message
            log.error("message %s of %s could not be processed:\n%s", message.id, message.topic, stack_of(error))
            incoming.defects += 1
            outcome = Wait(DEFECT.delay(incoming.defects))
        if outcome is Next.DONE:
            if incoming.delivery is not None:
                self._acks.append(incoming.delivery)
                self._ack_now.set()
            self._let_go(lane, incoming)
        elif incoming.given_up or (isinstance(outcome, Wait) and incoming.replay):
            self._let_go(lane, incoming)  # a replay comes back from the table when it is due
        elif isinstance(outcome, Wait):
            self.lanes.wait(lane, outcome.seconds)
        else:
            self.lanes.again(lane)

    def _let_go(self, lane: Lane, incoming: Incoming) -> None:
        if incoming.replay:
            self._replays.discard(incoming)
            self._replay_done.set()
        self.lanes.done(lane)
        self.state.in_memory = self.lanes.count

    async def _finish(self, unwanted: Callable[[Incoming], bool], seconds: float) -> None:
        """Drop what has not begun, wait for what has. After ``seconds`` async handlers are cancelled, which rolls them back;
        a thread cannot be."""
        running = self.lanes.drop(unwanted)
        self.state.in_memory = self.lanes.count
        tasks = []
        for incoming in running:
            incoming.given_up = True
            if incoming.task is not None:
                tasks.append(incoming.task)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=seconds)
        if late:
            log.error("%d handlers were still at work after %.0f s: their messages will come again", len(late), seconds)
            for task in late:
                task.cancel()
            await asyncio.wait(late, timeout=1.0)

    # ------------------------------------------------------------ acknowledging

    async def _acknowledge(self) -> None:
        tries = 0
        while True:
            await self._ack_now.wait()
            self._ack_now.clear()
            try:
                await self._flush()
                tries = 0
            except TransportError as error:
                tries += 1
                log.warning("messages could not be acknowledged, trying again: %s", error)
                await asyncio.sleep(BROKER.delay(tries))
                self._ack_now.set()

    async def _flush(self) -> None:
        async with self._acking:
            subscription, acks = self._subscription, self._acks
            if subscription is None or not acks:
                return
            self._acks = []
            try:
                await subscription.ack(acks)
            except BaseException:
                self._acks = acks + self._acks
                raise


async def _wait_for(event: asyncio.Event) -> None:
    await event.wait()


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
