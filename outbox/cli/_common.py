"""What several verbs share: which outbox, which database, how to print."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import logging
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from traceback import extract_tb
from typing import Any, Final, TypeVar

import sqlalchemy as sa

from outbox._outbox import Outbox
from outbox.errors import ConfigurationError, OutboxError
from outbox.observe.schema import check_schema
from outbox.stores._run import unavailable
from outbox.stores.engine import is_engine, require_file, sync_engine_for
from outbox.tables import PREFIX, Tables

T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """An outbox and its database that need no options: a web framework's own command line knows both."""

    outbox: Outbox
    database: sa.Engine


GIVEN: Final[ContextVar[Given | None]] = ContextVar("outbox_cli_given", default=None)


def outbox_options(parser: argparse.ArgumentParser, *, database: bool = True) -> None:
    if parser.epilog is None:
        exit_status(parser, {0: "done"})
    given = GIVEN.get()
    if given is not None:
        parser.set_defaults(app=None, schema=None, prefix=None, database=given.database)
        return
    parser.add_argument("--app", metavar="MODULE:NAME", help="your Outbox object, e.g. shop.messaging:outbox")
    parser.add_argument("--schema", help="schema of the tables, where there is no --app")
    parser.add_argument("--prefix", help="prefix of the tables, where there is no --app (default: outbox_)")
    if database:
        parser.add_argument("--database", metavar="URL", help="default: $OUTBOX_DATABASE")


def exit_status(parser: argparse.ArgumentParser, meanings: Mapping[int, str]) -> None:
    """Say in ``--help`` what the exit status means; 2 and 3 are the same for every verb."""
    said = {**meanings, 2: "wrong usage or configuration", 3: "the database or broker is away"}
    parser.epilog = "exit status: " + "; ".join(f"{number} {meaning}" for number, meaning in sorted(said.items()))


def load(path: str) -> Any:
    """The object at ``module:name``; the current folder is on the path. Raises `ConfigurationError`, also for a module that
    cannot be imported."""
    module_name, _, name = path.partition(":")
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", path):
        raise ConfigurationError(f"{path!r}: write module:name, for example shop.messaging:outbox")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module_name)
    except OutboxError:
        raise
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (module_name == missing or module_name.startswith(missing + ".")):
            raise ConfigurationError(
                f"{path!r}: there is no module {missing!r} (looked in {os.getcwd()} too)"
            ) from error
        place = extract_tb(error.__traceback__)[-1]
        raise ConfigurationError(
            f"{path!r}: importing {module_name} failed: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"{path!r}: {module_name} has no {part!r}")
        found = getattr(found, part)
    return found


def outbox_of(options: argparse.Namespace) -> Outbox:
    given = GIVEN.get()
    if given is not None:
        return given.outbox
    if options.app is None:
        return Outbox(schema=options.schema, prefix=PREFIX if options.prefix is None else options.prefix)
    if options.schema or options.prefix:
        raise ConfigurationError("--schema and --prefix say nothing beside --app: the Outbox object has its own")
    found = load(options.app)
    if not isinstance(found, Outbox):
        raise ConfigurationError(f"--app {options.app}: this is a {type(found).__name__}, not an Outbox")
    return found


def ask(options: argparse.Namespace, question: Callable[[sa.Connection, Tables], T]) -> T:
    """Ask the database of these options, after checking that its tables are ours."""
    tables = outbox_of(options).tables
    require_file(options.database)
    with connected(options) as connection:
        check_schema(connection, tables)
        return question(connection, tables)


@contextmanager
def connected(options: argparse.Namespace) -> Iterator[sa.Connection]:
    """A transaction on the database of these options, committed at the end. Raises `StoreUnavailable` for what the driver
    raises: not reached, not let in, not allowed. An SQLite file that is not there is made (see `require_file`)."""
    engine = sync_engine_for(options.database, create=True)
    try:
        with engine.begin() as connection:
            yield connection
    except sa.exc.DBAPIError as error:
        raise unavailable(engine, error) from error
    finally:
        if not is_engine(options.database):
            engine.dispose()


def positive(text: str) -> float:
    """A number above zero, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero")
    return value


def count(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def print_json(value: Any) -> None:
    print(json.dumps(value, default=_plain, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, (dt.datetime, dt.date)):
        return value.isoformat()
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    raise TypeError(type(value).__name__)


def print_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, whole: bool = False) -> None:
    """``whole``: the last column is not cut."""
    lines = [[_cell(row.get(column), cut=not (whole and column == columns[-1])) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in lines), 0) for i, column in enumerate(columns)]
    for line in [list(columns), *lines]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any, *, cut: bool = True) -> str:
    if value is None:
        return "-"
    if isinstance(value, dt.datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    text = str(value).replace("\n", " ")
    return text if len(text) <= 60 or not cut else text[:59] + "…"


def log_to_stderr(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)-7s %(name)s %(message)s",
        stream=sys.stderr,
    )
    # our own lines say what matters of it; to pika every lost connection is an error, in several lines
    for name, level in (("aiokafka", logging.ERROR), ("kafka", logging.ERROR), ("pika", logging.CRITICAL)):
        logging.getLogger(name).setLevel(level if not verbose else logging.INFO)
