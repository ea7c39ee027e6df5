"""Migrating tables in use: nobody queues behind us for long, and who holds us up is said."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier

import pytest
import sqlalchemy as sa

from outbox import ConfigurationError, Outbox, SchemaMismatch, StoreUnavailable
from outbox.observe.schema import check_schema
from outbox_migrations import LATEST, STEPS, migrate, plan
from outbox_migrations import _online as online
from outbox_migrations._operations import LOCK_TIMEOUT
from tests.migrations.older import Older
from tests.migrations.project import Project

MARGIN = 2.0  # seconds that a loaded machine adds to what a writer waits
WITHIN = 60.0


@contextmanager
def holding(older: Older, table: str = "dead_letter") -> Iterator[sa.Connection]:
    """A transaction that has written to a table and stays open."""
    with older.engine.connect() as connection:
        if older.engine.dialect.name == "postgresql":
            connection.execute(sa.text("set application_name = 'nightly-report'"))
        connection.execute(older.tables[table].insert(), older.letter("open", None))
        yield connection
        connection.rollback()


@contextmanager
def writing(older: Older) -> Iterator[list[float]]:
    """Somebody who goes on writing messages and dead letters; yields how long each took, in seconds."""
    stop, took = threading.Event(), [0.0]

    def write() -> None:
        while not stop.is_set():
            started = time.monotonic()
            older.add("busy")
            with older.engine.begin() as connection:
                connection.execute(older.tables["dead_letter"].insert(), older.letter("open", None))
            took.append(time.monotonic() - started)

    with ThreadPoolExecutor(1) as threads:
        writer = threads.submit(write)
        try:
            yield took
        finally:
            stop.set()
            writer.result(WITHIN)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def waits(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "outbox.migrations"]


def by_alembic(folder: Path, older: Older) -> Callable[[], object]:
    project = Project(folder, older.engine)
    project.revision(f"outbox_migrations.upgrade(op, to={LATEST})")
    return project.upgrade


@pytest.mark.parametrize("way", ["migrate", "alembic"])
def test_a_long_transaction_makes_us_try_again_and_say_who_while_writers_go_on(
    tmp_path: Path, server: sa.Engine, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    older = Older(server)
    before = older.fill()
    run = by_alembic(tmp_path, older) if way == "alembic" else lambda: migrate(server)
    caplog.set_level(logging.WARNING, "outbox.migrations")
    with ThreadPoolExecutor(1) as threads, writing(older) as took:
        with holding(older) as holder:
            pid = holder.scalar(
                sa.text("select pg_backend_pid()" if server.dialect.name == "postgresql" else "select connection_id()")
            )
            migration: Future[object] = threads.submit(run)
            # built beside writers it waits once, and says so once
            until(lambda: len(waits(caplog)) >= (1 if server.dialect.name == "postgresql" and way == "migrate" else 2))
            assert not migration.done()
            seen = len(took)
            until(lambda: len(took) > seen + 20)
        migration.result(WITHIN)
    assert all(f"process {pid} (" in text for text in waits(caplog)[:2])
    if server.dialect.name == "postgresql":
        assert "application 'nightly-report'" in waits(caplog)[0]
    assert max(took) < max(LOCK_TIMEOUT, 1.0) + MARGIN
    assert older.version() == str(LATEST)
    counts = older.counts()
    assert counts["message"] == before["message"] + len(took) - 1
    assert counts["dead_letter"] == before["dead_letter"] + len(took) - 1
    with server.connect() as connection:
        check_schema(connection, Outbox().tables)


def test_patience_ends_with_an_error_that_names_the_holder_and_nothing_is_half_done(server: sa.Engine) -> None:
    older = Older(server)
    before = older.fill()
    with holding(older), pytest.raises(StoreUnavailable, match=r"process \d+ \(.*\. Nothing is half-done"):
        migrate(server, patience=3)
    assert (older.version(), older.counts()) == ("1", before)
    migrate(server)
    assert older.version() == str(LATEST)


def test_a_vacuum_is_waited_for_and_named(postgres: sa.Engine) -> None:
    older = Older(postgres)
    with postgres.connect() as connection:
        connection.execute(sa.text("lock table outbox_parked in share update exclusive mode"))
        with pytest.raises(StoreUnavailable, match=r"set storage of outbox_parked: .*process \d+"):
            migrate(postgres, patience=1.5)
    assert older.version() == "1"
    migrate(postgres)


def test_an_index_that_was_cut_off_is_named_and_built_anew(postgres: sa.Engine) -> None:
    older = Older(postgres)
    with holding(older), postgres.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("set lock_timeout = '100ms'"))
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            connection.execute(
                sa.text("create index concurrently outbox_dead_letter_closed_at_idx on outbox_dead_letter (closed_at)")
            )
        connection.invalidate()
    with postgres.begin() as connection:
        connection.execute(sa.text("update outbox_checkpoint set value = '2' where name = 'schema_version'"))
        with pytest.raises(
            SchemaMismatch, match=r"lacks an index on \(closed_at\) \(an attempt to build it was cut off\)"
        ):
            check_schema(connection, Outbox().tables)
        connection.execute(sa.text("update outbox_checkpoint set value = '1' where name = 'schema_version'"))
    migrate(postgres)
    with postgres.connect() as connection:
        check_schema(connection, Outbox().tables)


def test_of_several_processes_that_upgrade_at_once_one_does_and_the_others_wait(engine: sa.Engine) -> None:
    """On PostgreSQL a wait inside a statement would be one for which building the index waits."""
    older = Older(engine)
    older.fill()
    start = Barrier(4)

    def replica() -> list[str]:
        start.wait()
        return migrate(engine)

    with ThreadPoolExecutor(4) as threads:
        results = [future.result(WITHIN) for future in [threads.submit(replica) for _ in range(4)]]
    assert sorted(results) == [[], [], [], [step.name for step in STEPS[1:]]]
    assert older.version() == str(LATEST)


def test_a_large_index_is_not_built_in_a_transaction_that_is_not_ours(
    postgres: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = Older(postgres)
    older.fill()
    monkeypatch.setattr(online, "SMALL", 0)
    with postgres.begin() as connection, pytest.raises(ConfigurationError, match="Run `outbox migrate` beforehand"):
        migrate(connection)
    assert older.version() == "1"
    migrate(postgres)


def test_a_large_index_is_built_outside_alembics_transaction(
    tmp_path: Path, postgres: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = Older(postgres)
    before = older.fill()
    monkeypatch.setattr(online, "SMALL", 0)
    statements: list[str] = []
    sa.event.listen(postgres, "before_cursor_execute", lambda *args: statements.append(args[2]))
    by_alembic(tmp_path, older)()
    assert any("CREATE INDEX CONCURRENTLY" in statement for statement in statements)
    assert (older.version(), older.counts()) == (str(LATEST), before)
    with postgres.connect() as connection:
        assert connection.scalar(sa.text("select version_num from alembic_version")) == "0001"
        check_schema(connection, Outbox().tables)


def test_a_plan_says_what_each_statement_locks_and_does_nothing(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        fresh = plan(connection)
        assert {planned.locks for planned in fresh} == {"nothing: the table is new"}
        assert len([planned for planned in fresh if planned.what.startswith("create table")]) == 11
        assert sa.inspect(connection).get_table_names() == []
    older = Older(engine)
    older.fill()
    with engine.connect() as connection:
        said = {planned.what: planned.locks for planned in plan(connection)}
        assert older.version() == "1"
    index = said["create index outbox_dead_letter_closed_at_idx on outbox_dead_letter"]
    assert {
        "postgresql": "reads and writes go on; it waits for the transactions that are open, and nobody waits for it",
        "mysql": "LOCK=NONE on outbox_dead_letter: reads and writes go on",
        "sqlite": "the database's one write lock, until the commit",
    }[engine.dialect.name.replace("mariadb", "mysql")] in index
    assert ("set storage of outbox_message" in said) == (engine.dialect.name == "postgresql")
    migrate(engine)
    with engine.connect() as connection:
        assert plan(connection) == []


def test_the_locks_that_a_plan_names_are_those_that_postgresql_takes(postgres: sa.Engine) -> None:
    """Each statement in a transaction of its own, and then what pg_locks says of the table."""
    older = Older(postgres)
    from outbox_migrations._step import Place

    for operation in STEPS[1].upgrade(Place("postgresql", None, "outbox_")):
        with postgres.connect() as connection:
            connection.execute(operation.statement)
            taken = set(
                connection.scalars(
                    sa.text("select mode from pg_locks where relation = to_regclass(:t) and pid = pg_backend_pid()"),
                    {"t": operation.table.name},
                )
            )
            expected = operation.mode.title().replace(" ", "") + "Lock"
            assert expected in taken
            assert "AccessExclusiveLock" not in taken
    assert older.version() == "1"
