"""`alembic revision --autogenerate` with the plugin."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

import outbox_migrations
from outbox import Outbox
from outbox.observe.schema import check_schema
from outbox_migrations import LATEST
from tests.migrations.project import Project, differences


def test_autogenerate_writes_one_line_for_our_tables_and_it_runs_both_ways(tmp_path: Path, engine: sa.Engine) -> None:
    metadata = sa.MetaData()
    sa.Table("shop_order", metadata, sa.Column("id", sa.Integer, primary_key=True))
    outbox = Outbox(metadata)
    project = Project(tmp_path, engine, metadata)

    written = project.autogenerate()

    assert written.count("outbox_") == 3  # the import, one line up, one line down
    assert "import outbox_migrations\n" in written
    assert f"    outbox_migrations.upgrade(op, to={LATEST})\n" in written
    assert "    outbox_migrations.downgrade(op, to=0)\n" in written
    assert "op.create_table('shop_order'" in written
    project.upgrade()
    project.check()
    with engine.begin() as connection:
        check_schema(connection, outbox.tables)
    project.downgrade()
    with engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["alembic_version"]


def test_the_line_says_the_schema_and_the_prefix(tmp_path: Path, postgres: sa.Engine) -> None:
    metadata = sa.MetaData(schema="app")
    Outbox(metadata, prefix="shop_")
    with postgres.begin() as connection:
        connection.execute(sa.text("create schema app"))
    project = Project(tmp_path, postgres, metadata, include_schemas=True)
    written = project.autogenerate()
    assert f"    outbox_migrations.upgrade(op, to={LATEST}, schema='app', prefix='shop_')\n" in written
    assert "    outbox_migrations.downgrade(op, to=0, schema='app', prefix='shop_')\n" in written
    project.upgrade()
    project.check()


def test_two_outboxes_on_one_metadata_are_two_lines(tmp_path: Path, sqlite: sa.Engine) -> None:
    metadata = sa.MetaData()
    Outbox(metadata)
    Outbox(metadata, prefix="audit_outbox_")
    project = Project(tmp_path, sqlite, metadata)
    written = project.autogenerate()
    assert written.count(f"outbox_migrations.upgrade(op, to={LATEST}") == 2
    assert "op.create_" not in written
    project.upgrade()
    project.check()


def test_a_copy_of_our_tables_in_other_metadata_is_one_line_too(tmp_path: Path, sqlite: sa.Engine) -> None:
    collected = sa.MetaData()
    for table in Outbox().tables.all:
        table.to_metadata(collected)
    assert f"    outbox_migrations.upgrade(op, to={LATEST})\n" in Project(tmp_path, sqlite, collected).autogenerate()


def test_tables_that_the_metadata_does_not_know_are_not_dropped(engine: sa.Engine) -> None:
    """As in an `env.py` that does not import the module with the `Outbox`."""
    with engine.begin() as connection:
        outbox_migrations.migrate(connection)
        connection.execute(sa.text("create table forgotten (id integer)"))
        found = differences(connection, sa.MetaData())
    assert [(kind, table.name) for kind, table in found] == [("remove_table", "forgotten")]


def test_tables_that_only_look_like_ours_are_dropped_as_always(sqlite: sa.Engine) -> None:
    with sqlite.begin() as connection:
        connection.execute(sa.text("create table chat_message (id integer)"))
        connection.execute(sa.text("create table chat_inbox (id integer)"))
        found = differences(connection, sa.MetaData())
    assert {table.name for _, table in found} == {"chat_message", "chat_inbox"}


def test_a_real_difference_in_our_tables_is_shown(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        outbox_migrations.migrate(connection)
        on = " on outbox_sent" if engine.dialect.name == "mariadb" else ""
        connection.execute(sa.text(f"drop index outbox_sent_id_idx{on}"))
        found = differences(connection, Outbox().metadata)
    assert [(kind, index.name) for kind, index in found] == [("add_index", "outbox_sent_id_idx")]


def test_for_older_alembic_there_is_a_filter(sqlite: sa.Engine) -> None:
    with sqlite.begin() as connection:
        outbox_migrations.migrate(connection)
        connection.execute(sa.text("create table forgotten (id integer)"))
        options = {
            "include_object": outbox_migrations.include_object,
            "autogenerate_plugins": ["alembic.autogenerate.*", "~alembic.autogenerate.outbox"],
        }
        for metadata in (sa.MetaData(), Outbox().metadata):
            found = differences(connection, metadata, compare_server_default=False, **options)
            assert [table.name for _, table in found] == ["forgotten"]
