"""``outbox migrate``: make or upgrade the tables where there is no Alembic history to put them into; what it would do, as
words or as a script; and the grants of least privilege."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any, Final

import sqlalchemy as sa

from outbox.cli._common import exit_status, outbox_of, outbox_options, positive
from outbox.errors import ConfigurationError
from outbox.observe.words import some
from outbox.stores._run import unavailable
from outbox.stores.engine import database_url, is_engine, require_file, sync_engine_for
from outbox.tables import Tables

OWNER: Final = (
    "who migrates owns the tables, and may make others in their schema (PostgreSQL: GRANT CREATE ON SCHEMA; MySQL: CREATE, "
    "ALTER, DROP and INDEX). `--dry-run` and `--sql` show what somebody else may run"
)


def register(commands: Any) -> None:
    parser = commands.add_parser("migrate", help="make or upgrade the outbox tables, where there is no Alembic")
    exit_status(parser, {0: "done", 3: "the database is away, or a lock was not had in time"})
    outbox_options(parser)
    parser.add_argument(
        "--to", type=_version, metavar="N", help="the version to bring the tables to (default: the latest)"
    )
    parser.add_argument(
        "--downgrade", action="store_true", help="allow a --to below; 0 drops all that is in the tables"
    )
    parser.add_argument(
        "--patience", type=positive, default=60.0, metavar="SECONDS", help="how long to try for a lock (default: 60)"
    )
    inbox = parser.add_mutually_exclusive_group()
    inbox.add_argument(
        "--partition-inbox",
        dest="partition",
        action="store_const",
        const=True,
        help="put the inbox into daily partitions, dropped when they are over (PostgreSQL)",
    )
    inbox.add_argument(
        "--unpartition-inbox",
        dest="partition",
        action="store_const",
        const=False,
        help="make one table of them again; consumers wait while the rows are copied",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="say what would be done and what each step locks")
    what.add_argument("--sql", action="store_true", help="print a script instead; connects to nothing")
    what.add_argument("--grants", action="store_true", help="print GRANT statements instead; connects to nothing")
    parser.add_argument(
        "--from", dest="start", type=_version, metavar="N", help="with --sql: the version that is there"
    )
    parser.add_argument(
        "--role",
        action="append",
        metavar="USE=ROLE",
        help="with --grants: to which role (uses: add, cancel, claim, relay, cleanup, consume, operate)",
    )
    parser.set_defaults(do=do)


def do(options: argparse.Namespace) -> int:
    tables = outbox_of(options).tables
    if options.start is not None and not options.sql:
        raise ConfigurationError("--from says nothing without --sql: the database knows its version")
    if options.role is not None and not options.grants:
        raise ConfigurationError("--role says nothing without --grants")
    if options.partition is not None and (options.to is not None or options.start is not None or options.grants):
        raise ConfigurationError("--partition-inbox and --unpartition-inbox go without --to, --from and --grants")
    if options.sql:
        return _sql(options, tables)
    if options.grants:
        return _grants(options, tables)
    engine = sync_engine_for(options.database, create=not options.dry_run)
    try:
        return _plan(engine, options, tables) if options.dry_run else _migrate(engine, options, tables)
    except sa.exc.DBAPIError as error:
        raise unavailable(engine, error, OWNER) from error
    finally:
        if not is_engine(options.database):
            engine.dispose()


def _migrate(engine: sa.Engine, options: argparse.Namespace, tables: Tables) -> int:
    import outbox_migrations

    _say_what_holds_us_up()
    lost = _lost(engine, tables) if options.to == 0 and options.downgrade else ""
    if options.partition is not None:
        change = outbox_migrations.partition_inbox if options.partition else outbox_migrations.unpartition_inbox
        changed = change(engine, schema=tables.schema, prefix=tables.prefix, patience=options.patience)
        now = "is in partitions, the days of which the next cleanup makes" if options.partition else "is one table"
        print(f"{tables.inbox.fullname} {now}" + ("" if changed else ", as it was"))
        return 0
    steps = outbox_migrations.migrate(
        engine,
        to=options.to,
        downgrade=options.downgrade,
        schema=tables.schema,
        prefix=tables.prefix,
        patience=options.patience,
    )
    version = outbox_migrations.LATEST if options.to is None else options.to
    now = "there are no outbox tables" if version == 0 else f"outbox tables are at version {version}"
    print(now + (f" (ran {', '.join(steps)})" if steps else ", as they were") + (f"; dropped {lost}" if lost else ""))
    return 0


def _lost(engine: sa.Engine, tables: Tables) -> str:
    """What version 0 drops that nobody has sent or handled, in words; empty where there is nothing such."""
    with engine.connect() as connection:
        inspector = sa.inspect(connection)

        def rows(table: sa.Table, *where: sa.ColumnElement[bool]) -> int:
            if not inspector.has_table(table.name, schema=table.schema):
                return 0
            return connection.scalar(sa.select(sa.func.count()).select_from(table).where(*where)) or 0

        unsent = sum(rows(table) for table in (tables.message, tables.scheduled, tables.parked))
        retried = rows(tables.attempt)
        dead = rows(tables.dead_letter, tables.dead_letter.c.state == "open")
    found = (
        (unsent, "message", " not sent"),
        (retried, "message", " to be tried again"),
        (dead, "open dead letter", ""),
    )
    return ", ".join(some(number, what) + after for number, what, after in found if number)


def _plan(engine: sa.Engine, options: argparse.Namespace, tables: Tables) -> int:
    import outbox_migrations

    require_file(options.database)
    with engine.connect() as connection:
        where: dict[str, Any] = {"schema": tables.schema, "prefix": tables.prefix}
        if options.partition is not None:
            found = outbox_migrations.plan_inbox(connection, options.partition, **where)
        else:
            found = outbox_migrations.plan(connection, to=options.to, **where)
    step = None
    for planned in found:
        if planned.step != step:
            print(step := planned.step)
        print(f"  {planned.what}\n      locks {planned.locks}")
    if not found:
        print("nothing to do")
    elif options.to == 0 and (lost := _lost(engine, tables)):
        print(f"drops {lost}")
    return 0


def _sql(options: argparse.Namespace, tables: Tables) -> int:
    import outbox_migrations

    where: dict[str, Any] = {"schema": tables.schema, "prefix": tables.prefix}
    if options.partition is not None:
        sys.stdout.write(outbox_migrations.script_inbox(_dialect(options), options.partition, **where))
        return 0
    start = options.start or 0
    if options.to is not None and options.to < start and not options.downgrade:
        raise ConfigurationError(f"--to {options.to} is below --from {start}: say --downgrade, which may drop data")
    sys.stdout.write(outbox_migrations.script(_dialect(options), to=options.to, start=start, **where))
    return 0


def _grants(options: argparse.Namespace, tables: Tables) -> int:
    import outbox_migrations

    roles = None
    if options.role is not None:
        pairs = [given.partition("=") for given in options.role]
        if not all(use and equals and role for use, equals, role in pairs):
            raise ConfigurationError("--role: write USE=ROLE, for example --role add=shop_app")
        roles = {use: role for use, _, role in pairs}
    sys.stdout.write(outbox_migrations.grants(_dialect(options), roles, schema=tables.schema, prefix=tables.prefix))
    return 0


def _dialect(options: argparse.Namespace) -> str:
    """Which database the URL names. Nothing is connected, so that neither a server nor its driver need be here."""
    if is_engine(options.database):
        return str(options.database.dialect.name)
    given = options.database
    if given is not None and given in ("postgresql", "mysql", "mariadb", "sqlite"):
        return str(given)
    try:
        return database_url(given).get_backend_name()
    except ConfigurationError as error:
        if given is not None:
            raise
        raise ConfigurationError(f"{error}. Here its kind is enough: --database postgresql (mysql, mariadb)") from None


def _say_what_holds_us_up() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


def _version(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no version: 0, 1, 2 …")
    return int(text)
