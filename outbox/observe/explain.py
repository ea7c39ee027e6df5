"""The state of an outbox in one sentence: above all why nothing is being sent, and when it will go on."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from outbox._message import BUCKETS
from outbox.observe.consumers import sentences
from outbox.observe.transactions import OLD
from outbox.observe.words import at, duration, listed, some, word

if TYPE_CHECKING:
    from outbox.observe.status import RelayStatus, Status


def explain(s: Status) -> str:
    """Why messages wait, or that none do; then what consumers try again."""
    said = "; ".join([_relays(s), *sentences(s.consumers), *_transactions(s)])
    return said if said.endswith("?") else f"{said}."


def _transactions(s: Status) -> list[str]:
    found = s.transactions
    if found is None or found.oldest is None or found.oldest < OLD:
        return []
    return [
        f"a transaction has been open for {duration(found.oldest)} ({found.who}): what is deleted cannot be cleaned away "
        "until it ends, and reading slows down"
    ]


def _relays(s: Status) -> str:
    alive = [relay for relay in s.relays if relay.alive]
    down = [relay.circuits["*"] for relay in alive if "*" in relay.circuits]
    if down:
        first = min(down, key=lambda circuit: circuit["since"])
        since = at(dt.datetime.fromtimestamp(first["since"], dt.UTC))
        reason = first["reason"]
        return f"The broker is unavailable since {since} ({reason}); nothing is lost, sending goes on when it is back"
    overdue = s.next_due is not None and s.next_due <= 0
    waits = bool(s.pending or s.parked or overdue)
    if waits and not alive:
        return _nobody(s)
    if waits and (silent := [r for r in s.relays if not r.alive and r.buckets]):
        return _partly(s, alive, silent)
    if s.pending:
        parked = f"; {_parked(s)}" if s.parked else ""
        return f"{_pending(s, alive)}{parked}"
    if s.parked:
        return f"{_parked(s)}; all others are sent"
    if s.scheduled:
        return _scheduled(s, alive)
    text = "Nothing waits to be sent"
    if s.dead_letters:
        text += (
            f"; {some(s.dead_letters, 'dead letter')} {word(s.dead_letters, 'is', 'are')} open: see `outbox dlq groups`"
        )
    if s.relays and not alive:
        text += f"; {_silence(_last(s))} and no other one is running"
    return text


def _nobody(s: Status) -> str:
    """Things wait and no relay is alive."""
    if s.lease_until is not None and s.lease_until > 0 and s.lease_ends is not None:
        who = (
            f"{_silence(_last(s))}, and its leases" if s.relays else "the relay that held the leases is gone, and they"
        )
        return (
            f"Nothing is being sent: {who} run out in {s.lease_until:.0f} s, at {at(s.lease_ends)}; then a relay that runs "
            "goes on, and none does: start one with `outbox relay`"
        )
    last = f" (the last one, {_silence(_last(s), '')})" if s.relays else ""
    return f"No relay is running: start one with `outbox relay`{last}"


def _partly(s: Status, alive: list[RelayStatus], silent: list[RelayStatus]) -> str:
    """Things wait, and some of the buckets are a relay's that is not heard of."""
    held = sum(relay.buckets for relay in silent)
    first = silent[0]
    takers = listed([relay.owner for relay in alive])
    take = word(len(alive), "takes", "take")
    if first.lease_left is not None and first.lease_left > 0 and first.lease_ends is not None:
        when = f"{take} them over in {first.lease_left:.0f} s, at {at(first.lease_ends)}"
    else:
        when = f"{take} them over now"
    more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
    others = "; the others are sent" if held < BUCKETS else ""
    return f"Messages of {held} of {BUCKETS} buckets wait: {_silence(first)}{more}, and {takers} {when}{others}"


def _last(s: Status) -> RelayStatus:
    return min(s.relays, key=lambda relay: (relay.buckets == 0, relay.heartbeat))


def _silence(relay: RelayStatus, killed: str = " (killed?)") -> str:
    name = f"relay {relay.owner}" if killed else f"{relay.owner},"
    return f"{name} has been silent for {duration(relay.heartbeat)}{killed}"


def _pending(s: Status, alive: list[RelayStatus]) -> str:
    topics = sorted({topic for relay in alive for topic in relay.circuits})
    if topics:
        reason = next(relay.circuits[topics[0]]["reason"] for relay in alive if topics[0] in relay.circuits)
        are = word(len(topics), "it is", "they are")
        return f"Messages for {', '.join(topics)} wait, since {are} unavailable ({reason}); others are sent"
    if s.free_buckets:
        return f"{s.free_buckets} of {BUCKETS} buckets have no relay at the moment; they are taken within a lease time"
    wait = f"{s.pending:,} {word(s.pending, 'waits', 'wait')}"
    if s.oldest is not None and s.oldest > 60 and not s.parked:
        return f"Messages are being sent, and {wait}, the oldest for {s.oldest:.0f} s"
    return f"Messages are being sent; {wait}"


def _parked(s: Status) -> str:
    what = f"{some(s.parked, 'message')} of {some(s.parked_keys, 'key')} {word(s.parked, 'is', 'are')} parked"
    return f"{what} after a failure and will be tried again ({s.parked_error})"


def _scheduled(s: Status, alive: list[RelayStatus]) -> str:
    due = f"in {max(0, s.next_due or 0):.0f} s"
    unattended = "" if alive else ", but no relay is running"
    if s.scheduled == 1:
        return f"The 1 message that is left is scheduled for later, {due}{unattended}"
    return f"All {some(s.scheduled, 'message')} that are left are scheduled for later, the first {due}{unattended}"
