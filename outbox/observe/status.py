"""What is waiting, how old it is, who sends it, what consumers have before them."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import sqlalchemy as sa

from outbox._message import BUCKETS
from outbox.dialects import UtcDateTime, clock
from outbox.observe.cleanup import CleanupStatus, cleanup
from outbox.observe.consumers import ConsumerStatus, consumers
from outbox.observe.explain import explain
from outbox.observe.transactions import Transactions, transactions
from outbox.tables import Tables

LEASE: Final = 10.0  # seconds; a relay's lease time, where no lease tells it

FIRST: Final = 1000  # rows among which the oldest is looked for

MISSED: Final = 0.5  # of the lease time: a relay renews every third of it, so that one of half has missed its turn


@dataclass(frozen=True, slots=True)
class RelayStatus:
    """One relay that has registered. ``heartbeat``: seconds since its last; ``alive``: it has renewed its leases when it was
    their time. ``lease``: its lease time in seconds; ``lease_left``: seconds until its share is free (negative: it is),
    at ``lease_ends``. None where it owns nothing."""

    owner: str
    version: str
    buckets: int
    heartbeat: float
    alive: bool
    lease: float | None = None
    lease_left: float | None = None
    lease_ends: dt.datetime | None = None
    circuits: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    """The state of one outbox, read in one transaction. Counts are messages, ages are seconds.

    ``oldest``: age of the oldest message that should have been sent by now: pending, parked, or scheduled and overdue.
    ``lease_until``: seconds until the last lease of relays that are not heard of any more runs out, at ``lease_ends``.
    """

    pending: int
    oldest: float | None
    scheduled: int
    next_due: float | None
    parked: int
    parked_keys: int
    parked_error: str | None
    dead_letters: int
    inbox: int
    relays: list[RelayStatus]
    free_buckets: int
    lease_until: float | None
    lease_ends: dt.datetime | None
    consumers: list[ConsumerStatus]
    verdict: str = ""
    transactions: Transactions | None = None
    cleanup: CleanupStatus | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def status(connection: sa.Connection, tables: Tables) -> Status:
    """Read the state of the outbox. Some statements of counts and minima; a backlog of a million takes about 0.1 s."""
    message, scheduled, parked, lease = tables.message, tables.scheduled, tables.parked, tables.lease
    now = connection.scalar(sa.select(sa.type_coerce(clock(), UtcDateTime())))
    assert now is not None

    def ago(moment: dt.datetime) -> float:
        seconds: float = (now - moment).total_seconds()
        return seconds

    def count(table: sa.Table, *where: sa.ColumnElement[bool]) -> int:
        return connection.scalar(sa.select(sa.func.count()).select_from(table).where(*where)) or 0

    due = connection.scalar(sa.select(sa.func.min(scheduled.c.deliver_at)))
    firsts = [connection.scalar(_first_created(table)) for table in (message, parked)]
    overdue = due if due is not None and due < now else None
    unsent = [max(0.0, ago(first)) for first in (*firsts, overdue) if first is not None]
    head = connection.execute(
        sa.select(parked.c.last_error).where(parked.c.role == "head").order_by(parked.c.position).limit(1)
    ).one_or_none()
    owners = connection.execute(
        sa.select(lease.c.owner, sa.func.count(), sa.func.max(lease.c.expires_at))
        .where(lease.c.owner.is_not(None))
        .group_by(lease.c.owner)
    ).all()
    relays, ownerless = _relays(connection, tables, now, {owner: (n, ends) for owner, n, ends in owners})
    silent = [relay.lease_ends for relay in relays if not relay.alive] + ownerless
    ends = max((moment for moment in silent if moment is not None), default=None)
    found = Status(
        pending=count(message),
        oldest=max(unsent, default=None),
        scheduled=count(scheduled),
        next_due=None if due is None else -ago(due),
        parked=count(parked),
        parked_keys=count(parked, parked.c.role == "head"),
        parked_error=head.last_error if head else None,
        dead_letters=count(tables.dead_letter, tables.dead_letter.c.state == "open"),
        inbox=count(tables.inbox),
        relays=relays,
        free_buckets=BUCKETS - sum(r.buckets for r in relays if r.alive),
        lease_until=None if ends is None else -ago(ends),
        lease_ends=ends,
        consumers=consumers(connection, tables, now),
        transactions=transactions(connection),
        cleanup=cleanup(connection, tables, now),
    )
    return replace(found, verdict=explain(found))


def _first_created(table: sa.Table) -> sa.Select[Any]:
    """When the oldest row came: of the first by position, which is the order in which rows come. To find it among all would
    be a look at the whole table, since no index has the time."""
    first = sa.select(table.c.created_at).order_by(table.c.position).limit(FIRST).subquery()
    return sa.select(sa.func.min(first.c.created_at))


def _relays(
    connection: sa.Connection,
    tables: Tables,
    now: dt.datetime,
    held: dict[str, tuple[int, dt.datetime]],
) -> tuple[list[RelayStatus], list[dt.datetime]]:
    """The relays that have registered, and when the leases of those that have not run out."""
    rows = connection.execute(sa.select(tables.relay).order_by(tables.relay.c.started_at)).all()
    # a renewal writes both in one transaction, so that what lies between them is the lease time
    times = {
        row.owner: max(0.5, (held[row.owner][1] - row.heartbeat_at).total_seconds())
        for row in rows
        if row.owner in held and held[row.owner][1] is not None
    }
    usual = max(times.values(), default=LEASE)
    found = []
    for row in rows:
        number, ends = held.pop(row.owner, (0, None))
        beat = max(0.0, (now - row.heartbeat_at).total_seconds())
        lease = times.get(row.owner)
        found.append(
            RelayStatus(
                row.owner,
                row.version,
                number,
                beat,
                alive=beat <= MISSED * (lease or usual),
                lease=lease,
                lease_left=None if ends is None else (ends - now).total_seconds(),
                lease_ends=ends,
                circuits=json.loads(row.state).get("circuits", {}) if row.state else {},
            )
        )
    return found, [ends for _, ends in held.values() if ends is not None]
