"""``outbox relay``: send what is committed."""

from __future__ import annotations

import argparse
from typing import Any

from outbox.cleanup import Retention
from outbox.cli._common import (
    count,
    log_to_stderr,
    outbox_of,
    outbox_options,
    positive,
    print_json,
)
from outbox.errors import ConfigurationError
from outbox.relay import Limits, Relay
from outbox.relay.routes import ALL, parse_routes
from outbox.stores.engine import from_environment, require_file


def register(commands: Any) -> None:
    parser = commands.add_parser("relay", help="send what is committed to the broker; SIGTERM drains")
    outbox_options(parser)
    parser.add_argument("--transport", metavar="URL", help="default: $OUTBOX_TRANSPORT")
    parser.add_argument(
        "--route",
        action="append",
        default=[],
        metavar="PATTERN=URL",
        help="another transport for topics such as 'audit.*'; may be repeated, default: $OUTBOX_ROUTES",
    )
    parser.add_argument("--lease", type=positive, default=10.0, metavar="SECONDS", help="lease time (default: 10)")
    parser.add_argument(
        "--poll", type=positive, default=0.1, metavar="SECONDS", help="longest pause on an empty table (0.1)"
    )
    parser.add_argument("--batch", type=count, default=2000, metavar="ROWS", help="rows of one read (default: 2000)")
    parser.add_argument(
        "--drain-timeout", type=positive, default=25.0, metavar="SECONDS", help="for a stop (default: 25)"
    )
    parser.add_argument(
        "--no-cleanup", action="store_true", help="remove nothing in the background (see outbox cleanup)"
    )
    parser.add_argument("--drain", action="store_true", help="send what is there now, print the counts, end")
    parser.add_argument("--verbose", action="store_true")
    parser.set_defaults(do=do)


def do(options: argparse.Namespace) -> int:
    log_to_stderr(options.verbose)
    outbox = outbox_of(options)
    require_file(options.database)
    routes = parse_routes(options.route or (from_environment("OUTBOX_ROUTES") or "").split())
    transport = options.transport or (None if ALL in routes else from_environment("OUTBOX_TRANSPORT"))
    if any(url.lower().startswith("memory:") for url in (transport or "", *routes.values())):
        raise ConfigurationError(
            "memory: is this process's own memory: what is sent there ends with it, and is gone from the outbox. "
            "Use local:broker.db, which other processes on this machine can read"
        )
    relay = Relay(
        outbox,
        database=options.database,
        transport=transport,
        routes=routes,
        lease=options.lease,
        drain_timeout=options.drain_timeout,
        retention=Retention.forever() if options.no_cleanup else None,
        limits=Limits(batch=options.batch, window=4 * options.batch, poll=options.poll),
    )
    if options.drain:
        drained = relay.drain()
        print_json({"sent": drained.sent, "parked": drained.parked, "dead": drained.dead})
    else:
        relay.run()
    return 0
