"""An inbox in daily partitions: they are made ahead and dropped whole, and nothing is lost, doubled or held up by it."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

import outbox_migrations
from outbox import Outbox, OutboxError, Relay
from outbox._message import new_id
from outbox.cleanup import Cleanup, Retention, days
from outbox.dialects import clock
from outbox.observe.partitions import Partition, inbox_partitions, lowest_id
from outbox.observe.status import status
from outbox.relay import cleaning
from outbox.stores import open_store
from tests.cleanup.past import DAY, KEEP, buried, cleanup, handled, ids, tried, unsent
from tests.relay.database import Database
from tests.relay.running import eventually, relay, running
from tests.relay.scripted import Scripted
from tests.relay.test_cleaning import Owns

REPOSITORY = Path(__file__).resolve().parents[2]
TODAY = dt.datetime.now(dt.UTC).date()


def id_of(days_ago: int) -> uuid.UUID:
    """Of a message that was made at noon of that day."""
    noon = dt.datetime.combine(TODAY - dt.timedelta(days=days_ago), dt.time(12), dt.UTC)
    ms = int(noon.timestamp() * 1000)
    return uuid.UUID(int=(ms << 80) | (new_id().int & ((1 << 80) - 1)))


def parts(database: Database) -> dict[str, Partition]:
    with database.engine.connect() as connection:
        return {one.name: one for one in inbox_partitions(connection, database.tables) or ()}


def name_of(day: dt.date) -> str:
    return f"outbox_inbox_d{day:%Y%m%d}"


def day(database: Database, days_ago: int) -> str:
    """A partition of that day, as cleanup would have made it a week before."""
    date = TODAY - dt.timedelta(days=days_ago)
    first, until = lowest_id(date), lowest_id(date + dt.timedelta(days=1))
    with database.engine.begin() as connection:
        connection.exec_driver_sql(
            f"create table {name_of(date)} partition of outbox_inbox for values from ('{first}') to ('{until}')"
        )
    return name_of(date)


def tables(database: Database) -> set[str]:
    return set(sa.inspect(database.engine).get_table_names())


@pytest.fixture
def database(on_postgresql: Database) -> Database:
    assert outbox_migrations.partition_inbox(on_postgresql.engine)
    return on_postgresql


# ---------------------------------------------------------------- made


def test_the_days_to_come_are_made_and_rows_go_where_they_belong(database: Database) -> None:
    assert set(parts(database)) == {"outbox_inbox_default"}
    ahead = [TODAY + dt.timedelta(days=n) for n in range(1, days.AHEAD + 1)]
    assert cleanup(database).run().made == ahead
    assert set(parts(database)) == {"outbox_inbox_default", *map(name_of, ahead)}
    assert cleanup(database).run().made == []
    assert len(parts(database)) == days.AHEAD + 1

    tomorrow, foreign = id_of(-1), uuid.uuid4()
    handled(database, 0, tomorrow, foreign)
    with database.engine.connect() as connection:
        where = sa.text("select message_id, tableoid::regclass::text from outbox_inbox")
        assert dict(map(tuple, connection.execute(where))) == {
            tomorrow: name_of(ahead[0]),
            foreign: "outbox_inbox_default",
        }


def test_a_day_whose_rows_came_before_its_partition_stays_in_the_default_one(database: Database) -> None:
    """Neither relay nor cleanup had run for days."""
    early = id_of(-2)
    handled(database, 0, early)
    (note,) = cleanup(database).run().notes
    assert f"partition of {TODAY + dt.timedelta(days=2)} is not possible: the default one has ids of that day" in note
    missing = name_of(TODAY + dt.timedelta(days=2))
    assert missing not in tables(database)
    assert len(parts(database)) == days.AHEAD
    with database.engine.begin() as connection:
        assert database.outbox.claim(connection, "billing", early) is False
        assert database.outbox.claim(connection, "billing", id_of(-2)) is True


def test_where_the_default_one_takes_too_long_to_be_read_consumers_wait_for_it_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not seven times in each sweep, for as long as it is that large."""
    monkeypatch.setattr(days, "WORK", "3ms")
    with database.engine.begin() as connection:
        connection.exec_driver_sql(
            "insert into outbox_inbox (consumer, message_id, outcome)"
            " select 'billing', overlay(gen_random_uuid()::text placing 'ff' from 1)::uuid, 'done'"
            " from generate_series(1, 300000)"
        )
    (note,) = cleanup(database).run().notes
    assert "making the inbox's partition" in note
    assert "took longer than 3ms" in note
    assert set(parts(database)) == {"outbox_inbox_default"}
    monkeypatch.undo()
    assert cleanup(database).run().notes == []
    assert len(parts(database)) == days.AHEAD + 1


def test_a_claim_is_true_once_in_whatever_partition(database: Database) -> None:
    cleanup(database).run()
    for id in (id_of(-1), id_of(0), uuid.uuid4(), uuid.uuid5(uuid.NAMESPACE_DNS, "x")):
        for expected in (True, False):
            with database.engine.begin() as connection:
                assert database.outbox.claim(connection, "billing", id) is expected


async def test_a_relay_makes_them_too(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.relay.cleaning.FIRST", 0.01)
    old = day(database, 40)
    handled(database, 39, id_of(40))
    async with running(Relay(database.outbox, database=database.url, transport=Scripted(), retention=KEEP)):
        await eventually(lambda: len(parts(database)) == days.AHEAD + 1 and old not in tables(database))


# ---------------------------------------------------------------- dropped


def test_a_day_that_is_over_goes_as_a_whole(database: Database) -> None:
    old, young = day(database, 40), day(database, 20)
    handled(database, 39, *[id_of(40) for _ in range(30)])
    kept = handled(database, 19, *[id_of(20) for _ in range(20)])
    foreign = [uuid.uuid4() for _ in range(10)]
    handled(database, 39, *foreign[:7])
    kept += handled(database, 19, *foreign[7:])
    done = cleanup(database).run()
    assert done.removed == {"inbox": 37}
    assert done.notes == []
    assert old not in tables(database)
    assert young in parts(database)
    assert ids(database, "inbox") == set(kept)


@pytest.mark.parametrize("why", ["attempt", "letter", "letter of the relay", "unsent", "young"])
def test_a_day_with_a_row_that_is_needed_stays_and_loses_its_other_rows_later(database: Database, why: str) -> None:
    old = day(database, 40)
    (needed, *others) = [id_of(40) for _ in range(5)]
    handled(database, 39 if why != "young" else 3, needed)
    handled(database, 39, *others)
    match why:
        case "attempt":
            tried(database, needed, "replay")
        case "letter":
            buried(database, needed)
        case "letter of the relay":
            buried(database, needed, consumer="")
        case "unsent":
            unsent(database, needed, 40)
    cleanup(database).run()
    assert old in parts(database)
    assert ids(database, "inbox") == {needed}, "what is left of a day is deleted row by row"


def test_a_day_is_not_deleted_from_shortly_before_it_is_dropped(database: Database) -> None:
    names = {
        day(database, 30),
        day(database, 31),
    }  # of which one has the row: 31 days ago, the last hour of it, is too late
    date = TODAY - dt.timedelta(days=30)
    rows = handled(database, 30.01, uuid.UUID(int=lowest_id(date).int | 1))
    assert cleanup(database).run().removed == {}
    assert names <= parts(database).keys() | {name_of(TODAY - dt.timedelta(days=31))}
    assert name_of(date) in parts(database)
    assert ids(database, "inbox") == set(rows)


def test_a_row_that_comes_between_the_look_and_the_lock_keeps_its_day(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, late = day(database, 40), id_of(40)
    handled(database, 39, id_of(40))
    look = days.Days._look

    def looked(self: days.Days, one: Partition, connection: sa.Connection) -> int:
        found = look(self, one, connection)
        handled(database, 0, late)
        return found

    monkeypatch.setattr(days.Days, "_look", looked)
    for isolation in ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"):
        engine = database.engine.execution_options(isolation_level=isolation)
        Cleanup(database.outbox, database=engine, retention=KEEP).run()
        assert old in parts(database)
        assert late in ids(database, "inbox")
        database.execute(sa.delete(database.tables.inbox).where(database.tables.inbox.c.message_id == late))


def test_a_handler_that_is_at_it_keeps_its_day_and_nobody_waits(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is not committed yet: the lock is not had, and cleanup goes on with something else."""
    monkeypatch.setattr(days, "WORK", "0")  # only the wait for the lock has an end
    old, late = day(database, 40), id_of(40)
    handled(database, 39, id_of(40))
    foreign = uuid.uuid4()
    handled(database, 39, foreign)
    with database.engine.connect() as handler:
        assert database.outbox.claim(handler, "billing", late)
        assert cleanup(database).run().removed == {"inbox": 1 + 1}  # foreign; and row by row, after two days more
        assert old in parts(database)
        handler.commit()
    assert ids(database, "inbox") == {late}
    cleanup(database).run()
    assert ids(database, "inbox") == {late}
    assert old in parts(database)


def test_a_clock_that_has_jumped_drops_and_makes_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    old = day(database, 20)
    handled(database, 19, id_of(20))
    monkeypatch.setattr("outbox.cleanup.sweep.clock", lambda seconds=0.0: clock(seconds + 30 * DAY))
    with pytest.raises(OutboxError, match="clock"):
        cleanup(database).run()
    assert set(parts(database)) == {"outbox_inbox_default", old}


def test_retention_for_ever_drops_nothing_and_makes_days(database: Database) -> None:
    old = day(database, 400)
    handled(database, 399, id_of(400))
    assert cleanup(database, Retention.forever()).run().removed == {}
    assert old in parts(database)
    assert len(parts(database)) == days.AHEAD + 2


# ---------------------------------------------------------------- archived, killed

# argv: database, file, which call of which function is the last
KILLED = """
import os, signal, sys
from outbox import Outbox
from outbox.cleanup import Cleanup, _cleanup
from outbox.cleanup.archive import Archive
from outbox.cleanup.days import Days
where, name = {"write": (Archive, "write"), "drop": (Days, "_drop"), "detach": (Days, "_detach")}[sys.argv[3]]
call = getattr(where, name)
def kill(self, *given):
    if sys.argv[3] == "drop":
        os.kill(os.getpid(), signal.SIGKILL)
    call(self, *given)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(where, name, kill)
_cleanup.time.sleep = lambda seconds: None
Cleanup(Outbox(), database=sys.argv[1]).run(archive=sys.argv[2])
"""


@pytest.mark.parametrize("at", ["detach", "drop", "write"])
def test_killed_anywhere_each_row_is_in_the_file_before_it_is_gone(database: Database, tmp_path: Path, at: str) -> None:
    old, file = day(database, 40), tmp_path / "archive.jsonl"
    rows = handled(database, 39, *[id_of(40) for _ in range(2500)])
    command = [sys.executable, "-c", KILLED, database.url, str(file), at]
    killed = subprocess.run(command, cwd=REPOSITORY, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    in_file = {uuid.UUID(json.loads(line)["message_id"]) for line in file.read_text().splitlines()}
    assert in_file | ids(database, "inbox") | _rows_of(database, old) == set(rows)

    done = cleanup(database).run(archive=os.fspath(file))
    assert done.removed == {"inbox": 2500}
    assert old not in tables(database)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["table"] for line in lines} == {"outbox_inbox"}
    assert {uuid.UUID(line["message_id"]) for line in lines} == set(rows)


def _rows_of(database: Database, name: str) -> set[uuid.UUID]:
    if name not in tables(database):
        return set()
    with database.engine.connect() as connection:
        return set(connection.exec_driver_sql(f"select message_id from {name}").scalars())


def test_a_table_of_the_users_that_is_called_like_a_day_is_left_alone(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.exec_driver_sql("create table outbox_inbox_d20200101 (n int)")
        connection.exec_driver_sql("comment on table outbox_inbox_d20200101 is 'what the DBA keeps of it'")
    cleanup(database).run()
    assert "outbox_inbox_d20200101" in tables(database)


# ---------------------------------------------------------------- roles, status


@pytest.fixture
def limited(on_postgresql: Database) -> Iterator[sa.Engine]:
    """A role that may clean up and claim, and owns nothing; granted while the inbox was one table."""
    name = f"outbox_days_{uuid.uuid4().hex[:8]}"
    with on_postgresql.engine.begin() as connection:
        connection.exec_driver_sql(f"create role {name} login")
        connection.exec_driver_sql(outbox_migrations.grants("postgresql", {"cleanup": name, "claim": name}))
    engine = sa.create_engine(sa.make_url(on_postgresql.url).set(username=name))
    yield engine
    engine.dispose()
    with on_postgresql.engine.begin() as connection:
        connection.exec_driver_sql(f"drop owned by {name}; drop role {name}")


def test_who_does_not_own_the_tables_is_told_and_deletes_row_by_row(limited: sa.Engine, database: Database) -> None:
    old = day(database, 40)
    handled(database, 39, id_of(40))
    done = Cleanup(database.outbox, database=limited, retention=KEEP).run()
    assert done.removed == {"inbox": 1}
    (note,) = done.notes
    assert "only the owner of outbox_inbox may" in note
    assert old in parts(database)


def test_what_was_granted_stays_granted_on_both_ways(limited: sa.Engine, database: Database) -> None:
    cleanup(database).run()
    for id in (id_of(-1), uuid.uuid4()):
        for expected in (True, False):
            with limited.begin() as connection:
                assert database.outbox.claim(connection, "billing", id) is expected
    with pytest.raises(sa.exc.ProgrammingError, match="denied"), limited.begin() as connection:
        connection.exec_driver_sql("truncate outbox_inbox")
    assert outbox_migrations.unpartition_inbox(database.engine)
    with limited.begin() as connection:
        assert database.outbox.claim(connection, "billing", id) is False
        assert database.outbox.claim(connection, "billing", id_of(-1)) is True
    done = Cleanup(database.outbox, database=limited, retention=KEEP).run()
    assert done.notes == []


@pytest.mark.parametrize("partitioned", [True, False])
def test_status_says_how_large_it_is_in_partitions_and_as_one_table(database: Database, partitioned: bool) -> None:
    if not partitioned:
        outbox_migrations.unpartition_inbox(database.engine)
    handled(database, 0, *[uuid.uuid4() for _ in range(50)])
    with database.engine.connect() as connection:
        found = status(connection, database.tables).cleanup
        names = "outbox_inbox_default" if partitioned else "outbox_inbox"
        size = connection.scalar(sa.text(f"select pg_total_relation_size('{names}')"))
        letters = connection.scalar(sa.text("select pg_total_relation_size('outbox_dead_letter')"))
    assert found is not None
    assert found.bytes is not None
    assert found.bytes >= size + letters > 0


def test_status_says_that_it_is_in_partitions_and_whether_tomorrow_has_one(database: Database) -> None:
    def line() -> str:
        with database.engine.connect() as connection:
            found = status(connection, database.tables).cleanup
        assert found is not None
        return found.line()

    assert "in partitions, and no day has one yet: start a relay or run `outbox cleanup`" in line()
    assert "; inbox and dead letters take " in line()
    cleanup(database).run()
    assert f"in partitions up to {TODAY + dt.timedelta(days=days.AHEAD)}" in line()
    handled(database, 0, *[uuid.uuid4() for _ in range(50)])
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("analyze outbox_inbox_default")
    assert "100% of the rows are in the default one" in line()


# ---------------------------------------------------------------- put into partitions, and back, while it is in use


def test_consumers_go_on_while_an_inbox_is_put_into_partitions_and_back(on_postgresql: Database) -> None:
    database, stop = on_postgresql, threading.Event()
    claimed: list[list[uuid.UUID]] = [[] for _ in range(4)]
    failed: list[BaseException] = []
    shared = [new_id() for _ in range(4000)]

    def consume(mine: list[uuid.UUID]) -> None:
        for id in shared:
            if stop.is_set():
                return
            try:
                with database.engine.begin() as connection:
                    if database.outbox.claim(connection, "billing", id):
                        mine.append(id)
            except BaseException as error:
                failed.append(error)
                return

    threads = [threading.Thread(target=consume, args=(mine,)) for mine in claimed]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert outbox_migrations.partition_inbox(database.engine)
            cleanup(database).run()
            assert outbox_migrations.unpartition_inbox(database.engine)
    finally:
        for thread in threads:
            thread.join()
    assert failed == []
    every = [id for mine in claimed for id in mine]
    assert len(every) == len(set(every)) == len(shared)
    assert ids(database, "inbox") == set(shared)
    with database.engine.connect() as connection:
        assert inbox_partitions(connection, database.tables) is None


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_what_is_claimed_while_the_way_back_waits_for_its_lock_is_carried_over(
    database: Database, isolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever isolation level engines of the application have: a row that is left behind would be an effect twice."""
    monkeypatch.setattr("outbox_migrations._online.LOCK_TIMEOUT", 30)
    cleanup(database).run()
    late = id_of(-1)
    engine = database.engine.execution_options(isolation_level=isolation)
    with database.engine.connect() as handler:
        assert database.outbox.claim(handler, "billing", late)
        with ThreadPoolExecutor(1) as pool:
            uniting = pool.submit(outbox_migrations.unpartition_inbox, engine)
            _until_it_waits(database, uniting)
            handler.commit()
            assert uniting.result()
    with database.engine.begin() as connection:
        assert database.outbox.claim(connection, "billing", late) is False


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_transaction_whose_snapshot_is_older_than_its_lock_does_not_copy_the_inbox(
    database: Database, isolation: str
) -> None:
    script = outbox_migrations.script_inbox("postgresql", partitioned=False).replace("%", "%%")
    engine = database.engine.execution_options(isolation_level=isolation)
    with engine.begin() as connection, pytest.raises(OutboxError, match=f"{isolation}.* READ COMMITTED"):
        outbox_migrations.unpartition_inbox(connection)
    with engine.connect() as connection, pytest.raises(sa.exc.DBAPIError, match="at READ COMMITTED only"):
        connection.exec_driver_sql(script)
    assert "outbox_inbox_default" in parts(database)


def _until_it_waits(database: Database, work: Future[bool]) -> None:
    waiting = "select count(*) from pg_locks where not granted and relation = 'outbox_inbox'::regclass"
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not work.done() and not connection.exec_driver_sql(waiting).scalar():
            pass


def test_a_snapshot_of_the_inbox_is_waited_for_and_named(database: Database) -> None:
    with database.engine.connect() as reading:
        reading.exec_driver_sql("select count(*) from outbox_inbox")
        with pytest.raises(OutboxError, match="was locked for"):
            outbox_migrations.unpartition_inbox(database.engine, patience=0.5)
    assert outbox_migrations.unpartition_inbox(database.engine)
    assert outbox_migrations.unpartition_inbox(database.engine) is False


async def test_a_relay_and_its_messages_do_not_notice(database: Database) -> None:
    broker = Scripted()
    database.add("a", "b")
    async with running(relay(database, broker)):
        await eventually(lambda: database.count() == 0)
        await asyncio.to_thread(outbox_migrations.unpartition_inbox, database.engine)
        database.add("c")
        await eventually(lambda: database.count() == 0)
    assert broker.keys() == ["a", "b", "c"]


def test_two_outboxes_of_one_database_are_each_put_into_partitions_by_itself(on_postgresql: Database) -> None:
    prefix = "an_outbox_with_a_long_prefix__x"
    with on_postgresql.engine.begin() as connection:
        connection.exec_driver_sql("create schema other")
    other = Outbox(schema="other", prefix=prefix)
    outbox_migrations.migrate(on_postgresql.engine, schema="other", prefix=prefix)
    assert outbox_migrations.partition_inbox(on_postgresql.engine, schema="other", prefix=prefix)
    assert parts(on_postgresql) == {}
    Cleanup(other, database=on_postgresql.engine).run()
    with on_postgresql.engine.connect() as connection:
        found = inbox_partitions(connection, other.tables)
        assert found is not None
        assert len(found) == days.AHEAD + 1
        assert all(one.name.startswith(f"{prefix}inbox_d") for one in found)


def test_all_of_an_inbox_stays_in_its_schema_where_another_comes_first_in_the_search_path(
    on_postgresql: Database,
) -> None:
    """Where others do not look, and where cleanup does not look for what it has detached."""
    with on_postgresql.engine.begin() as connection:
        connection.exec_driver_sql("create schema first")
    url = sa.make_url(on_postgresql.url).update_query_dict({"options": "-csearch_path=first,public"})
    engine = sa.create_engine(url)
    assert outbox_migrations.partition_inbox(engine)
    Cleanup(on_postgresql.outbox, database=engine, retention=KEEP).run()
    engine.dispose()
    assert len(parts(on_postgresql)) == days.AHEAD + 1
    with on_postgresql.engine.connect() as connection:
        assert sa.inspect(connection).get_table_names("first") == []


def test_other_databases_say_that_they_have_none(on_sqlite: Database) -> None:
    with pytest.raises(OutboxError, match="PostgreSQL only, this is sqlite"):
        outbox_migrations.partition_inbox(on_sqlite.engine)


# ---------------------------------------------------------------- several at once


@pytest.mark.parametrize("before", ["_look", "_detach", "_drop", "_make"])
def test_two_cleanups_at_once_do_it_once(database: Database, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """The other has done all of it while this one was about to."""
    old = day(database, 40)
    handled(database, 39, *[id_of(40) for _ in range(3)])
    chore = getattr(days.Days, before)
    others: list[int] = []

    def overtaken(self: days.Days, *given: object) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(days.Days, before, chore)
            if not others:
                others.append(cleanup(database).run().removed.get("inbox", 0))
        found: int = chore(self, *given)
        return found

    monkeypatch.setattr(days.Days, before, overtaken)
    done = cleanup(database).run()
    assert done.removed.get("inbox", 0) + others[0] == 3
    assert old not in tables(database)
    assert len(parts(database)) == days.AHEAD + 1
    assert ids(database, "inbox") == set()


async def test_a_relay_begins_its_sweep_anew_where_partitions_came_or_went_meanwhile(database: Database) -> None:
    handled(database, 39, *[uuid.uuid4() for _ in range(600)])
    store = open_store(database.url, database.tables)
    mine = cleaning.Cleaning(store, Owns(0), KEEP)  # type: ignore[arg-type]
    while database.count("inbox") == 600:
        await mine.step()
    outbox_migrations.unpartition_inbox(database.engine)
    for _ in range(30):
        await mine.step()
    assert database.count("inbox") == 0
    await store.close()
