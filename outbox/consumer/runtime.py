"""The consumer at work: fetch, handle side by side and in order, acknowledge; replays out of the database beside it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import Final

from outbox.backoff import Backoff
from outbox.consumer.attempts import Attempts
from outbox.consumer.effect import DatabaseTrouble
from outbox.consumer.incoming import Identify, Incoming, from_attempt, from_delivery
from outbox.consumer.lanes import Lane, Lanes
from outbox.consumer.processing import Database, Next, Processing, Wait
from outbox.consumer.state import State
from outbox.consumer.transactions import Transactions
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
        self._acks: list[Delivery] = []
        self._ack_now = asyncio.Event()
        self._acking = asyncio.Lock()

    async def run(self, stop: asyncio.Event, deadline: float) -> None:
        """Work until ``stop`` is set, then finish what is being handled, for ``deadline`` seconds at the most. Raises what
        makes going on pointless (`ConfigurationError` of the transport); a broker or database that is away does not."""
        workers = [asyncio.create_task(self._work(), name=f"outbox-{self.name}") for _ in range(self.concurrency)]
        sources = [asyncio.create_task(self._receive()), asyncio.create_task(self._replay())]
        acker = asyncio.create_task(self._acknowledge())
        stopping = asyncio.create_task(stop.wait())
        tasks = [*workers, *sources, acker]
        try:
            done, _ = await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                await task  # raises what ended it
            await _cancel(sources)
            await self._finish(lambda incoming: True, deadline)
        finally:
            await _cancel([stopping, *tasks])
            self.state.subscribed.clear()
            await self._leave()
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
            log.warning("the last %d messages could not be acknowledged and will come again: %s", len(self._acks), error)
        await subscription.close()

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
                while True:
                    await self._fetch(self._subscription)
                    tries, self.state.broker = 0, None
            except Unavailable as error:
                tries += 1
                if tries == 1:
                    log.error("the broker is unavailable, trying again: %s", error)
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
        waiting = await self._failed_before([i for i in self._loading if i.delivery is not None and i.delivery.suspect])
        loaded, self._loading = self._loading, []
        for incoming in loaded:
            # its partition may have gone while the database was asked
            if not incoming.given_up:
                self.lanes.put(incoming, waiting.get(incoming, 0.0))

    async def _failed_before(self, suspects: list[Incoming]) -> dict[Incoming, float]:
        """What the previous owner has seen fail: its attempts count on, and its back-off goes on (seconds by message)."""
        if not suspects:
            return {}
        ids = {incoming.message.id for incoming in suspects}
        known = await self.database.patiently(lambda connection: self.attempts.known(connection, ids))
        found = {}
        for incoming in suspects:
            if (waiting := known.get(incoming.message.id)) is not None:
                incoming.failures = waiting.attempts
                found[incoming] = waiting.seconds
        return found

    async def _revoked(self, places: frozenset[tuple[str, int]]) -> None:
        """These partitions go to another member: drop what has not begun, finish what has, acknowledge that. Handlers that
        take longer than `LET_GO` go on without us; the inbox keeps their effect from happening twice."""
        for incoming in self._loading:
            if incoming.place in places:
                incoming.given_up = True
        await self._finish(lambda incoming: incoming.place in places, LET_GO)
        await self._flush()

    # ------------------------------------------------------------ from the database

    async def _replay(self) -> None:
        """Take dead letters that were handed back; they need no broker."""
        held = asyncio.get_running_loop().time()
        while True:
            await self.database.up()
            try:
                if self._replays and asyncio.get_running_loop().time() - held > REPLAY_LEASE / 3:
                    held = asyncio.get_running_loop().time()
                    ids = [incoming.message.id for incoming in self._replays]
                    await self.transactions.run(lambda c: self.attempts.keep_replays(c, ids, REPLAY_LEASE))
                room = self.concurrency - len(self._replays)
                if room > 0:
                    await self._take_replays(room)
            except DatabaseTrouble as trouble:
                self.database.failed(trouble)
            await asyncio.sleep(REPLAY_POLL)
