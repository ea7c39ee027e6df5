"""`outbox_migrations.upgrade(op)` and `downgrade(op)` in a revision of the user's."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import sqlalchemy as sa

import outbox_migrations
from outbox import ConfigurationError, Outbox, SchemaMismatch
from outbox.dialects import MYSQL
from outbox.observe.schema import check_schema
from outbox.tables import SCHEMA_VERSION, Tables
from tests.migrations.project import Project, differences

CONVENTION = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
UP, DOWN = f"outbox_migrations.upgrade(op, to={SCHEMA_VERSION})", "outbox_migrations.downgrade(op)"


def of_the_user(**metadata: object) -> tuple[sa.MetaData, Outbox]:
    """A user's metadata: a table of theirs, and ours."""
    mine = sa.MetaData(**metadata)  # type: ignore[arg-type]
    sa.Table("shop_order", mine, sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String(40)))
    return mine, Outbox(mine)


def seeds(connection: sa.Connection, tables: Tables) -> dict[str, str]:
    return dict(connection.execute(sa.select(tables.checkpoint.c.name, tables.checkpoint.c.value)).all())


def test_the_latest_step_makes_the_version_that_the_library_works_with() -> None:
    assert outbox_migrations.LATEST == SCHEMA_VERSION


@pytest.mark.parametrize("convention", [None, CONVENTION], ids=["plain", "naming_convention"])
def test_after_an_upgrade_autogenerate_sees_no_difference(
    tmp_path: Path, engine: sa.Engine, convention: dict[str, str] | None
) -> None:
    metadata, outbox = of_the_user(naming_convention=convention)
    project = Project(tmp_path, engine, metadata)
    project.revision(
        f"{UP}\n    op.execute('create table shop_order (id integer primary key not null, name varchar(40))')"
    )
    project.upgrade()
    project.check()
    with engine.begin() as connection:
        check_schema(connection, outbox.tables)


@pytest.mark.parametrize("convention", [None, CONVENTION], ids=["plain", "naming_convention"])
def test_after_an_upgrade_in_a_schema_autogenerate_sees_no_difference(
    tmp_path: Path, postgres: sa.Engine, convention: dict[str, str] | None
) -> None:
    metadata, outbox = of_the_user(schema="app", naming_convention=convention)
    project = Project(tmp_path, postgres, metadata, include_schemas=True)
    project.revision(
        f"op.execute('create schema app'); outbox_migrations.upgrade(op, to={SCHEMA_VERSION}, schema='app')\n"
        "    op.execute('create table app.shop_order (id serial primary key, name varchar(40))')"
    )
    project.upgrade()
    project.check()
    with postgres.begin() as connection:
        check_schema(connection, outbox.tables)
        assert connection.dialect.has_table(connection, "outbox_message", schema="app")
        assert not connection.dialect.has_table(connection, "outbox_message")


def test_an_upgrade_seeds_what_ddl_alone_leaves_out(tmp_path: Path, engine: sa.Engine) -> None:
    project = Project(tmp_path, engine)
    project.revision(UP, DOWN)
    project.upgrade()
    tables = Outbox().tables
    with engine.connect() as connection:
        found = seeds(connection, tables)
        assert (found["schema_version"], found["buckets"]) == (str(SCHEMA_VERSION), "64")
        assert uuid.UUID(found["outbox_id"]).version == (1 if engine.dialect.name in MYSQL else 4)
        assert connection.scalars(sa.select(tables.lease.c.bucket)).all() == list(range(64))


def test_upgrade_downgrade_upgrade_leaves_fresh_tables_of_another_outbox(tmp_path: Path, engine: sa.Engine) -> None:
    project = Project(tmp_path, engine)
    project.revision(UP, DOWN)
    tables = Outbox().tables
    project.upgrade()
    with engine.connect() as connection:
        first = seeds(connection, tables)
    project.downgrade()
    with engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["alembic_version"]
    project.upgrade()
    with engine.connect() as connection:
        assert seeds(connection, tables)["outbox_id"] != first["outbox_id"]
        assert differences(connection, tables.metadata)[1:] == []  # but for Alembic's own table


def test_a_prefix_of_the_users_is_kept(tmp_path: Path, engine: sa.Engine) -> None:
    project = Project(tmp_path, engine)
    project.revision(
        f"outbox_migrations.upgrade(op, to={SCHEMA_VERSION}, prefix='shop_')",
        "outbox_migrations.downgrade(op, prefix='shop_')",
    )
    project.upgrade()
    with engine.begin() as connection:
        check_schema(connection, Outbox(prefix="shop_").tables)
    project.downgrade()
    with engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["alembic_version"]


def test_a_revision_on_tables_that_migrate_made_does_nothing(tmp_path: Path, engine: sa.Engine) -> None:
    with engine.begin() as connection:
        outbox_migrations.migrate(connection)
        before = seeds(connection, Outbox().tables)
    project = Project(tmp_path, engine)
    project.revision(UP)
    project.upgrade()
    with engine.connect() as connection:
        assert seeds(connection, Outbox().tables) == before


def test_a_script_written_offline_makes_the_same_tables(tmp_path: Path, engine: sa.Engine) -> None:
    project = Project(tmp_path, engine)
    project.revision(UP, DOWN)
    run_script(engine, project.sql())
    tables = Outbox().tables
    with engine.begin() as connection:
        check_schema(connection, tables)
        assert seeds(connection, tables)["schema_version"] == str(SCHEMA_VERSION)
        assert connection.scalars(sa.select(tables.lease.c.bucket)).all() == list(range(64))
    run_script(engine, project.sql("0001:base", down=True))
    with engine.connect() as connection:
        assert "outbox_message" not in sa.inspect(connection).get_table_names()


def test_a_script_run_on_two_databases_makes_two_outboxes(tmp_path: Path, sqlite: sa.Engine) -> None:
    project = Project(tmp_path, sqlite)
    project.revision(UP)
    script = project.sql()
    assert "hex(randomblob" in script
    assert "?" not in script


def test_version_1_goes_on_making_what_it_made_when_it_was_released(tmp_path: Path, engine: sa.Engine) -> None:
    """A failure here means that v0001_tables.py, or what it uses of `outbox.dialects`, has changed. Before the first release:
    delete the .sql file and run this again, which writes it anew. After it, version 1 stays what it is."""
    project = Project(tmp_path, engine)
    project.revision("outbox_migrations.upgrade(op, to=1)")
    script = project.sql().partition("-- Running upgrade  -> 0001\n")[2].partition("INSERT INTO alembic_version")[0]
    golden = Path(__file__).with_name(f"version_1.{engine.dialect.name}.sql")
    if not golden.exists():
        golden.write_text(script.strip() + "\n")
        pytest.fail(f"there was no {golden.name}; it is written now")
    assert script.strip() == golden.read_text().strip()


def test_a_version_that_does_not_exist_is_refused_before_anything_is_done(tmp_path: Path, sqlite: sa.Engine) -> None:
    project = Project(tmp_path, sqlite)
    project.revision("outbox_migrations.upgrade(op, to=9)")
    with pytest.raises(ConfigurationError, match=r"to=9: .* up to version \d; .*pip install -U pyoutbox"):
        project.upgrade()
    with sqlite.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["alembic_version"]


def test_tables_of_a_newer_pyoutbox_are_left_alone(tmp_path: Path, engine: sa.Engine) -> None:
    with engine.begin() as connection:
        outbox_migrations.migrate(connection)
        connection.execute(sa.text("update outbox_checkpoint set value = '7' where name = 'schema_version'"))
    project = Project(tmp_path, engine)
    project.revision(UP, DOWN)
    with pytest.raises(SchemaMismatch, match="have version 7, made by a newer pyoutbox"):
        project.upgrade()
    with engine.connect() as connection:
        assert "outbox_message" in sa.inspect(connection).get_table_names()


def run_script(engine: sa.Engine, script: str) -> None:
    """As psql and its like do: one statement after the other, in the transactions that the script begins."""
    connection = engine.raw_connection()
    try:
        driver = connection.driver_connection
        assert driver is not None
        if engine.dialect.name == "sqlite":
            driver.executescript(script)
            return
        if engine.dialect.name == "postgresql":
            driver.autocommit = True
        lines = "".join(line for line in script.splitlines(keepends=True) if not line.startswith("--"))
        with driver.cursor() as cursor:
            for statement in lines.split(";\n"):
                if statement.strip():
                    cursor.execute(statement)
        if engine.dialect.name in MYSQL:
            driver.commit()
    finally:
        connection.invalidate()
        connection.close()
