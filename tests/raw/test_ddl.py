"""`Outbox.ddl`: a script that the database's own client runs, after which all is as `create_all` makes it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

import outbox_migrations
from outbox import ConfigurationError, Outbox, Relay
from outbox.observe.schema import check_schema
from tests.services import DatabaseServer
from tests.services.fixtures import INSTALL_TIMEOUT

servers = pytest.mark.timeout(INSTALL_TIMEOUT)
DRIVERS = {"postgresql": "postgresql+psycopg", "mariadb": "mysql+pymysql"}


def engine_for(database: str, url: str) -> sa.Engine:
    return sa.create_engine(sa.make_url(url).set(drivername=DRIVERS.get(database, database)))


def script_for(outbox: Outbox, database: str, url: str) -> str:
    """Its script; the tests' MariaDB may be MySQL in its place."""
    if database == "mariadb":
        engine = engine_for(database, url)
        with engine.connect():
            database = "mariadb" if engine.dialect.is_mariadb else "mysql"  # type: ignore[attr-defined]
        engine.dispose()
    return outbox.ddl(database)


def run(database: str, url: str, script: str) -> None:
    """Run a script with the database's own client."""
    place = sa.make_url(url)
    if database == "sqlite":
        with sqlite3.connect(str(place.database)) as connection:
            connection.executescript(script)
        connection.close()
        return
    client = "psql" if database == "postgresql" else "mariadb"
    if shutil.which(client) is None and os.environ.get("CI", "").lower() not in ("1", "true"):
        pytest.skip(f"no {client} on this machine")
    if database == "postgresql":
        command = [client, "--no-psqlrc", "--quiet", "--single-transaction", "-v", "ON_ERROR_STOP=1", url]
    else:
        command = [
            "mariadb",
            f"--host={place.host}",
            f"--port={place.port}",
            f"--user={place.username}",
            str(place.database),
        ]
    done = subprocess.run(command, input=script, text=True, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


PG_SAYS = """
SELECT c.relname, 'options', array_to_string(c.reloptions, ', ') FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace
UNION ALL
SELECT c.relname, a.attname, concat_ws(' ', format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
                                       pg_get_expr(d.adbin, d.adrelid))
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relnamespace = 'public'::regnamespace AND a.attnum > 0
UNION ALL
SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL
SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'public'::regnamespace
"""


def schema(database: str, engine: sa.Engine) -> set[str]:
    """All that the database says of its tables, in its own words."""
    with engine.connect() as connection:
        if database == "postgresql":
            return {" ".join(map(str, row)) for row in connection.exec_driver_sql(PG_SAYS)}
        if database == "sqlite":
            made = connection.exec_driver_sql("SELECT sql FROM sqlite_master").scalars().all()
        else:
            tables = connection.exec_driver_sql("SHOW TABLES").scalars().all()
            made = [connection.exec_driver_sql(f"SHOW CREATE TABLE {table}").one()[1] for table in tables]
    if database == "sqlite":
        return {" ".join(str(sql).split()) for sql in made}
    return {f"{sql.split()[2]} {line.rstrip(',')}" for sql in made for line in sql.splitlines()}


def rows(outbox: Outbox, engine: sa.Engine) -> dict[str, int]:
    with engine.connect() as connection:
        return {
            table.name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for table in outbox.tables.all
        }


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=servers), pytest.param("mariadb", marks=servers)])
def database(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def urls(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Two empty databases."""
    if database == "sqlite":
        yield f"sqlite:///{tmp_path / 'one.db'}", f"sqlite:///{tmp_path / 'two.db'}"
        return
    server: DatabaseServer = request.getfixturevalue(database)
    made = server.create_database(), server.create_database()
    yield made
    for url in made:
        server.drop_database(url)


def test_the_client_of_the_database_makes_what_create_all_makes(database: str, urls: tuple[str, str]) -> None:
    outbox = Outbox(prefix="shop_")
    engines = [engine_for(database, url) for url in urls]
    run(database, urls[0], script_for(outbox, database, urls[0]))
    outbox.metadata.create_all(engines[1])
    first, second = (schema(database, engine) for engine in engines)
    assert len(first) > 20
    assert first == second
    assert rows(outbox, engines[0]) == rows(outbox, engines[1])
    with engines[0].begin() as connection:
        check_schema(connection, outbox.tables)
    for engine in engines:
        engine.dispose()


def test_outbox_migrate_makes_the_same(database: str, urls: tuple[str, str]) -> None:
    outbox = Outbox()
    engines = [engine_for(database, url) for url in urls]
    run(database, urls[0], script_for(outbox, database, urls[0]))
    with engines[1].begin() as connection:
        outbox_migrations.migrate(connection)
    first, second = (schema(database, engine) for engine in engines)
    assert first == second
    assert rows(outbox, engines[0]) == rows(outbox, engines[1])
    with engines[0].begin() as connection:
        assert outbox_migrations.migrate(connection) == []
    for engine in engines:
        engine.dispose()


def test_a_relay_sends_what_was_written_into_them(database: str, urls: tuple[str, str]) -> None:
    outbox = Outbox()
    run(database, urls[0], script_for(outbox, database, urls[0]))
    engine = engine_for(database, urls[0])
    with engine.begin() as connection:
        outbox.add(connection, "orders", b"a")
    assert Relay(outbox, database=urls[0], transport="memory://ddl").drain().sent == 1
    engine.dispose()


def test_a_script_that_is_run_on_two_databases_gives_them_two_ids(database: str, urls: tuple[str, str]) -> None:
    outbox = Outbox()
    script = script_for(outbox, database, urls[0])
    ids = set()
    for url in urls:
        run(database, url, script)
        engine = engine_for(database, url)
        checkpoint = outbox.tables.checkpoint
        with engine.connect() as connection:
            found = connection.scalar(sa.select(checkpoint.c.value).where(checkpoint.c.name == "outbox_id"))
        assert found is not None
        assert len(found) == 36
        ids.add(found)
        engine.dispose()
    assert len(ids) == 2


@servers
def test_a_schema_is_quoted_where_it_needs_to_be(postgresql_url: str) -> None:
    run("postgresql", postgresql_url, 'CREATE SCHEMA "select";' + Outbox(schema="select").ddl("postgresql"))
    engine = sa.create_engine(sa.make_url(postgresql_url).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        check_schema(connection, Outbox(schema="select").tables)
    engine.dispose()


def test_what_the_user_s_metadata_has_beside_them_is_not_in_the_script() -> None:
    metadata = sa.MetaData()
    sa.Table("theirs", metadata, sa.Column("id", sa.Integer))
    sa.event.listen(metadata, "before_create", lambda *args, **kw: pytest.fail("was listened to"))
    outbox = Outbox(metadata)
    assert "theirs" not in outbox.ddl("sqlite")
    assert outbox.ddl("sqlite") == Outbox().ddl("sqlite")


@given(st.text())
def test_another_database_is_an_error_that_names_those_that_there_are(name: str) -> None:
    with pytest.raises(ConfigurationError, match="'postgresql', 'mysql', 'mariadb' and 'sqlite' are possible"):
        Outbox().ddl(name)


def test_no_driver_s_marks_are_in_the_script() -> None:
    for name in ("postgresql", "mysql", "mariadb", "sqlite"):
        assert "%%" not in Outbox().ddl(name)
        assert "%(" not in Outbox().ddl(name)
