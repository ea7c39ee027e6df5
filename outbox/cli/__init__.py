"""The command ``outbox``. One file a verb; each has ``register(commands)`` and a function that returns the exit status.

Exit status: 0 done; 1 the answer is no (a failed check); 2 wrong usage or configuration; 3 the database or broker is away.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from outbox._version import __version__
from outbox.errors import OutboxError, StoreUnavailable, TransportError

VERBS: Final = ("relay", "consume", "status", "trace", "dlq", "migrate", "demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Errors of ours are a line on stderr, never a traceback."""
    parser = argparse.ArgumentParser(
        prog="outbox", description="Transactional outbox and inbox: send what is committed, once and in order."
    )
    parser.add_argument("--version", action="version", version=f"outbox {__version__}")
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    for verb in VERBS:
        import_module(f"outbox.cli.{verb}").register(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.do(options)
    except (StoreUnavailable, TransportError) as error:
        print(f"outbox {options.verb}: {error}", file=sys.stderr)
        return 3
    except OutboxError as error:
        print(f"outbox {options.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    return status
