"""``outbox migrate``: make the tables where there is no Alembic history to put them into."""

from __future__ import annotations

import argparse
from typing import Any

from outbox.cli._common import connected, outbox_of, outbox_options


def register(commands: Any) -> None:
    parser = commands.add_parser("migrate", help="make or upgrade the outbox tables, where there is no Alembic")
    outbox_options(parser)
    parser.set_defaults(do=do)


def do(options: argparse.Namespace) -> int:
    import outbox_migrations

    tables = outbox_of(options).tables
    with connected(options) as connection:
        steps = outbox_migrations.migrate(connection, schema=tables.schema, prefix=tables.prefix)
    print(
        f"outbox tables are at version {outbox_migrations.LATEST}"
        + (f" (ran {', '.join(steps)})" if steps else ", as they were")
    )
    return 0
