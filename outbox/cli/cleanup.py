"""``outbox cleanup``: remove what is over."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

from outbox.cleanup import Cleaned, Cleanup, Retention
from outbox.cleanup.retention import age
from outbox.cleanup.sweep import ROWS
from outbox.cli._common import count, exit_status, outbox_of, outbox_options, print_json
from outbox.errors import ConfigurationError
from outbox.observe.words import duration, some
from outbox.stores.engine import require_file


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "cleanup", help="remove inbox rows, closed dead letters and other rows that are over, in small batches"
    )
    exit_status(parser, {0: "done, also where there was nothing"})
    outbox_options(parser)
    parser.add_argument(
        "--older-than",
        metavar="AGE",
        help="of inbox rows, closed dead letters and what was sent, e.g. 30d (the default)",
    )
    parser.add_argument("--audit-older-than", metavar="AGE", help="of lines of the audit (default: 365d)")
    parser.add_argument(
        "--archive", metavar="FILE", help="append each row to it, as a line of JSON, before it is removed"
    )
    parser.add_argument("--dry-run", action="store_true", help="count, and remove nothing")
    parser.add_argument(
        "--batch", type=count, default=ROWS, metavar="ROWS", help=f"of one transaction (default: {ROWS})"
    )
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(do=do)


def do(options: argparse.Namespace) -> int:
    outbox = outbox_of(options)
    require_file(options.database)
    retention = _retention(options)
    if options.dry_run and options.archive:
        raise ConfigurationError("--archive says nothing beside --dry-run: nothing is removed")
    cleanup = Cleanup(outbox, database=options.database, retention=retention, rows=options.batch)
    done = cleanup.plan() if options.dry_run else cleanup.run(archive=options.archive, progress=_progress())
    if options.json:
        kept = [dataclasses.asdict(one) for one in done.kept]
        finite = {name: value for name, value in retention.as_dict().items() if math.isfinite(value)}
        which = "would_remove" if options.dry_run else "removed"
        print_json(
            {
                which: done.removed,
                "kept": kept,
                "made": [day.isoformat() for day in done.made],
                "notes": done.notes,
                "retention": finite,
                "archive": options.archive,
            }
        )
    else:
        _show(done, retention, outbox.tables.prefix, "would remove" if options.dry_run else "removed")
    return 0


def _retention(options: argparse.Namespace) -> Retention:
    older = None if options.older_than is None else age(options.older_than)
    audit = None if options.audit_older_than is None else age(options.audit_older_than)
    return Retention.from_environment(inbox=older, dead_letter=older, sent=older, audit=audit)


def _show(done: Cleaned, retention: Retention, prefix: str, verb: str) -> None:
    for table, rows in done.removed.items():
        kept_for = retention.as_dict().get(table)
        old = "" if kept_for is None else f"  older than {duration(kept_for)}"
        print(f"{verb:<13} {rows:>12,}  {prefix}{table}{old}")
    if not done.removed:
        print(f"{verb:<13} {'nothing':>12}")
    if done.made:
        days = some(len(done.made), "day")
        print(f"{'made':<13} {days:>12}  partitions of {prefix}inbox, up to {done.made[-1]}")
    for kept in done.kept:
        print(f"{'kept':<13} {kept.count:>12,}  {prefix}{kept.table}  {kept.why}")
    for note in done.notes:
        print(f"{'note':<13} {note}")


def _progress() -> Callable[[dict[str, int]], None]:
    """A line on the terminal that is written over."""
    if not sys.stderr.isatty():
        return lambda removed: None
    shown = [0]

    def show(removed: dict[str, int]) -> None:
        text = f"removed {some(sum(removed.values()), 'row')} …"
        print(f"\r{text:<{shown[0]}}", end="", file=sys.stderr, flush=True)
        shown[0] = len(text)

    return show
