"""A pooler such as PgBouncer between us and PostgreSQL.

In transaction mode each transaction runs on whatever backend is free: statements prepared on another are missing there,
and the loss of a server is hidden. Nothing of ours relies on a session, so it is enough to prepare nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

if TYPE_CHECKING:
    import psycopg

# A pooler makes up the process id that it tells its client (with it, a client asks it to cancel a statement), since there
# is no one backend whose id it could be.
BACKEND: Final = "select pg_backend_pid()"

ADVICE: Final = (
    "if PgBouncer (in transaction mode) or another pooler is between, it knows no prepared statements: give your engine "
    "connect_args={'prepare_threshold': None} with psycopg, {'statement_cache_size': 0, 'prepared_statement_cache_size': 0} "
    "with asyncpg; a URL instead of an engine needs nothing with psycopg, ?prepared_statement_cache_size=0 with asyncpg"
)


def is_between(connection: sa.Connection) -> bool:
    """Whether one is between this connection and PostgreSQL; False for a driver that does not tell its process id."""
    driver: Any = connection.connection.driver_connection
    if hasattr(driver, "get_server_pid"):  # asyncpg
        told = driver.get_server_pid()
    else:  # psycopg, psycopg2
        told = getattr(getattr(driver, "info", None), "backend_pid", None)
    return told is not None and told != connection.exec_driver_sql(BACKEND).scalar()


def prepare_nothing_behind_one(connection: Any, record: Any) -> None:
    """A listener for the ``connect`` event of a psycopg engine, sync or async."""
    cursor = connection.cursor()
    try:
        cursor.execute(BACKEND)
        (backend,) = cursor.fetchone()
    finally:
        cursor.close()
    connection.rollback()
    _note(record.driver_connection, backend)


async def prepare_nothing_behind(connection: psycopg.AsyncConnection[Any]) -> None:
    """The same for a connection of psycopg's own async interface, in autocommit mode."""
    row = await (await connection.execute(BACKEND, prepare=False)).fetchone()
    assert row is not None
    _note(connection, row[0])


def _note(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], backend: int) -> None:
    if connection.info.backend_pid != backend:
        connection.prepare_threshold = None
