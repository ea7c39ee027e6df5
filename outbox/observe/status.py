"""What is waiting, how old it is, who sends it, and in one sentence why nothing is being sent."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import sqlalchemy as sa

from outbox._message import BUCKETS
from outbox.tables import Tables, UtcDateTime, clock


@dataclass(frozen=True, slots=True)
class RelayStatus:
    """One relay that has registered. ``heartbeat``: seconds since its last; ``alive``: it renews its leases in time."""

    owner: str
    version: str
    buckets: int
    heartbeat: float
    alive: bool
    circuits: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    """The state of one outbox, read in one transaction. Counts are messages, ages are seconds."""

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
    verdict: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def status(connection: sa.Connection, tables: Tables) -> Status:
    """Read the state of the outbox. Some statements of counts and minima; a backlog of a million takes about 0.1 s."""
    message, scheduled, parked, lease = tables.message, tables.scheduled, tables.parked, tables.lease
    now = connection.scalar(sa.select(sa.type_coerce(clock(), UtcDateTime())))
    assert now is not None

    def ago(moment: dt.datetime | None) -> float | None:
        return None if moment is None else (now - moment).total_seconds()

    def count(table: sa.Table, *where: sa.ColumnElement[bool]) -> int:
        return connection.scalar(sa.select(sa.func.count()).select_from(table).where(*where)) or 0

    oldest = connection.scalar(sa.select(sa.func.min(message.c.created_at)))
    due = connection.scalar(sa.select(sa.func.min(scheduled.c.deliver_at)))
    head = connection.execute(
        sa.select(parked.c.last_error).where(parked.c.role == "head").order_by(parked.c.position).limit(1)
    ).one_or_none()
    owners = connection.execute(
        sa.select(lease.c.owner, sa.func.count(), sa.func.max(lease.c.expires_at))
        .where(lease.c.owner.is_not(None))
        .group_by(lease.c.owner)
    ).all()
    buckets = {owner: (number, expires) for owner, number, expires in owners}
    relays = []
    for row in connection.execute(sa.select(tables.relay).order_by(tables.relay.c.started_at)):
        number, expires = buckets.pop(row.owner, (0, None))
        beat = ago(row.heartbeat_at) or 0.0
        alive = expires > now if expires is not None else beat < 30
        circuits = json.loads(row.state).get("circuits", {}) if row.state else {}
        relays.append(RelayStatus(row.owner, row.version, number, beat, alive, circuits))
    held_by_dead = [expires for _, expires in buckets.values()] + [
        lease_row.expires_at
        for lease_row in connection.execute(
            sa.select(lease.c.expires_at).where(lease.c.owner.in_([r.owner for r in relays if not r.alive]))
        )
    ]
    until = max((e for e in held_by_dead if e is not None), default=None)
    found = Status(
        pending=count(message),
        oldest=ago(oldest),
        scheduled=count(scheduled),
        next_due=None if due is None else -(ago(due) or 0.0),
        parked=count(parked),
        parked_keys=count(parked, parked.c.role == "head"),
        parked_error=head.last_error if head else None,
        dead_letters=count(tables.dead_letter, tables.dead_letter.c.state == "open"),
        inbox=count(tables.inbox),
        relays=relays,
        free_buckets=BUCKETS - sum(r.buckets for r in relays if r.alive),
        lease_until=None if until is None else -(ago(until) or 0.0),
    )
    return Status(**{**_fields(found), "verdict": explain(found)})


def _fields(found: Status) -> dict[str, Any]:
    return {name: getattr(found, name) for name in found.__dataclass_fields__}


def explain(s: Status) -> str:
    """One sentence: why messages wait, or that none do."""
    alive = [relay for relay in s.relays if relay.alive]
    open_everywhere = [c["*"] for relay in alive if (c := relay.circuits) and "*" in c]
    if open_everywhere:
        first = min(open_everywhere, key=lambda c: c["since"])
        since = dt.datetime.fromtimestamp(first["since"], dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"The broker is unavailable since {since} ({first['reason']}); nothing is lost, sending goes on when it is back."
    if s.pending:
        if not alive:
            if s.lease_until is not None and s.lease_until > 0:
                return f"The relay that held the leases is gone; they run out in {s.lease_until:.0f} s, then another relay takes over."
            return "No relay is running: start one with `outbox relay`."
        topics = sorted({topic for relay in alive for topic in relay.circuits if topic != "*"})
        if topics:
            reason = next(relay.circuits[topics[0]]["reason"] for relay in alive if topics[0] in relay.circuits)
            return f"Messages for {', '.join(topics)} wait, since that topic is unavailable ({reason}); others are sent."
        if s.free_buckets:
            return f"{s.free_buckets} of {BUCKETS} buckets have no relay at the moment; they are taken within a lease time."
        if s.oldest is not None and s.oldest > 60:
            return f"Messages are being sent, and {s.pending} wait, the oldest for {s.oldest:.0f} s."
        return f"Messages are being sent; {s.pending} wait."
    if s.parked:
        return (
            f"{s.parked} messages of {s.parked_keys} keys are parked after a failure and will be tried again "
            f"({s.parked_error}); all others are sent."
        )
    if s.scheduled:
        return f"All {s.scheduled} messages that are left are scheduled for later, the first in {max(0, s.next_due or 0):.0f} s."
    if s.dead_letters:
        return f"Nothing waits to be sent; {s.dead_letters} dead letters are open: see `outbox dlq groups`."
    return "Nothing waits to be sent."
