"""``outbox trace``: where is this message?"""

from __future__ import annotations

import argparse
from typing import Any

from outbox._message import message_id
from outbox.cli._common import ask, outbox_options, print_json
from outbox.observe.trace import trace


def register(commands: Any) -> None:
    parser = commands.add_parser("trace", help="one message, or all of a key, through every table")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("id", nargs="?", metavar="ID", help="the message's id (header outbox-id)")
    which.add_argument("--key", help="all messages of a key")
    outbox_options(parser)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(do=do)


def do(options: argparse.Namespace) -> int:
    """Exit status 1 if there is no trace of it."""
    id = None if options.id is None else message_id(options.id)
    found, verdict = ask(options, lambda connection, tables: trace(connection, tables, id=id, key=options.key))
    if options.json:
        print_json({"found": [{"table": s.table, **s.row} for s in found], "verdict": verdict})
    else:
        for sighting in found:
            print(sighting.table)
            for name, value in sighting.row.items():
                if value is not None:
                    print(f"  {name:<16} {value}")
        print(verdict)
    return 0 if found else 1
