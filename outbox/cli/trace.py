"""``outbox trace``: where is this message?"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from outbox._message import message_id
from outbox.cli._common import ask, exit_status, outbox_options, print_json
from outbox.observe.trace import LIMIT, trace


def register(commands: Any) -> None:
    parser = commands.add_parser("trace", help="one message, or all of a key, through every table")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("id", nargs="?", metavar="ID", help="the message's id (header outbox-id), or its dead letter's")
    which.add_argument("--key", help="all messages of a key; the inbox knows ids only, so not those that went well")
    outbox_options(parser)
    exit_status(parser, {0: "found", 1: "no trace of it"})
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(do=do)


def do(options: argparse.Namespace) -> int:
    """Exit status 1 if there is no trace of it."""
    id = None if options.id is None else message_id(options.id)
    traced = ask(options, lambda connection, tables: trace(connection, tables, id=id, key=options.key))
    if options.json:
        found = [{"table": s.table, **s.row} for s in traced.found]
        print_json({"found": found, "verdict": traced.verdict, "cut": traced.cut})
    else:
        for sighting in traced.found:
            print(sighting.table)
            for name, value in sighting.row.items():
                if value is not None:
                    print(f"  {name:<16} {value if (name, value) != ('consumer', '') else '(relay)'}")
        for table in traced.cut:
            print(f"(the first {LIMIT} rows of {table}; there are more)", file=sys.stderr)
        print(traced.verdict)
    return 0 if traced.found else 1
