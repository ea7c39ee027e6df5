"""``outbox status``: what waits, how old it is, and why nothing is being sent."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from outbox.cli._common import ask, duration, outbox_options, print_json, print_table
from outbox.errors import ConfigurationError
from outbox.observe.status import Status, status


def register(commands: Any) -> None:
    parser = commands.add_parser("status", help="what waits, how old it is, who sends it, and why nothing is sent")
    outbox_options(parser)
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


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|d)?", text)
    if match is None:
        raise ConfigurationError(f"{text!r} is no age: write 90s, 5m, 2h or 1d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2] or "s"]


def show(s: Status) -> None:
    print(f"{s.verdict}\n")
    print(f"pending       {s.pending:>9,}")
    due = "" if s.next_due is None else f", the next in {duration(max(0.0, s.next_due))}"
    print(f"scheduled     {s.scheduled:>9,}{due}")
    print(f"parked        {s.parked:>9,}" + (f" of {s.parked_keys} keys" if s.parked else ""))
    print(f"dead letters  {s.dead_letters:>9,} open")
    if s.oldest is not None:
        print(f"oldest unsent {duration(s.oldest):>12}")
    if s.relays:
        print()
        rows = [
            {
                "relay": r.owner,
                "buckets": r.buckets,
                "heartbeat": duration(r.heartbeat) + " ago",
                "state": _state(r.alive, r.circuits),
            }
            for r in s.relays
        ]
        print_table(rows, ("relay", "buckets", "heartbeat", "state"))


def _state(alive: bool, circuits: dict[str, dict[str, Any]]) -> str:
    if not alive:
        return "gone"
    return "; ".join(f"{'broker' if k == '*' else k}: {c['reason']}" for k, c in circuits.items()) or "sending"
