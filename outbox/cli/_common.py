"""What several verbs share: which outbox, which database, how to print."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

import sqlalchemy as sa

from outbox._outbox import Outbox
from outbox.errors import ConfigurationError
from outbox.observe.schema import check_schema
from outbox.stores._run import unavailable
from outbox.stores.engine import sync_engine_for
from outbox.tables import Tables

T = TypeVar("T")


def outbox_options(parser: argparse.ArgumentParser, *, database: bool = True) -> None:
    parser.add_argument("--app", metavar="MODULE:NAME", help="your Outbox object, e.g. shop.messaging:outbox")
    parser.add_argument("--schema", help="schema of the tables, where there is no --app")
    parser.add_argument("--prefix", help="prefix of the tables, where there is no --app (default: outbox_)")
    if database:
        parser.add_argument("--database", metavar="URL", help="default: $OUTBOX_DATABASE")


def load(path: str) -> Any:
    """The object at ``module:name``; the current folder is on the path. Raises `ConfigurationError`."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ConfigurationError(f"{path!r}: write module:name, for example shop.messaging:outbox")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigurationError(
                f"{path!r}: there is no module {error.name!r} (looked in {os.getcwd()} too)"
            ) from error
        raise
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"{path!r}: {module_name} has no {part!r}")
        found = getattr(found, part)
    return found


def outbox_of(options: argparse.Namespace) -> Outbox:
    if options.app is None:
        return Outbox(schema=options.schema, prefix=options.prefix or "outbox_")
    if options.schema or options.prefix:
        raise ConfigurationError("--schema and --prefix say nothing beside --app: the Outbox object has its own")
    found = load(options.app)
    # outbox_flask's wraps one, which it may only know once its app is set up
    found = getattr(found, "outbox", found)
    if not isinstance(found, Outbox):
        raise ConfigurationError(f"--app {options.app}: this is a {type(found).__name__}, not an Outbox")
    return found


def ask(options: argparse.Namespace, question: Callable[[sa.Connection, Tables], T]) -> T:
    """Ask the database of these options, after checking that its tables are ours."""
    tables = outbox_of(options).tables
    engine = sync_engine_for(options.database)
    try:
        with engine.begin() as connection:
            check_schema(connection, tables)
            return question(connection, tables)
    except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
        raise unavailable(engine, error) from error
    finally:
        engine.dispose()


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


def print_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    lines = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in lines), 0) for i, column in enumerate(columns)]
    for line in [list(columns), *lines]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dt.datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    text = str(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:59] + "…"


def duration(seconds: float) -> str:
    """Seconds as people read them: ``3.2 s``, ``4 m 12 s``, ``2 h 5 m``, ``3 d 4 h``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} m" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def log_to_stderr(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)-7s %(name)s %(message)s",
        stream=sys.stderr,
    )
    for name in ("aiokafka", "kafka"):  # our own lines say what matters of it
        logging.getLogger(name).setLevel(logging.ERROR if not verbose else logging.INFO)
