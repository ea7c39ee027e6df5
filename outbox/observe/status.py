"""What is waiting, how old it is, who sends it, and in one sentence why nothing is being sent."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import asdict, dataclass, field, replace
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
    """The state of one outbox, read in one transaction. Counts are messages, ages are seconds.

    ``oldest``: age of the oldest message that should have been sent by now: pending, parked, or scheduled and overdue.
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
    verdict: str = ""

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
    firsts = [connection.scalar(sa.select(sa.func.min(table.c.created_at))) for table in (message, parked)]
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
    buckets = {owner: (number, expires) for owner, number, expires in owners}
    relays = []
    for row in connection.execute(sa.select(tables.relay).order_by(tables.relay.c.started_at)):
        number, expires = buckets.pop(row.owner, (0, None))
        beat = max(0.0, ago(row.heartbeat_at))
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
        lease_until=None if until is None else -ago(until),
    )
    return replace(found, verdict=explain(found))


def explain(s: Status) -> str:
    """One sentence: why messages wait, or that none do."""
    alive = [relay for relay in s.relays if relay.alive]
    down = [relay.circuits["*"] for relay in alive if "*" in relay.circuits]
    if down:
        first = min(down, key=lambda circuit: circuit["since"])
        since = dt.datetime.fromtimestamp(first["since"], dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        reason = first["reason"]
        return f"The broker is unavailable since {since} ({reason}); nothing is lost, sending goes on when it is back."
    overdue = s.next_due is not None and s.next_due <= 0
    if not alive and (s.pending or s.parked or overdue):
        if s.lease_until is not None and s.lease_until > 0:
            return (
                f"The relay that held the leases is gone; they run out in {s.lease_until:.0f} s, then another relay takes "
                "over."
            )
        return "No relay is running: start one with `outbox relay`."
    if s.pending:
        parked = f"; {_parked(s)}" if s.parked else ""
        return f"{_pending(s, alive)}{parked}."
    if s.parked:
        return f"{_parked(s)}; all others are sent."
    if s.scheduled:
        unattended = "" if alive else ", but no relay is running"
        return (
            f"All {s.scheduled} messages that are left are scheduled for later, the first in {max(0, s.next_due or 0):.0f} s"
            f"{unattended}."
        )
    if s.dead_letters:
        return f"Nothing waits to be sent; {s.dead_letters} dead letters are open: see `outbox dlq groups`."
    return "Nothing waits to be sent."


def _pending(s: Status, alive: list[RelayStatus]) -> str:
    topics = sorted({topic for relay in alive for topic in relay.circuits})
    if topics:
        reason = next(relay.circuits[topics[0]]["reason"] for relay in alive if topics[0] in relay.circuits)
        return f"Messages for {', '.join(topics)} wait, since that topic is unavailable ({reason}); others are sent"
    if s.free_buckets:
        return f"{s.free_buckets} of {BUCKETS} buckets have no relay at the moment; they are taken within a lease time"
    if s.oldest is not None and s.oldest > 60 and not s.parked:
        return f"Messages are being sent, and {s.pending} wait, the oldest for {s.oldest:.0f} s"
    return f"Messages are being sent; {s.pending} wait"


def _parked(s: Status) -> str:
    what = f"{s.parked} messages of {s.parked_keys} keys are parked"
    return f"{what} after a failure and will be tried again ({s.parked_error})"
