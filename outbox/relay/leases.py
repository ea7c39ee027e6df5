"""Who sends what: bucket leases with an epoch, shared evenly between the relays that are alive.

Rows with a heartbeat, no session advisory locks: those leak behind PgBouncer. Expiry is by the database's clock; the
owner's own deadline is counted from **before** the renewal is sent, on a clock that goes on while the machine sleeps.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from outbox._message import BUCKETS, new_id
from outbox._version import __version__
from outbox.errors import LeaseLost
from outbox.store import Store
from outbox.tables import Tables, clock

MARGIN = 0.1  # of the lease time: publishing stops that much before the lease can be someone else's


def boottime() -> float:
    """Seconds on a clock that no one sets and that goes on in suspend."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def owner_name() -> str:
    """A name that no other relay ever had: it is written into leases, and read by people in `outbox status`."""
    return f"{socket.gethostname()[:80]}:{os.getpid()}:{new_id().hex[-8:]}"


@dataclass
class Leases:
    """The buckets this relay owns. ``ttl``: lease time in seconds."""

    store: Store
    ttl: float
    owner: str = field(default_factory=owner_name)
    epochs: dict[int, int] = field(default_factory=dict)
    """Bucket to epoch, of those owned. A change of epoch means that someone else had it in between."""
    surplus: frozenset[int] = frozenset()
    """Owned, to be handed over to relays that have fewer, once nothing of them is in flight."""
    fair: int = BUCKETS
    """What each relay that is alive has at least, once they share evenly."""
    _deadline: float = 0.0

    @property
    def valid(self) -> bool:
        """Whether no other relay can own our buckets yet."""
        return boottime() < self._deadline

    @property
    def left(self) -> float:
        """Seconds for which `valid` will hold."""
        return max(0.0, self._deadline - boottime())

    async def renew(self, state: dict[str, Any] | None = None, *, take: bool = True) -> None:
        """Heartbeat: renew what is ours, take what is free up to our share, find what is too much. Raises
        `StoreUnavailable`; the deadline then stays as it was."""
        sent = boottime()
        tables, owner, ttl = self.store.tables, self.owner, self.ttl
        text = json.dumps(state) if state else None
        epochs, alive = await self.store.run(lambda c: _renew(c, tables, owner, ttl, text, take))
        share = -(-BUCKETS // alive)
        self._deadline = sent + ttl * (1 - MARGIN)
        self.epochs, self.fair = epochs, BUCKETS // alive
        self.surplus = frozenset(sorted(epochs)[share:]) if len(epochs) > share else frozenset()

    async def release(self, buckets: Collection[int] | None = None, *, leave: bool = False) -> None:
        """Hand over at once (None: everything), nothing of them being in flight. ``leave``: this relay is gone."""
        gone = set(self.epochs) if buckets is None else set(buckets)
        tables, owner = self.store.tables, self.owner

        def work(connection: sa.Connection) -> None:
            lease, relay = tables.lease, tables.relay
            free = sa.update(lease).where(lease.c.owner == owner).values(owner=None, expires_at=None)
            # everything includes what a renewal took whose outcome we never learned
            connection.execute(free if buckets is None else free.where(lease.c.bucket.in_(gone)))
            if leave:
                connection.execute(sa.delete(relay).where(relay.c.owner == owner))

        self.epochs = {b: e for b, e in self.epochs.items() if b not in gone}
        self.surplus = frozenset()
        await self.store.run(work)

    def fence(self, connection: sa.Connection, buckets: Collection[int]) -> None:
        """First statement of every transaction that parks, releases or dead-letters: lock our lease rows and check the
        epoch. Raises `LeaseLost`. (A mere EXISTS would race with a taker.)"""
        lease = self.store.tables.lease
        for bucket in sorted(set(buckets)):
            epoch = self.epochs.get(bucket)
            held = connection.execute(
                sa.update(lease)
                .where(lease.c.bucket == bucket, lease.c.owner == self.owner, lease.c.epoch == epoch)
                .values(owner=self.owner)
            )
            if held.rowcount != 1:
                raise LeaseLost(f"bucket {bucket} is another relay's now")


def _renew(
    connection: sa.Connection, tables: Tables, owner: str, ttl: float, state: str | None, take: bool
) -> tuple[dict[int, int], int]:
    lease, relay = tables.lease, tables.relay
    beat = sa.update(relay).where(relay.c.owner == owner).values(heartbeat_at=clock(), state=state)
    if connection.execute(beat).rowcount == 0:
        connection.execute(
            sa.insert(relay).values(owner=owner, host=socket.gethostname()[:255], version=__version__, state=state)
        )
    # locked by bucket, as `fence` does: an UPDATE alone takes the rows as they lie, and two such orders can deadlock
    connection.execute(
        sa.select(lease.c.bucket).where(lease.c.owner == owner).order_by(lease.c.bucket).with_for_update()
    )
    connection.execute(sa.update(lease).where(lease.c.owner == owner).values(expires_at=clock(ttl)))
    connection.execute(sa.delete(relay).where(relay.c.heartbeat_at < clock(-10 * ttl), relay.c.owner != owner))
    beating = sa.select(sa.func.count()).select_from(relay).where(relay.c.heartbeat_at >= clock(-ttl))
    alive = max(1, connection.scalar(beating) or 1)
    share = -(-BUCKETS // alive)
    mine = _owned(connection, tables, owner)
    if take and len(mine) < share:
        free = sa.or_(lease.c.owner.is_(None), lease.c.expires_at < clock())
        # skip what another relay is taking in this moment; SQLite has one writer and no such clause
        wanted = connection.scalars(
            sa.select(lease.c.bucket)
            .where(free)
            .order_by(lease.c.bucket)
            .limit(share - len(mine))
            .with_for_update(skip_locked=True)
        ).all()
        if wanted:
            connection.execute(
                sa.update(lease)
                .where(lease.c.bucket.in_(wanted), free)
                .values(owner=owner, epoch=lease.c.epoch + 1, expires_at=clock(ttl))
            )
            mine = _owned(connection, tables, owner)
    return mine, alive


def _owned(connection: sa.Connection, tables: Tables, owner: str) -> dict[int, int]:
    lease = tables.lease
    query = sa.select(lease.c.bucket, lease.c.epoch).where(lease.c.owner == owner).order_by(lease.c.bucket)
    rows = connection.execute(query)
    return {bucket: epoch for bucket, epoch in rows}  # noqa: C416  # dict() of rows: SQLAlchemy 2.0 and 2.1 type them differently
