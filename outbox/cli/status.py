"""``outbox status``: what waits, how old it is, and why nothing is being sent."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from outbox.cli._common import ask, exit_status, outbox_options, print_json, print_table
from outbox.observe.consumers import ConsumerStatus
from outbox.observe.status import RelayStatus, Status, status
from outbox.observe.words import at, duration, seconds, some


def register(commands: Any) -> None:
    parser = commands.add_parser("status", help="what waits, how old it is, who sends it, and why nothing is sent")
    outbox_options(parser)
    exit_status(parser, {0: "done", 1: "a message has waited longer than --fail-if-older"})
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--fail-if-older", metavar="AGE", help="exit status 1 if a message has waited longer, e.g. 90s, 5m, 2h"
    )
    parser.set_defaults(do=do)


def do(options: argparse.Namespace) -> int:
    limit = None if options.fail_if_older is None else seconds(options.fail_if_older)
    found = ask(options, status)
    if options.json:
        print_json(found.as_dict())
    else:
        show(found)
    if limit is not None and (found.oldest or 0.0) > limit:
        print(f"outbox status: the oldest message has waited longer than {options.fail_if_older}", file=sys.stderr)
        return 1
    return 0


def show(s: Status) -> None:
    print(f"{s.verdict}\n")
    print(f"pending       {s.pending:>9,}")
    due = "" if s.next_due is None else f", the next in {duration(max(0.0, s.next_due))}"
    print(f"scheduled     {s.scheduled:>9,}{due}")
    print(f"parked        {s.parked:>9,}" + (f" of {some(s.parked_keys, 'key')}" if s.parked else ""))
    print(f"dead letters  {s.dead_letters:>9,} open")
    if s.oldest is not None:
        print(f"oldest unsent {duration(s.oldest):>12}")
    if s.transactions is not None and not s.transactions.seen:
        print("transactions of other roles cannot be seen: an old one may hold things up (grant pg_read_all_stats)")
    if s.cleanup is not None:
        print(f"cleanup       {s.cleanup.line()}")
    if s.relays:
        print()
        rows = [
            {
                "relay": r.owner,
                "buckets": r.buckets,
                "heartbeat": duration(r.heartbeat) + " ago",
                "state": _state(r, s),
            }
            for r in s.relays
        ]
        print_table(rows, ("relay", "buckets", "heartbeat", "state"), whole=True)
    if s.consumers:
        print()
        columns = (
            "consumer", "waiting", "next attempt", "failed", "blocked keys", "replays", "dead letters", "last error",
        )  # fmt: skip
        print_table([_consumer(c) for c in s.consumers], columns)


def _state(relay: RelayStatus, s: Status) -> str:
    if relay.alive:
        circuits = relay.circuits.items()
        return "; ".join(f"{'broker' if k == '*' else k}: {c['reason']}" for k, c in circuits) or "sending"
    if relay.lease_left is None or relay.lease_ends is None:
        share = "it owns nothing"
    elif relay.lease_left <= 0:
        share = f"its share is free since {at(relay.lease_ends)}"
    else:
        taken = "taken over" if any(other.alive for other in s.relays) else "free"
        share = f"its share is {taken} at {at(relay.lease_ends)}"
    return f"silent for {duration(relay.heartbeat)} (killed? {share})"


def _consumer(c: ConsumerStatus) -> dict[str, Any]:
    due = c.next_attempt_in if c.next_attempt_in is not None else c.replay_in
    when = None if due is None else f"in {duration(due)}" if due > 0 else f"{duration(-due)} ago"
    return {
        "consumer": c.consumer,
        "waiting": c.waiting,
        "next attempt": when,
        "failed": c.attempts,
        "blocked keys": c.blocked_keys,
        "replays": c.replays,
        "dead letters": c.dead_letters,
        "last error": c.last_error,
    }
