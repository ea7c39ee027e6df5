"""From version 1 to the latest with rows in flight, on each database: nothing is lost, the old application goes on."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy.ext.asyncio import create_async_engine

import outbox_migrations
from outbox import ConfigurationError, Consumer, Outbox, Relay, SchemaMismatch
from outbox.dialects import MYSQL
from outbox.observe import schema
from outbox.observe.schema import check_schema
from outbox.storage import STORAGE
from outbox_migrations import LATEST, migrate
from outbox_migrations import _online as online
from tests.migrations.older import Older
from tests.migrations.project import Project, differences
from tests.migrations.test_revisions import run_script
from tests.relay.running import QUICK, eventually, running
from tests.relay.scripted import Scripted


def drain(engine: sa.Engine, outbox: Outbox) -> int:
    return Relay(outbox, database=engine, transport=f"memory://{uuid.uuid4().hex}").drain().sent


def test_rows_in_flight_outlive_the_upgrade(engine: sa.Engine) -> None:
    older = Older(engine)
    before = older.fill()
    assert (before["message"], before["parked"], before["dead_letter"]) == (20, 1, 2)
    assert migrate(engine) == [step.name for step in outbox_migrations.STEPS[1:]]
    assert older.counts() == before
    assert older.version() == str(LATEST)
    with engine.connect() as connection:
        check_schema(connection, Outbox().tables)
        assert differences(connection, Outbox().metadata) == []


def test_a_relay_of_the_new_version_sends_what_the_old_one_left(engine: sa.Engine) -> None:
    older = Older(engine)
    older.fill()
    migrate(engine)
    older.add("after")  # an application that has not been rolled out yet
    assert drain(engine, Outbox()) == 20 + 1 + 1 + 1  # messages, the one that is due, the parked one, the last
    counts = older.counts()
    assert (counts["message"], counts["scheduled"], counts["parked"]) == (0, 1, 0)
    assert (counts["inbox"], counts["dead_letter"], counts["attempt"]) == (5, 2, 1)


def test_a_relay_and_a_consumer_that_meet_older_tables_say_so_and_touch_nothing(engine: sa.Engine) -> None:
    older = Older(engine)
    before = older.fill()
    outbox = Outbox()
    said = (
        rf"have version 1; this pyoutbox needs {LATEST}\. Run `outbox migrate`, or outbox_migrations\.upgrade\(op, to="
    )
    with pytest.raises(SchemaMismatch, match=said):
        drain(engine, outbox)
    billing = Consumer("billing", outbox, database=engine, transport="memory://older")
    billing.on("orders")(lambda payload: None)
    with pytest.raises(SchemaMismatch, match=said):
        asyncio.run(entered(billing))
    assert older.counts() == before


def test_a_relay_and_a_consumer_that_meet_newer_tables_say_so_and_touch_nothing(engine: sa.Engine) -> None:
    older = Older(engine)
    before = older.fill()
    outbox = Outbox()
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("update outbox_checkpoint set value = '99' where name = 'schema_version'"))
    with pytest.raises(SchemaMismatch, match="have version 99, made by a newer pyoutbox"):
        drain(engine, outbox)
    billing = Consumer("billing", outbox, database=engine, transport="memory://newer")
    billing.on("orders")(lambda payload: None)
    with pytest.raises(SchemaMismatch, match="have version 99, made by a newer pyoutbox"):
        asyncio.run(entered(billing))
    assert older.counts() == before


async def entered(consumer: Consumer) -> None:
    async with consumer:
        pass


def test_one_version_back_and_forth_loses_nothing(engine: sa.Engine) -> None:
    older = Older(engine)
    before = older.fill()
    migrate(engine)
    migrate(engine, to=1, downgrade=True)
    assert (older.version(), older.counts()) == ("1", before)
    names = {index["name"] for index in sa.inspect(engine).get_indexes("outbox_dead_letter")}
    assert "outbox_dead_letter_closed_at_idx" not in names
    migrate(engine)
    assert (older.version(), older.counts()) == (str(LATEST), before)


def test_a_migration_that_was_cut_off_is_finished_by_the_next(engine: sa.Engine) -> None:
    """Cut before each statement in turn. On MySQL, which commits each by itself, half of the tables are there; on the
    others nothing of that transaction."""

    class Cut(Exception):
        pass

    def cut_at(number: int, options: dict[str, Any]) -> None:
        seen = 0

        def count(*_: object) -> None:
            nonlocal seen
            seen += 1
            if seen == number:
                raise Cut

        sa.event.listen(engine, "before_cursor_execute", count)
        try:
            migrate(engine, **options)
        finally:
            sa.event.remove(engine, "before_cursor_execute", count)

    cuts = 0
    for number in range(1, 400, 7 if engine.dialect.name in MYSQL else 23):
        try:
            cut_at(number, {})
        except Cut:
            cuts += 1
            continue
        break
    assert cuts > 5
    for number in (3, 9, 15, 21, 27):  # and back, cut as well
        with suppress(Cut):
            cut_at(number, {"to": 0, "downgrade": True})
    migrate(engine, to=0, downgrade=True)
    assert sa.inspect(engine).get_table_names() == []
    migrate(engine)
    with engine.connect() as connection:
        check_schema(connection, Outbox().tables)
        assert differences(connection, Outbox().metadata) == []
        assert connection.scalar(sa.text("select count(*) from outbox_lease")) == 64
        assert connection.scalar(sa.text("select count(*) from outbox_checkpoint")) == 3


@pytest.mark.parametrize("together", [True, False], ids=["one script", "a script a revision"])
def test_scripts_of_two_revisions_do_each_step_once(tmp_path: Path, engine: sa.Engine, together: bool) -> None:
    project = Project(tmp_path, engine)
    project.revision("outbox_migrations.upgrade(op, to=1)", "outbox_migrations.downgrade(op, to=0)")
    project.revision("outbox_migrations.upgrade(op, to=2, start=1)", "outbox_migrations.downgrade(op, to=1, start=2)")
    if together:
        run_script(engine, project.sql())
    else:
        run_script(engine, project.sql("0001"))
        Older(engine).fill()
        run_script(engine, project.sql("0001:0002"))
    with engine.connect() as connection:
        check_schema(connection, Outbox().tables)
    run_script(engine, project.sql("0002:0001", down=True))
    assert Older(engine).version() == "1"
    run_script(engine, project.sql("0001:base", down=True))
    assert "outbox_message" not in sa.inspect(engine).get_table_names()


def test_revisions_of_both_versions_run_online(tmp_path: Path, engine: sa.Engine) -> None:
    project = Project(tmp_path, engine)
    project.revision("outbox_migrations.upgrade(op, to=1)", "outbox_migrations.downgrade(op, to=0)")
    project.upgrade()
    older = Older(engine)
    before = older.fill()
    project.revision("outbox_migrations.upgrade(op, to=2)", "outbox_migrations.downgrade(op, to=1)")
    project.upgrade()
    assert (older.version(), older.counts()) == (str(LATEST), before)
    project.downgrade("0001")
    assert (older.version(), older.counts()) == ("1", before)
    project.downgrade()
    assert sa.inspect(engine).get_table_names() == ["alembic_version"]


@pytest.mark.parametrize("way", ["create_all", "migrate", "upgraded"])
def test_postgresql_keeps_the_hot_tables_as_the_library_says_whichever_way_they_were_made(
    postgres: sa.Engine, way: str
) -> None:
    if way == "create_all":
        Outbox().metadata.create_all(postgres)
    elif way == "upgraded":
        Older(postgres)
    migrate(postgres)
    with postgres.connect() as connection:
        assert settings(connection) == {
            f"outbox_{name}": {setting: f"{value}" for setting, value in values.items()}
            for name, values in STORAGE.items()
        }


def test_settings_that_a_dba_has_changed_are_left_alone(postgres: sa.Engine) -> None:
    migrate(postgres)
    with postgres.begin() as connection:
        connection.execute(sa.text("alter table outbox_message set (autovacuum_vacuum_threshold = 77)"))
    assert migrate(postgres) == []
    with postgres.connect() as connection:
        check_schema(connection, Outbox().tables)
        assert settings(connection)["outbox_message"]["autovacuum_vacuum_threshold"] == "77"


def settings(connection: sa.Connection) -> dict[str, dict[str, str]]:
    """Storage settings by table; those of its TOAST table with their prefix."""
    rows = connection.execute(
        sa.text(
            "select c.relname, c.reloptions, t.reloptions as toast from pg_class c left join pg_class t"
            " on t.oid = c.reltoastrelid where c.relkind = 'r' and (c.reloptions is not null)"
        )
    )
    return {
        row.relname: dict(option.split("=", 1) for option in row.reloptions)
        | {f"toast.{name}": value for name, value in (option.split("=", 1) for option in row.toast or ())}
        for row in rows
    }


async def test_an_old_relay_that_is_running_goes_on_while_the_tables_are_upgraded(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has compared versions at its start. A step only adds, so that it half-works at no time."""
    older = Older(engine)
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 1)
    monkeypatch.setattr(schema, "differences", lambda *_: [])
    broker = Scripted()
    async with running(Relay(Outbox(), database=engine, transport=broker, limits=QUICK)) as relay:
        await asyncio.to_thread(older.add, "before")
        await eventually(lambda: len(broker.stored) == 1)
        monkeypatch.undo()
        await asyncio.to_thread(migrate, engine)
        assert older.version() == str(LATEST)
        for n in range(5):
            await asyncio.to_thread(older.add, f"after-{n}")
        await eventually(lambda: len(broker.stored) == 6)
        await eventually(lambda: relay.counts.sent == 6)
    assert older.counts()["message"] == 0


async def test_alembic_on_an_async_engine(postgresql_url: str, postgres: sa.Engine) -> None:
    older = Older(postgres)
    before = older.fill()
    engine = create_async_engine(postgresql_url.replace("postgresql:", "postgresql+asyncpg:"))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(online, "SMALL", 0)

    def run(connection: sa.Connection) -> None:
        context = MigrationContext.configure(connection)
        with context.begin_transaction():
            outbox_migrations.upgrade(Operations(context), to=2)

    async with engine.connect() as connection:
        await connection.run_sync(run)
    await engine.dispose()
    monkeypatch.undo()
    assert (older.version(), older.counts()) == (str(LATEST), before)
    with postgres.connect() as connection_:
        check_schema(connection_, Outbox().tables)


def test_an_async_engine_is_refused_with_what_to_write() -> None:
    engine: Any = create_async_engine("postgresql+asyncpg://x/y")
    with pytest.raises(ConfigurationError, match=r"not AsyncEngine; .*run_sync"):
        migrate(engine)


@pytest.mark.parametrize("name", ["App", "order", "a$b"])
def test_a_schema_whose_name_is_quoted(postgres: sa.Engine, name: str) -> None:
    with postgres.begin() as connection:
        connection.execute(sa.schema.CreateSchema(name))
    older = Older(postgres, schema=name)
    before = older.fill()
    migrate(postgres, schema=name)
    assert older.counts() == before
    outbox = Outbox(schema=name)
    with postgres.begin() as connection:
        check_schema(connection, outbox.tables)
        connection.execute(sa.text(f'drop index "{name}".outbox_sent_id_idx'))
    with postgres.begin() as connection, pytest.raises(SchemaMismatch, match=r"lacks an index on \(id\)") as caught:
        check_schema(connection, outbox.tables)
    mend = str(caught.value).partition("To mend: ")[2].partition(". Then")[0]
    with postgres.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text(mend))
        check_schema(connection, outbox.tables)
    migrate(postgres, schema=name, to=0, downgrade=True)
    assert sa.inspect(postgres).get_table_names(schema=name) == []
