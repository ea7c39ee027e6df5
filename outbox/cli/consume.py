"""``outbox consume``: run a consumer."""

from __future__ import annotations

import argparse
from typing import Any

from outbox.cli._common import load, log_to_stderr
from outbox.consumer import Consumer
from outbox.errors import ConfigurationError

DESCRIPTION = """Run the handlers of a Consumer until SIGTERM or SIGINT, which drain: what is being handled is finished.
Messages whose topic it reads and whose type is without a handler become dead letters, unless it was made with
Consumer(…, unknown='ignore')."""


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "consume",
        help="run a consumer's handlers; SIGTERM drains",
        description=DESCRIPTION.replace("\n", " "),
        usage="%(prog)s [-h] [--database URL] [--transport URL] [--member MEMBER] [--verbose] MODULE:NAME",
    )
    # optional for argparse, so that what is missing is said in words of ours
    parser.add_argument(
        "consumer", metavar="MODULE:NAME", nargs="?", help="your Consumer object, e.g. shop.billing:billing"
    )
    parser.add_argument("--database", metavar="URL", help="default: what the Consumer says, then $OUTBOX_DATABASE")
    parser.add_argument("--transport", metavar="URL", help="default: what the Consumer says, then $OUTBOX_TRANSPORT")
    parser.add_argument("--member", help="a name that this process keeps over restarts: its share comes back at once")
    parser.add_argument("--verbose", action="store_true")
    # what the other verbs have, and this one is often called with
    parser.add_argument("--app", help=argparse.SUPPRESS)
    parser.set_defaults(do=do, parser=parser)


def do(options: argparse.Namespace) -> int:
    if options.consumer is None:
        hint = " (there is no --app here: a Consumer knows its own Outbox)" if options.app is not None else ""
        options.parser.error(
            f"name your Consumer object, without an option: {options.parser.prog} MODULE:NAME, "
            f"for example {options.parser.prog} shop.billing:billing{hint}"
        )
    if options.app is not None:
        options.parser.error(
            f"there is no --app here: a Consumer knows its own Outbox. Write {options.parser.prog} {options.consumer}"
        )
    log_to_stderr(options.verbose)
    consumer = load(options.consumer)
    if not isinstance(consumer, Consumer):
        raise ConfigurationError(
            f"{options.consumer}: this is {_a(type(consumer).__name__)}, not a Consumer; name your Consumer object, "
            "for example outbox consume shop.billing:billing"
        )
    consumer.run(database=options.database, transport=options.transport, member=options.member)
    return 0


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"
