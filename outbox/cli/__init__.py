"""The command ``outbox``. One file a verb; each has ``register(commands)`` and a function that returns the exit status.

Exit status: 0 done; 1 the answer is no (a failed check); 2 wrong usage or configuration; 3 the database or broker is away.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import sqlalchemy as sa

from outbox._refusals import words
from outbox._version import __version__
from outbox.errors import OutboxError, StoreUnavailable, TransportError

VERBS: Final = ("relay", "consume", "status", "trace", "dlq", "cleanup", "migrate", "demo")


class _Parser(argparse.ArgumentParser):
    """What a verb does not know is refused with that verb's usage; argparse shows the whole command's."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        found, rest = super().parse_known_args(*args, **kwargs)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


def main(arguments: Sequence[str] | None = None, *, prog: str = "outbox") -> int:
    """Run one command; returns its exit status. Errors of ours are a line on stderr, never a traceback. ``prog``: how the
    user called it."""
    parser = _Parser(
        prog=prog, description="Transactional outbox and inbox: send what is committed, once and in order."
    )
    parser.add_argument("--version", action="version", version=f"outbox {__version__}")
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    for verb in VERBS:
        import_module(f"outbox.cli.{verb}").register(commands)
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        # a key that this terminal cannot show is shown escaped; not where something else has taken the stream's place
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status: int = options.do(options)
        sys.stdout.flush()
    except (StoreUnavailable, TransportError) as error:
        print(f"{prog} {options.verb}: {error}", file=sys.stderr)
        return 3
    except OutboxError as error:
        print(f"{prog} {options.verb}: {error}", file=sys.stderr)
        return 2
    except sa.exc.DBAPIError as error:
        # the driver's words alone: SQLAlchemy's add the statement and its parameters, which are the user's data
        from outbox.stores._run import advice

        what = words(error.orig or error)
        print(f"{prog} {options.verb}: the database refuses: {what}{advice(what)}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # whoever read our output has enough; Python would complain of that at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status
