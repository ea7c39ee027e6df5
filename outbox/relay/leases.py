"""Who sends what: bucket leases with an epoch, shared evenly between the relays that are alive.

Rows with a heartbeat, no session advisory locks: those leak behind PgBouncer. Expiry is by the database's clock; the
owner's own deadline is counted from **before** the renewal is sent, on a clock that goes on while the machine sleeps.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import socket
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import sqlalchemy as sa

from outbox._message import BUCKETS, new_id
from outbox._version import __version__
from outbox.dialects import MYSQL, UtcDateTime, clock
from outbox.errors import LeaseLost
from outbox.store import Store
from outbox.tables import Tables

T = TypeVar("T")

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
    # Relays whose heartbeat is in the future, since the database's clock was set back: with it, and since when we know it.
    _ahead: dict[str, tuple[dt.datetime, float]] = field(default_factory=dict, repr=False)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    @property
    def valid(self) -> bool:
        """Whether no other relay can own our buckets yet."""
        return boottime() < self._deadline

    @property
    def left(self) -> float:
        """Seconds for which `valid` will hold."""
        return max(0.0, self._deadline - boottime())

    async def renew(self, state: dict[str, Any] | None = None, *, take: bool = True) -> bool:
        """Heartbeat: renew what is ours, take what is free up to our share, find what is too much. Returns whether any
        that was ours was another's meanwhile. Raises `StoreUnavailable`; the deadline then stays as it was."""
        async with self._turn:
            return await self._renew(state, take)

    async def _renew(self, state: dict[str, Any] | None, take: bool) -> bool:
        sent, before = boottime(), self.epochs
        tables, owner, ttl = self.store.tables, self.owner, self.ttl
        text = json.dumps(state) if state else None
        stopped = {other: beat for other, (beat, since) in self._ahead.items() if sent - since > ttl}
        epochs, alive, ahead = await self.store.run(lambda c: _renew(c, tables, owner, ttl, text, take, stopped))
        known = self._ahead
        self._ahead = {o: known[o] if o in known and known[o][0] == beat else (beat, sent) for o, beat in ahead.items()}
        share = -(-BUCKETS // alive)
        self._deadline = sent + ttl * (1 - MARGIN)
        self.epochs, self.fair = epochs, BUCKETS // alive
        self.surplus = frozenset(sorted(epochs)[share:]) if len(epochs) > share else frozenset()
        return any(epochs.get(bucket) != epoch for bucket, epoch in before.items())

    async def begin(self, buckets: Collection[int], read: Callable[[sa.Connection], T]) -> T:
        """Begin a new epoch of these buckets of ours and ``read`` in the same transaction: what it reads cannot be changed
        by an older transaction of our own whose outcome was never learned. One that holds its lease rows is waited for,
        one that does not yet is refused. Raises `LeaseLost` and `StoreUnavailable`."""
        async with self._turn:
            tables, fence = self.store.tables, self.fence
            lease, held = tables.lease, {bucket: self.epochs[bucket] for bucket in buckets if bucket in self.epochs}

            def work(connection: sa.Connection) -> T:
                fence(connection, held)
                connection.execute(
                    sa.update(lease).where(lease.c.bucket.in_(list(held))).values(epoch=lease.c.epoch + 1)
                )
                return read(connection)

            found = await self.store.run(work)
            begun = {bucket: epoch + 1 for bucket, epoch in held.items()}
            self.epochs = {bucket: begun.get(bucket, epoch) for bucket, epoch in self.epochs.items()}
            return found

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

    @property
    def fence(self) -> Callable[[sa.Connection, Collection[int]], None]:
        """First statement of every transaction that parks, releases or dead-letters: lock our lease rows and check the
        epochs, as they are now and not when the transaction comes to it. It raises `LeaseLost`. (A mere EXISTS would race
        with a taker.)"""
        lease, owner, epochs = self.store.tables.lease, self.owner, self.epochs

        def fence(connection: sa.Connection, buckets: Collection[int]) -> None:
            for bucket in sorted(set(buckets)):
                ours = sa.and_(lease.c.bucket == bucket, lease.c.owner == owner, lease.c.epoch == epochs.get(bucket))
                if connection.dialect.name in MYSQL:
                    # an UPDATE to the same touches no row there, unless the client asked for CLIENT_FOUND_ROWS
                    locked = connection.execute(sa.select(lease.c.bucket).where(ours).with_for_update()).all()
                    held = len(locked)
                else:
                    held = connection.execute(sa.update(lease).where(ours).values(owner=owner)).rowcount
                if held != 1:
                    raise LeaseLost(f"bucket {bucket} is another relay's now")

        return fence


def _renew(
    connection: sa.Connection,
    tables: Tables,
    owner: str,
    ttl: float,
    state: str | None,
    take: bool,
    stopped: Mapping[str, dt.datetime],
) -> tuple[dict[int, int], int, dict[str, dt.datetime]]:
    """``stopped``: relays whose heartbeat, in the future, has been the same for longer than a lease, on our own clock: they
    are dead, and their leases would last as long as the clock was set back. Returns what is owned, how many relays are alive,
    and those whose heartbeat is in the future."""
    lease, relay = tables.lease, tables.relay
    beat = sa.update(relay).where(relay.c.owner == owner).values(heartbeat_at=clock(), state=state)
    if connection.execute(beat).rowcount == 0:
        connection.execute(
            sa.insert(relay).values(owner=owner, host=socket.gethostname()[:255], version=__version__, state=state)
        )
    # Locked by bucket, as `fence` does: an UPDATE alone takes rows as they lie, and two such orders can deadlock. In InnoDB
    # they lie by bucket, and a locking SELECT waits for every row that it looks at: for another relay that parks.
    ours = lease.c.owner == owner
    if connection.dialect.name not in MYSQL:
        connection.execute(sa.select(lease.c.bucket).where(ours).order_by(lease.c.bucket).with_for_update())
    connection.execute(sa.update(lease).where(ours).values(expires_at=clock(ttl)))
    beating, silent = relay.c.heartbeat_at >= clock(-ttl), relay.c.heartbeat_at < clock(-10 * ttl)
    early = relay.c.heartbeat_at > clock(ttl)
    columns = (relay.c.owner, relay.c.heartbeat_at, beating, silent, early)
    others = connection.execute(sa.select(*columns).where(relay.c.owner != owner)).all()
    ahead = {other: beat for other, beat, _, _, is_early in others if is_early}
    dead = sorted(other for other, beat in ahead.items() if stopped.get(other) == beat)
    for other in sorted([*dead, *(other for other, _, _, is_silent, _ in others if is_silent)]):  # by name: see above
        connection.execute(sa.delete(relay).where(relay.c.owner == other, sa.or_(silent, early)))
    alive = 1 + sum(beats and other not in dead for other, _, beats, _, _ in others)
    share = -(-BUCKETS // alive)
    mine = _owned(connection, tables, owner)
    if take and len(mine) < share:
        free = sa.or_(
            lease.c.owner.is_(None), lease.c.expires_at < clock(), *([lease.c.owner.in_(dead)] if dead else [])
        )
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
    return mine, alive, ahead


def holders(connection: sa.Connection, tables: Tables) -> str:
    """For people: who holds the buckets, and for how many seconds at most."""
    lease = tables.lease
    now = connection.scalar(sa.select(sa.type_coerce(clock(), UtcDateTime())))
    assert now is not None
    rows = connection.execute(
        sa.select(lease.c.owner, sa.func.count(), sa.func.max(lease.c.expires_at))
        .where(lease.c.owner.is_not(None))
        .group_by(lease.c.owner)
        .order_by(lease.c.owner)
    )
    held = [f"{owner} ({count} for {max(0.0, (ends - now).total_seconds()):.0f} s)" for owner, count, ends in rows]
    return ", ".join(held) or "nobody"


def _owned(connection: sa.Connection, tables: Tables, owner: str) -> dict[int, int]:
    lease = tables.lease
    query = sa.select(lease.c.bucket, lease.c.epoch).where(lease.c.owner == owner).order_by(lease.c.bucket)
    rows = connection.execute(query)
    return {bucket: epoch for bucket, epoch in rows}  # noqa: C416  # dict() of rows: SQLAlchemy 2.0 and 2.1 type them differently
