"""``outbox consume``: run a consumer."""

from __future__ import annotations

import argparse
from typing import Any

from outbox.cli._common import load, log_to_stderr
from outbox.consumer import Consumer
from outbox.errors import ConfigurationError


def register(commands: Any) -> None:
    parser = commands.add_parser("consume", help="run a consumer's handlers; SIGTERM drains")
    parser.add_argument("consumer", metavar="MODULE:NAME", help="your Consumer object, e.g. shop.billing:billing")
    parser.add_argument("--database", metavar="URL", help="default: what the Consumer says, then $OUTBOX_DATABASE")
    parser.add_argument("--transport", metavar="URL", help="default: what the Consumer says, then $OUTBOX_TRANSPORT")
    parser.add_argument("--member", help="a name that this process keeps over restarts: its share comes back at once")
    parser.add_argument("--verbose", action="store_true")
    parser.set_defaults(do=do)


def do(options: argparse.Namespace) -> int:
    log_to_stderr(options.verbose)
    consumer = load(options.consumer)
    if not isinstance(consumer, Consumer):
        raise ConfigurationError(f"{options.consumer}: this is a {type(consumer).__name__}, not a Consumer")
    consumer.run(database=options.database, transport=options.transport, member=options.member)
    return 0
