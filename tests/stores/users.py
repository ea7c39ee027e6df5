"""MySQL and MariaDB as the applications beside us use them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from tests.relay.database import Database


def users_engine(database: Database, sql: str = "select 1", **options: Any) -> sa.Engine:
    """An engine as users have theirs: REPEATABLE READ, and what ``sql`` sets."""
    url = sa.make_url(database.url).set(drivername="mysql+pymysql")
    return sa.create_engine(url, connect_args={"init_command": sql, **options})
