"""An inbox in partitions, in a revision, by a script, and as autogenerate and the checks see it."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import outbox_migrations
from outbox import ConfigurationError, Outbox, SchemaMismatch
from outbox.cleanup import Cleanup
from outbox.cli import main
from outbox.observe.partitions import inbox_partitions
from outbox.observe.schema import check_schema
from tests.migrations.project import Project, differences


def is_partitioned(engine: sa.Engine, outbox: Outbox) -> bool:
    with engine.connect() as connection:
        return inbox_partitions(connection, outbox.tables) is not None


def shop() -> tuple[sa.MetaData, Outbox]:
    """A user's metadata, with a naming convention as many have one."""
    metadata = sa.MetaData(naming_convention={"pk": "pk_%(table_name)s", "ix": "ix_%(table_name)s_%(column_0_name)s"})
    sa.Table("orders", metadata, sa.Column("id", sa.Integer, primary_key=True))
    return metadata, Outbox(metadata)


@pytest.mark.parametrize("known", [True, False], ids=["in the metadata", "env.py does not import it"])
def test_autogenerate_sees_no_difference_in_partitions(postgres: sa.Engine, known: bool) -> None:
    outbox_migrations.migrate(postgres)
    outbox_migrations.partition_inbox(postgres)
    Cleanup(Outbox(), database=postgres).run()
    with postgres.begin() as connection:
        connection.exec_driver_sql("create table forgotten (id integer)")
        found = differences(connection, Outbox().metadata if known else sa.MetaData())
    assert [(kind, table.name) for kind, table in found] == [("remove_table", "forgotten")]


@pytest.mark.parametrize("prefix", ["outbox_", "audit_outbox_"])
def test_include_object_leaves_partitions_out_where_there_is_no_plugin(postgres: sa.Engine, prefix: str) -> None:
    outbox = Outbox(prefix=prefix)
    outbox_migrations.migrate(postgres, prefix=prefix)
    outbox_migrations.partition_inbox(postgres, prefix=prefix)
    Cleanup(outbox, database=postgres).run()
    options: dict[str, Any] = {
        "autogenerate_plugins": ["alembic.autogenerate.*", "~alembic.autogenerate.outbox"],
        "include_object": outbox_migrations.include_object_for(prefix),
    }
    with postgres.begin() as connection:
        assert differences(connection, outbox.metadata, **options) == []
        connection.exec_driver_sql(f"create table {prefix}inbox_defaults (id integer)")
        found = differences(connection, outbox.metadata, **options)
    assert [(kind, table.name) for kind, table in found] == [("remove_table", f"{prefix}inbox_defaults")]


def test_a_revision_of_the_users_does_it_and_undoes_it(tmp_path: Path, postgres: sa.Engine) -> None:
    metadata, outbox = shop()
    project = Project(tmp_path, postgres, metadata)
    project.revision(
        "outbox_migrations.upgrade(op, to=2); op.execute('create table orders (id serial primary key)')",
        "op.execute('drop table orders'); outbox_migrations.downgrade(op)",
    )
    project.upgrade()
    project.revision("outbox_migrations.partition_inbox(op)", "outbox_migrations.unpartition_inbox(op)")
    project.upgrade()
    assert is_partitioned(postgres, outbox)
    Cleanup(outbox, database=postgres).run()
    project.check()
    with postgres.connect() as connection:
        check_schema(connection, outbox.tables)
    project.downgrade("-1")
    assert not is_partitioned(postgres, outbox)
    project.upgrade()
    project.downgrade()
    assert not [name for name in sa.inspect(postgres).get_table_names() if name.startswith("outbox_")]


def test_dropping_the_tables_drops_the_partitions(postgres: sa.Engine) -> None:
    outbox_migrations.migrate(postgres)
    outbox_migrations.partition_inbox(postgres)
    Cleanup(Outbox(), database=postgres).run()
    outbox_migrations.migrate(postgres, to=0, downgrade=True)
    assert sa.inspect(postgres).get_table_names() == []


def test_the_chain_of_versions_goes_both_ways_with_partitions(postgres: sa.Engine) -> None:
    outbox_migrations.migrate(postgres)
    outbox_migrations.partition_inbox(postgres)
    Cleanup(Outbox(), database=postgres).run()
    outbox_migrations.migrate(postgres, to=1, downgrade=True)
    with pytest.raises(SchemaMismatch):
        outbox_migrations.unpartition_inbox(postgres)
    outbox_migrations.migrate(postgres)
    assert is_partitioned(postgres, Outbox())
    assert outbox_migrations.partition_inbox(postgres) is False


@pytest.mark.parametrize("schema", [None, "shop"])
def test_a_script_does_what_the_function_does(postgres: sa.Engine, schema: str | None) -> None:
    outbox = Outbox(schema=schema)
    with postgres.begin() as connection:
        if schema:
            connection.exec_driver_sql(f"create schema {schema}")
    outbox_migrations.migrate(postgres, schema=schema)
    with postgres.begin() as connection:
        connection.execute(sa.insert(outbox.tables.inbox), [{"consumer": "c", "message_id": _id(), "outcome": "done"}])
    for partitioned in (True, False):
        text = outbox_migrations.script_inbox("postgresql", partitioned, schema=schema)
        with postgres.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(text.replace("%", "%%"))
        assert is_partitioned(postgres, outbox) is partitioned
        with postgres.connect() as connection:
            check_schema(connection, outbox.tables)
            assert connection.scalar(sa.select(sa.func.count()).select_from(outbox.tables.inbox)) == 1


def _id() -> uuid.UUID:
    return uuid.uuid4()


def test_tables_changed_by_hand_are_carried_over(postgres: sa.Engine) -> None:
    """Another name of the key, and a column of the user's."""
    outbox_migrations.migrate(postgres)
    with postgres.begin() as connection:
        connection.exec_driver_sql("alter table outbox_inbox rename constraint outbox_inbox_pkey to mine")
        connection.exec_driver_sql("alter table outbox_inbox add column note text default 'x'")
    assert outbox_migrations.partition_inbox(postgres)
    outbox = Outbox()
    Cleanup(outbox, database=postgres).run()
    with postgres.begin() as connection:
        connection.execute(sa.insert(outbox.tables.inbox), [{"consumer": "c", "message_id": _id(), "outcome": "done"}])
    assert outbox_migrations.unpartition_inbox(postgres)
    with postgres.connect() as connection:
        check_schema(connection, outbox.tables)
        assert connection.exec_driver_sql("select note from outbox_inbox").scalar() == "x"


def test_on_the_command_line(postgres: sa.Engine, capsys: pytest.CaptureFixture[str]) -> None:
    url = ["--database", postgres.url.render_as_string(hide_password=False)]

    def migrate(*arguments: str) -> str:
        assert main(["migrate", *url, *arguments]) == 0
        return capsys.readouterr().out

    migrate()
    assert "ACCESS EXCLUSIVE on outbox_inbox: reads and writes wait" in migrate("--partition-inbox", "--dry-run")
    assert not is_partitioned(postgres, Outbox())
    assert "is in partitions, the days of which the next cleanup makes\n" in migrate("--partition-inbox")
    assert "as it was" in migrate("--partition-inbox")
    assert migrate("--partition-inbox", "--dry-run") == "nothing to do\n"
    assert re.search(r"PARTITION BY RANGE \(message_id\)", migrate("--partition-inbox", "--sql"))
    assert "copying their rows" in migrate("--unpartition-inbox", "--dry-run")
    assert "is one table\n" in migrate("--unpartition-inbox")
    assert not is_partitioned(postgres, Outbox())
    assert main(["migrate", *url, "--partition-inbox", "--to", "1"]) != 0
    assert "go without --to" in capsys.readouterr().err


@pytest.mark.parametrize("dialect", ["sqlite", "mysql", "mariadb"])
def test_other_databases_have_none(dialect: str) -> None:
    with pytest.raises(ConfigurationError, match="PostgreSQL only"):
        outbox_migrations.script_inbox(dialect, partitioned=True)
