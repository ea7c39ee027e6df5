"""What is over is removed beside the flow: a batch, then a pause nine times as long, so that sending hardly notices.

The relay that owns bucket 0 does it, so one does at a time; while a lease changes hands two may, which costs nothing: neither
waits for a row that the other holds. Between two sweeps, a row of ``checkpoint`` says when the last one ended.
"""

from __future__ import annotations

import logging
import time
from typing import Final

import sqlalchemy as sa

from outbox.backoff import Backoff
from outbox.cleanup._cleanup import record
from outbox.cleanup.retention import Retention
from outbox.cleanup.sweep import Sweep
from outbox.dialects import clock
from outbox.errors import ConfigurationError, StoreUnavailable
from outbox.observe.cleanup import RECORD
from outbox.relay.leases import Leases
from outbox.store import Store

log = logging.getLogger("outbox.relay")

FIRST: Final = 5.0  # seconds after the start before anything is removed
EVERY: Final = 300.0  # seconds between two sweeps
AGAIN: Final = Backoff(first=0.5, factor=4.0, most=EVERY)
OTHERS: Final = 10.0  # seconds until it is asked again whether it is this relay's turn


class Cleaning:
    """One relay's part in it. Called again and again; keeps its place in a sweep from one call to the next."""

    def __init__(self, store: Store, leases: Leases, retention: Retention) -> None:
        self._store, self._leases, self._retention = store, leases, retention
        self._sweep: Sweep | None = None
        self._looked = False
        self._failures = 0
        self._told = ""
        self._noted: list[str] = []

    async def step(self) -> float:
        """Remove one batch, if there is one to be removed now; returns how many seconds to pause. Where it failed nothing of
        the batch has happened, and the same one comes next, after longer and longer pauses: this can wait."""
        if not self._retention.removes:
            return EVERY
        if not self._looked:  # a relay that has just started has better things to do
            self._looked = True
            return FIRST
        if 0 not in self._leases.epochs:
            self._sweep = None
            return OTHERS
        begins = self._sweep is None
        try:
            pause = await self._begin() if begins else await self._continue()
        except (ConfigurationError, StoreUnavailable) as error:  # a clock that has jumped, a role that may not delete
            self._failures += 1
            if self._failures > 2:
                self._sweep = None  # what it was about may not be there any more: an inbox put into partitions, or back
            if self._failures > 1 and str(error) != self._told:  # once: a deadlock that was lost is nobody's business
                self._told = str(error)
                log.error("cannot remove what is over, and tries again from time to time: %s", error)
            return AGAIN.delay(self._failures)
        if not begins:
            self._failures = 0
        return pause

    async def _begin(self) -> float:
        tables = self._store.tables
        sweep = Sweep(tables, self._retention)

        def look(connection: sa.Connection) -> bool:
            checkpoint = tables.checkpoint
            lately = sa.select(checkpoint.c.name).where(
                checkpoint.c.name == RECORD, checkpoint.c.updated_at.between(clock(-EVERY), clock())
            )
            if connection.execute(lately).first() is not None:
                return False
            sweep.begin(connection)
            return True

        if not await self._store.run(look):
            return OTHERS
        self._sweep = sweep
        return 0.0

    async def _continue(self) -> float:
        sweep = self._sweep
        assert sweep is not None
        began = time.monotonic()
        batch = await self._store.run(sweep.batch)
        pause = sweep.done(batch, time.monotonic() - began)
        if not batch.last:
            return pause
        await self._store.run(lambda connection: record(connection, self._store.tables, sweep))
        self._sweep = None
        if sweep.notes and sweep.notes != self._noted:
            self._noted = sweep.notes
            log.warning("cleanup: %s", "; ".join(self._noted))
        if sweep.removed:
            log.info("removed what was over: %s", ", ".join(f"{n:,} of {name}" for name, n in sweep.removed.items()))
        return EVERY
