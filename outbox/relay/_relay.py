"""`Relay`: leases, flow and what is due, kept going until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from outbox._outbox import Outbox
from outbox.cleanup.retention import Retention
from outbox.errors import ConfigurationError, OutboxError, StoreUnavailable, Unavailable
from outbox.observe.schema import check_schema
from outbox.relay.cleaning import Cleaning
from outbox.relay.flow import Counts, Flow, Limits
from outbox.relay.leases import Leases, holders
from outbox.relay.parking import Due, due
from outbox.relay.routes import ALL, Routes, parse_routes
from outbox.relay.schedule import move_due
from outbox.relay.troubles import Troubles
from outbox.store import Store
from outbox.stores import open_store
from outbox.stores.engine import from_environment
from outbox.transport import Transport
from outbox.transports import open_transport

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

log = logging.getLogger("outbox.relay")

DUE = 0.5  # seconds between two looks at scheduled and parked messages
SCHEDULED_AT_ONCE = 1000
PATIENCE = 6.0  # seconds that a start or a drain waits for a database that is away, since someone waits for its end
GOODBYE = 5.0  # seconds for giving the leases back


@dataclass(frozen=True, slots=True)
class Drained:
    """What `Relay.drain` did, in messages."""

    sent: int
    parked: int
    dead: int


class Relay:
    """Sends what is in the outbox to a broker, in order per (topic, key), and removes what the broker acknowledged.

    ``database``: URL, `sqlalchemy.URL`, `Engine` or `AsyncEngine`; None takes it from ``OUTBOX_DATABASE``.
    ``transport``: URL or `Transport` (which is the relay's from then on: it closes it); None takes it from
    ``OUTBOX_TRANSPORT``. ``routes``: several of them, by pattern of topics: ``{"audit.*": "sqs://…", "*": "kafka://…"}``.
    A topic goes by its own name, else by the first pattern that fits (``*``, ``?``, ``[…]``), where ``"*"`` is the last;
    ``transport`` says the same as ``"*"``; None takes them from ``OUTBOX_ROUTES``, ``pattern=URL`` each, between them white
    space. An outage of one broker does not hold up the others.

    ``lease``: seconds after which a dead relay's share is taken over. ``drain_timeout``: seconds that a stop may take before
    what is in flight is left to be sent again. Other limits: `Limits`. ``retention``: how long inbox rows and other things
    that are over are kept (`outbox.cleanup.Retention`); one of the relays removes what is older in the background. None takes
    it from ``OUTBOX_RETENTION_…``; `Retention.forever` removes nothing.

    Several relays on one outbox share the buckets evenly. A message is removed only after the broker's acknowledgement:
    a crash in between sends it again under the same id. While the broker is away nothing is lost and no attempt is spent.
    """

    def __init__(
        self,
        outbox: Outbox,
        *,
        database: str | sa.URL | sa.Engine | AsyncEngine | None = None,
        transport: str | Transport | None = None,
        routes: Mapping[str, str | Transport] | None = None,
        lease: float = 10.0,
        drain_timeout: float = 25.0,
        limits: Limits | None = None,
        retention: Retention | None = None,
    ) -> None:
        if lease < 0.5:
            raise ConfigurationError(f"lease={lease}: at least 0.5 seconds, or a busy moment would lose it")
        self.outbox = outbox
        self.limits = limits or Limits()
        self.retention = retention or Retention.from_environment()
        self.retention.require(
            self.limits.attempts * self.limits.backoff.most + lease, "a message's retries by the relay"
        )
        self._lease, self._drain_timeout = lease, drain_timeout
        self._database, self._transport, self._routes = database, transport, dict(routes or {})
        self._flow: Flow | None = None
        self._stop: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self._looked = False  # at what is due, since the start
        self._waits = False  # for its first buckets, and has said so
        self.started = asyncio.Event()
        """Set once this relay owns buckets and the broker has been reached."""

    @property
    def counts(self) -> Counts:
        """Messages sent, parked and given up since the start."""
        return self._flow.counts if self._flow is not None else Counts()

    @property
    def error(self) -> BaseException | None:
        """What ended the relay that runs beside an application (``async with relay``); None while it runs."""
        task = self._task
        return task.exception() if task is not None and task.done() and not task.cancelled() else None

    # ------------------------------------------------------------ ways to run

    def run(self) -> None:
        """Run until SIGTERM or SIGINT, then drain: finish what is in flight, hand over the leases, return. A second
        signal stops at once. Waits for a database or a broker that is away. Raises `ConfigurationError` and
        `SchemaMismatch` at the start only."""
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
        """Send what is there now and return the counts; for cron and one-off jobs. Raises `Unavailable` if the broker, or
        one of the topics, goes away meanwhile, `StoreUnavailable` if the database cannot be read or written for some
        seconds: what was not sent is still there, what was sent and could not be removed is sent again."""
        return asyncio.run(self.adrain())

    async def adrain(self) -> Drained:
        """`drain`, for an event loop that is running already."""
        stop = asyncio.Event()
        store, routes = await self._open(patience=PATIENCE)
        running = asyncio.create_task(self._run(store, routes, stop, clean=False))
        try:
            while not running.done():
                flow = self._flow
                if flow is not None and ((self._looked and flow.at_rest) or flow.routes.all_down):
                    if troubles := flow.routes.troubles():
                        broken = "; ".join(str(trouble["reason"]) for trouble in troubles.values())
                        raise Unavailable(f"stopped draining, the rest is still in the outbox: {broken}")
                    break
                if flow is not None and (error := flow.troubles.lasting(PATIENCE)) is not None:
                    raise error
                await asyncio.wait([running], timeout=0.02)
        finally:
            stop.set()
            await running
        counts = self.counts
        return Drained(counts.sent, counts.parked, counts.dead)

    async def __aenter__(self) -> Self:
        """Run beside an application. Does not fail because a broker is away; `SchemaMismatch`, `ConfigurationError` and,
        after some seconds, `StoreUnavailable` are raised. A relay that dies later is logged and never cancels the
        application."""
        store, routes = await self._open(patience=PATIENCE)
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._run(store, routes, self._stop), name="outbox-relay")
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
        opening = asyncio.create_task(self._open())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([opening, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                return
            store, routes = opening.result()
        finally:
            for task in (opening, stopping):
                task.cancel()
            await asyncio.gather(opening, stopping, return_exceptions=True)
        await self._run(store, routes, stop)

    # ------------------------------------------------------------ the work

    async def _open(self, patience: float | None = None) -> tuple[Store, Routes]:
        """The store, with its tables checked, and the transports, not connected yet. Waits for a database that is away, up
        to ``patience`` seconds (None: for ever). Raises `SchemaMismatch`, `ConfigurationError` and `StoreUnavailable`."""
        self.started.clear()
        self._flow, self._looked, self._waits = None, False, False
        routes = self._open_routes()
        store = open_store(self._database, self.outbox.tables)
        began, pause, troubles = asyncio.get_running_loop().time(), 0.1, Troubles()
        try:
            while True:
                try:
                    await store.run(lambda connection: check_schema(connection, self.outbox.tables))
                    return store, routes
                except StoreUnavailable as error:
                    if patience is not None and asyncio.get_running_loop().time() - began > patience:
                        raise
                    troubles.fails("open", error)
                    if troubles.is_news("open"):
                        log.error("waiting for the database: %s", error)
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, 10.0)
        except BaseException:
            await store.close()
            raise

    def _open_routes(self) -> Routes:
        given: dict[str, str | Transport] = {**self._routes}
        if not given:
            given |= parse_routes((from_environment("OUTBOX_ROUTES") or "").split())
        transport = self._transport
        if transport is None and ALL not in given:
            transport = from_environment("OUTBOX_TRANSPORT")
        if transport is not None:
            if ALL in given:
                raise ConfigurationError("transport=… and routes={'*': …} are both given: leave one of them out")
            given[ALL] = transport
        for pattern in given:
            if not isinstance(pattern, str) or not pattern:
                raise ConfigurationError(f"routes: a pattern of topics is a text such as 'audit.*', not {pattern!r}")
        if not given:
            raise ConfigurationError(
                "no transport given: pass transport=… (a URL or a Transport) or --transport, or set OUTBOX_TRANSPORT "
                "or OUTBOX_TRANSPORT_FILE; several by pattern of topics: routes={…} or --route"
            )
        return Routes({pattern: partial(open_transport, each) for pattern, each in given.items()})

    async def _run(self, store: Store, routes: Routes, stop: asyncio.Event, *, clean: bool = True) -> None:
        flow = self._flow = Flow(store, routes, Leases(store, self._lease), self.limits, self.started)
        # a stop of its own for the flow, so that the leases are renewed until the last message is settled
        finishing = asyncio.Event()
        work: dict[str, Callable[[], Awaitable[float]]] = {
            "lease": lambda: self._beat(flow, stop),
            "due": lambda: self._look_for_due(flow),
            "watch": lambda: self._watch(flow),
        }
        beside = [asyncio.create_task(self._again(flow, what, each)) for what, each in work.items()]
        cleaning = Cleaning(store, flow.leases, self.retention if clean else Retention.forever())
        removing = asyncio.create_task(self._again(flow, "cleanup", cleaning.step))
        flowing = asyncio.create_task(flow.run(finishing))
        stopping = asyncio.create_task(stop.wait())
        clean = False
        try:
            await asyncio.wait([flowing, stopping], return_when=asyncio.FIRST_COMPLETED)
            finishing.set()
            removing.cancel()  # at once: it is not what a stop waits for
            await asyncio.wait([flowing], timeout=self._drain_timeout)
            clean = flowing.done() and flowing.exception() is None
            if not flowing.done():
                log.error("stopped after %.0f s with messages in flight: they will be sent again", self._drain_timeout)
            else:
                flowing.result()
        finally:
            for task in (*beside, removing, flowing, stopping):
                task.cancel()
            await asyncio.gather(*beside, removing, flowing, stopping, return_exceptions=True)
            await routes.close(abort=not clean)
            with contextlib.suppress(StoreUnavailable, TimeoutError):  # then the leases expire by themselves
                await asyncio.wait_for(flow.leases.release(leave=True), GOODBYE)
            await store.close()

    async def _again(self, flow: Flow, what: str, work: Callable[[], Awaitable[float]]) -> None:
        """Call ``work`` again and again; it returns how many seconds to pause. Whatever it raises is logged, and it is
        called again: a relay does not die of what the next moment may mend, and one that cannot renew its leases sends
        nothing."""
        while True:
            try:
                pause = await work()
                flow.troubles.works(what)
            except Exception as error:
                pause = min(0.1 * 2 ** min(flow.troubles.fails(what, error), 10), 2.0, self._lease / 4)
                if flow.troubles.is_news(what):
                    foreseen = isinstance(error, OutboxError)
                    log.error(
                        "the relay has a problem, and tries again: %s", error, exc_info=None if foreseen else error
                    )
            await asyncio.sleep(pause)

    async def _beat(self, flow: Flow, stop: asyncio.Event) -> float:
        """Renew the leases every third of their time, more often while our share is not complete, and hand over what is
        too much as soon as nothing of it is in flight."""
        leases, before = flow.leases, flow.leases.epochs
        if await leases.renew(_state(flow), take=not stop.is_set()):
            flow.forget("some buckets went to another relay")
        if leases.epochs.keys() - before.keys():
            log.info("owns %d of 64 buckets as %s", len(leases.epochs), leases.owner)
            flow.wake()
        if not leases.epochs and not self._waits and not stop.is_set():
            self._waits = True
            log.info(
                "owns no bucket yet, and takes its share when they are handed over or their leases run out: held by %s",
                await flow.store.run(lambda connection: holders(connection, flow.store.tables)),
            )
        hungry = len(leases.epochs) < leases.fair and not stop.is_set()
        until = asyncio.get_running_loop().time() + (min(0.5, self._lease / 3) if hungry else self._lease / 3)
        while (left := until - asyncio.get_running_loop().time()) > 0 and leases.valid:
            if leases.surplus and not flow.in_flight_of(leases.surplus):
                log.info("hands over %d buckets", len(leases.surplus))
                await leases.release(leases.surplus)
            await asyncio.sleep(min(left, 0.02 if leases.surplus else left))
        return 0.0

    async def _look_for_due(self, flow: Flow) -> float:
        """Move and try what is due, in one transaction."""
        tables = flow.store.tables
        buckets, left_out, limit = flow.retrying.wanted()

        def look(connection: sa.Connection) -> tuple[int, list[Due]]:
            heads = due(connection, tables, buckets, left_out, limit) if buckets else []
            return move_due(connection, tables, SCHEDULED_AT_ONCE), heads

        moved, heads = await flow.store.run(look)
        flow.retrying.try_due(heads)
        if moved:
            flow.idle.clear()
            flow.wake()
        elif buckets:
            self._looked = True
        return 0.0 if moved == SCHEDULED_AT_ONCE else DUE

    async def _watch(self, flow: Flow) -> float:
        """Let go of everything once the leases have run out, however the renewal hangs."""
        leases = flow.leases
        if leases.epochs and not leases.valid:
            log.error("the leases ran out before they could be renewed; sending stops until they are")
            leases.epochs = {}
            await flow.abort()
        return max(0.01, min(leases.left, self._lease / 6))


def _state(flow: Flow) -> dict[str, Any]:
    """What `outbox status` shows of this relay from another process."""
    return {"transport": flow.routes.name, "circuits": flow.routes.troubles(), "sent": flow.counts.sent}


def _log_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("the relay in this process has died; messages wait in the outbox: %s", error, exc_info=error)
