"""`import outbox` is cheap, and brings nothing that an application did not ask for."""

from __future__ import annotations

import statistics
import subprocess
import sys

UNWANTED = {
    # drivers and their clients
    *("psycopg", "psycopg2", "asyncpg", "aiosqlite", "pymysql", "MySQLdb", "aiokafka", "pika", "aio_pika", "boto3"),
    # frameworks
    *("flask", "fastapi", "starlette", "django", "pydantic", "attrs", "attr", "click", "alembic"),
    # needs greenlet, or is loaded when it is first used
    *("sqlalchemy.ext.asyncio", "greenlet", "msgspec", "asyncio"),
    *("outbox.relay", "outbox.consumer", "outbox.dead_letters", "outbox.transport", "outbox.testing", "outbox.cli"),
}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_brings_no_driver_framework_or_asyncio() -> None:
    before = "import sys, sqlalchemy.orm; had = set(sys.modules)"
    loaded = set(run(f"{before}; import outbox; print(*sorted(set(sys.modules) - had))").split())
    assert "outbox._outbox" in loaded
    assert loaded & UNWANTED == set()


def test_an_outbox_and_a_session_bring_none_either() -> None:
    code = """
import sys, sqlalchemy as sa, sqlalchemy.orm
had = set(sys.modules)
from outbox import Outbox
outbox = Outbox()
engine = sa.create_engine("sqlite://")
outbox.metadata.create_all(engine)
with sqlalchemy.orm.Session(engine) as session, session.begin():
    outbox.add(session, "orders", b"bytes need no encoder", key=1)
print(*sorted(set(sys.modules) - had))
"""
    assert set(run(code).split()) & UNWANTED == set()


def test_a_driver_s_own_connection_brings_no_other_driver() -> None:
    code = """
import sqlite3, sys, sqlalchemy.orm
had = set(sys.modules)
from outbox import Outbox
outbox = Outbox()
connection = sqlite3.connect(":memory:")
connection.executescript(outbox.ddl("sqlite"))
outbox.add(connection, "orders", b"bytes need no encoder", key=1)
print(*sorted(set(sys.modules) - had))
"""
    assert set(run(code).split()) & UNWANTED == set()


def test_the_names_that_are_loaded_later_are_there() -> None:
    code = "import outbox; [getattr(outbox, name) for name in outbox.__all__]; print(*sorted(vars(outbox)))"
    assert {"Consumer", "DeadLetters", "Relay", "Transport"} <= set(run(code).split())


def test_import_adds_less_than_30_milliseconds_to_sqlalchemy() -> None:
    """CPU time, so that other processes do not count; the median, so that a cold cache does not; and on a machine where
    SQLAlchemy itself takes more than 200 milliseconds a seventh of that."""
    code = """
import time
clock = [time.process_time()]
import sqlalchemy.orm
clock.append(time.process_time())
import outbox
clock.append(time.process_time())
print(*clock)
"""
    runs = [[float(seconds) for seconds in run(code).split()] for _ in range(9)]
    sqlalchemy = statistics.median(orm - start for start, orm, _ in runs)
    ours = statistics.median(end - orm for _, orm, end in runs)
    assert ours < max(0.030, sqlalchemy / 7)
