"""`Relay`: leases, flow and what is due, kept going until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from outbox._outbox import Outbox
from outbox.errors import ConfigurationError, StoreUnavailable, Unavailable
from outbox.observe.schema import check_schema
from outbox.relay.circuit import EVERYTHING
from outbox.relay.flow import Counts, Flow, Limits
from outbox.relay.leases import Leases
from outbox.relay.schedule import move_due
from outbox.store import Store
from outbox.stores import open_store
from outbox.transport import Transport
from outbox.transports import open_transport

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

log = logging.getLogger("outbox.relay")

DUE = 0.25  # seconds between two looks at scheduled and parked messages
SCHEDULED_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Drained:
    """What `Relay.drain` did, in messages."""

    sent: int
    parked: int
    dead: int


class Relay:
    """Sends what is in the outbox to a broker, in order per (topic, key), and removes what the broker acknowledged.

    ``database``: URL, `sqlalchemy.URL`, `Engine` or `AsyncEngine`; None takes it from ``OUTBOX_DATABASE``.
    ``transport``: URL or `Transport`; None takes it from ``OUTBOX_TRANSPORT``. ``lease``: seconds after which a dead
    relay's share is taken over. ``drain_timeout``: seconds that a stop may take before what is in flight is left to be
    sent again. Other limits: `Limits`.

    Several relays on one outbox share the buckets evenly. A message is removed only after the broker's acknowledgement:
    a crash in between sends it again under the same id. While the broker is away nothing is lost and no attempt is spent.
    """

    def __init__(
        self,
        outbox: Outbox,
        *,
        database: str | sa.URL | sa.Engine | AsyncEngine | None = None,
        transport: str | Transport | None = None,
        lease: float = 10.0,
        drain_timeout: float = 25.0,
        limits: Limits | None = None,
    ) -> None:
        if lease < 0.5:
            raise ConfigurationError(f"lease={lease}: at least 0.5 seconds, or a busy moment would lose it")
        self.outbox = outbox
        self.limits = limits or Limits()
        self._lease, self._drain_timeout = lease, drain_timeout
        self._database, self._transport = database, transport
        self._flow: Flow | None = None
        self._stop: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self.started = asyncio.Event()
        """Set once this relay owns buckets and the broker has been reached."""

    @property
    def counts(self) -> Counts:
        """Messages sent, parked and given up since the start."""
        return self._flow.counts if self._flow is not None else Counts()

    # ------------------------------------------------------------ ways to run

    def run(self) -> None:
        """Run until SIGTERM or SIGINT, then drain: finish what is in flight, hand over the leases, return. A second
        signal stops at once. Raises `ConfigurationError` and `SchemaMismatch` at the start only."""
        asyncio.run(self._run_until_signalled())

    async def _run_until_signalled(self) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        main = asyncio.current_task()

        def on_signal() -> None:
            if stop.is_set() and main is not None:
                main.cancel()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        with contextlib.suppress(asyncio.CancelledError):
            await self.arun(stop)

    def drain(self) -> Drained:
        """Send what is there now and return the counts; for cron and one-off jobs. Raises `Unavailable` if the broker
        goes away meanwhile: what was not sent is still there."""
        return asyncio.run(self.adrain())

    async def adrain(self) -> Drained:
        """`drain`, for an event loop that is running already."""
        stop = asyncio.Event()
        running = asyncio.create_task(self.arun(stop))
        try:
            while not running.done():
                flow = self._flow
                if flow is not None and flow.idle.is_set():
                    break
                if flow is not None and EVERYTHING in flow.circuits:
                    reason = flow.circuits.state()[EVERYTHING]["reason"]
                    raise Unavailable(f"stopped draining, the rest is still in the outbox: {reason}")
                await asyncio.wait([running], timeout=0.02)
        finally:
            stop.set()
            await running
        counts = self.counts
        return Drained(counts.sent, counts.parked, counts.dead)

    async def __aenter__(self) -> Self:
        """Run beside an application. Does not fail because a broker is away; `SchemaMismatch` and `ConfigurationError`
        are raised. A relay that dies later is logged and never cancels the application."""
        store = await self._open()
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._run(store, self._stop), name="outbox-relay")
        self._task.add_done_callback(_log_death)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._stop is not None
        assert self._task is not None
        self._stop.set()
        with contextlib.suppress(Exception):  # logged when it happened
            await self._task

    async def arun(self, stop: asyncio.Event) -> None:
        """Run until ``stop`` is set; then drain."""
        await self._run(await self._open(), stop)

    # ------------------------------------------------------------ the work

    async def _open(self) -> Store:
        """The store, with its tables checked. Waits for a database that is away; raises `SchemaMismatch`."""
        store = open_store(self._database, self.outbox.tables)
        pause = 0.1
        while True:
            try:
                await store.run(lambda connection: check_schema(connection, self.outbox.tables))
                return store
            except StoreUnavailable as error:
                if self._task is None and pause > 5:
                    await store.close()
                    raise
                log.error("waiting for the database: %s", error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 10.0)
            except BaseException:
                await store.close()
                raise

    async def _run(self, store: Store, stop: asyncio.Event) -> None:
        transport = open_transport(self._transport)
        leases = Leases(store, self._lease)
        flow = self._flow = Flow(store, transport, leases, self.limits)
        # a flow of its own to stop, so that the leases are renewed until the last message is settled
        finishing = asyncio.Event()
        beating = asyncio.create_task(self._keep(flow, stop))
        flowing = asyncio.create_task(self._flow_when_owned(flow, finishing))
        stopping = asyncio.create_task(stop.wait())
        clean = False
        try:
            await asyncio.wait([beating, flowing, stopping], return_when=asyncio.FIRST_COMPLETED)
            finishing.set()
            flow.wake()
            done, _ = await asyncio.wait([flowing], timeout=self._drain_timeout if stop.is_set() else 1.0)
            clean = bool(done) and flowing.exception() is None
            if not clean and stop.is_set():
                log.error("stopped after %.0f s with messages in flight: they will be sent again", self._drain_timeout)
            for task in (beating, flowing):
                if task.done() and not task.cancelled():
                    task.result()
        finally:
            stopping.cancel()
            beating.cancel()
            flowing.cancel()
            await asyncio.gather(beating, flowing, stopping, return_exceptions=True)
            await transport.close(abort=not clean)
            with contextlib.suppress(StoreUnavailable):  # then the leases expire by themselves
                await leases.release(leave=True)
            await store.close()

    async def _flow_when_owned(self, flow: Flow, finishing: asyncio.Event) -> None:
        await self._connect(flow, finishing)
        await flow.run(finishing)

    async def _connect(self, flow: Flow, finishing: asyncio.Event) -> None:
        """Reach the broker, however long that takes. Raises `ConfigurationError`."""
        while not finishing.is_set():
            try:
                await flow.transport.connect()
            except Unavailable as error:
                if flow.circuits.failed(EVERYTHING, str(error)):
                    log.error("the broker is unavailable, trying again: %s", error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(finishing.wait(), max(0.05, flow.circuits.wait(EVERYTHING)))
            else:
                flow.circuits.succeeded(EVERYTHING)
                self.started.set()
                return

    async def _keep(self, flow: Flow, stop: asyncio.Event) -> None:
        """Renew leases every third of their time; move and retry what is due."""
        loop = asyncio.get_running_loop()
        beat = 0.0
        while True:
            try:
                if loop.time() >= beat:
                    beat = loop.time() + self._lease / 3
                    await self._beat(flow, take=not stop.is_set())
                elif flow.leases.surplus and not flow.in_flight_of(flow.leases.surplus):
                    await flow.leases.release(flow.leases.surplus)
                tables = flow.store.tables
                if await flow.store.run(lambda c: move_due(c, tables, SCHEDULED_AT_ONCE)):
                    flow.wake()
                await flow.retrying.try_due(flow.owned() if flow.leases.valid else [])
            except StoreUnavailable as error:
                log.error("cannot renew the leases: %s", error)
                beat = 0.0
                await asyncio.sleep(0.2)
            if not flow.leases.valid and flow.leases.epochs:
                # before another relay can own them: nothing that was handed over may be sent after that
                flow.forget("the leases ran out")
                flow.leases.epochs = {}
                await flow.transport.close(abort=True)
            await asyncio.sleep(min(DUE, self._lease / 6))

    async def _beat(self, flow: Flow, *, take: bool) -> None:
        before = dict(flow.leases.epochs)
        leases = flow.leases
        await leases.renew(_state(flow), take=take)
        lost = [bucket for bucket, epoch in before.items() if leases.epochs.get(bucket) != epoch]
        gained = [bucket for bucket, epoch in leases.epochs.items() if before.get(bucket) != epoch]
        if lost:
            flow.forget(f"{len(lost)} buckets went to another relay")
        if gained:
            await flow.retrying.load(gained)
            flow.store.rewind()
            flow.wake()
            log.info("owns %d of 64 buckets as %s", len(leases.epochs), leases.owner)


def _state(flow: Flow) -> dict[str, Any]:
    """What `outbox status` shows of this relay from another process."""
    return {"transport": flow.transport.name, "circuits": flow.circuits.state(), "sent": flow.counts.sent}


def _log_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("the relay in this process has died; messages wait in the outbox: %s", error, exc_info=error)
