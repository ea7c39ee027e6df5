"""Where reading starts on PostgreSQL: a plain cursor and a plain floor send messages of a key in the wrong order; the
store's floor never does, and loses nothing. Writers lock an entity's row and take the position last, as the outbox does."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest

from outbox.stores import postgresql
from outbox.stores.engine import sync_engine_for
from outbox.stores.postgresql import WAITING, Floor, PostgresqlStore
from tests.relay.database import Database, at, key_in_bucket

KEYS = 8
WRITERS = 12
Sent = list[tuple[str, int]]


class Writers:
    """Threads that each lock a key's row, take its next number, insert a message with it, and commit, slowly at times."""

    def __init__(self, url: str, *, slow: bool) -> None:
        self.url, self.slow = url, slow
        self.last: Counter[str] = Counter()
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.write) for _ in range(WRITERS)]

    def write(self) -> None:
        with psycopg.connect(self.url) as connection:
            while not self.over.is_set():
                key = f"k{random.randrange(KEYS)}"
                update = "update entity set n = n + 1 where key = %s returning n"
                (n,) = connection.execute(update, (key,)).fetchone() or (0,)
                connection.execute(
                    "insert into outbox_message (id, bucket, topic, key, payload)"
                    " values (gen_random_uuid(), 0, 't', %s, %s)",
                    (key, str(n).encode()),
                )
                if self.slow and random.random() < 0.02:
                    time.sleep(random.random() * 0.02)  # a slow commit: a synchronous standby, a pause, a lost CPU
                connection.commit()
                self.last[key] = max(self.last[key], n)


@contextmanager
def writing(database: Database, *, slow: bool) -> Iterator[Writers]:
    with psycopg.connect(database.url, autocommit=True) as connection:
        connection.execute("drop table if exists entity")
        connection.execute("truncate outbox_message")
        connection.execute("create table entity (key text primary key, n int)")
        connection.execute("insert into entity select 'k' || g, 0 from generate_series(0, 7) g")
    writers = Writers(database.url, slow=slow)
    for thread in writers.threads:
        thread.start()
    try:
        yield writers
    finally:
        writers.over.set()
        for thread in writers.threads:
            thread.join()


def inversions(sent: Sent) -> int:
    highest: Counter[str] = Counter()
    found = 0
    for key, n in sent:
        found += n < highest[key]
        highest[key] = max(highest[key], n)
    return found


def cursor(start: int, sweep: bool) -> int:
    return start


def floor_with_sweep(start: int, sweep: bool) -> int:
    return 0 if sweep else start


def read_plainly(url: str, writers: Writers, seconds: float, start_at: Callable[[int, bool], int]) -> Sent:
    """Read above the highest position settled so far, as one would at first."""
    sent: Sent = []
    with psycopg.connect(url, autocommit=True) as connection:
        highest, swept, end = 0, time.monotonic(), time.monotonic() + seconds
        while time.monotonic() < end:
            sweep = time.monotonic() - swept > 0.5
            swept = time.monotonic() if sweep else swept
            rows = connection.execute(
                "select position, key, payload from outbox_message where position > %s order by position limit 1000",
                (start_at(highest, sweep),),
            ).fetchall()
            sent += [(key, int(payload)) for _, key, payload in rows]
            connection.execute(
                "delete from outbox_message where position = any(%s::bigint[])", ([row[0] for row in rows],)
            )
            highest = max([highest, *(row[0] for row in rows)])
        connection.execute("delete from outbox_message")
    return sent


@pytest.mark.parametrize("start_at", [cursor, floor_with_sweep])
def test_a_plain_start_inverts_keys_or_loses_messages(
    on_postgresql: Database, start_at: Callable[[int, bool], int]
) -> None:
    for _ in range(10):
        with writing(on_postgresql, slow=True) as writers:
            sent = read_plainly(on_postgresql.url, writers, 1.5, start_at)
        lost = sum(writers.last.values()) - len(sent)
        if inversions(sent) or (start_at is cursor and lost > WRITERS):
            return
    pytest.fail("neither was seen: do these writers still overlap?")


@pytest.mark.parametrize("limit", [1000, 7], ids=["large pages", "small pages"])
async def test_the_store_inverts_nothing_and_loses_nothing(
    on_postgresql: Database, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "LOOK", 0.002)  # the floor follows closely, so that a mistake shows
    store = PostgresqlStore(on_postgresql.tables, sync_engine_for(on_postgresql.url), ours=True)
    sent: Sent = []
    floors = set()
    with writing(on_postgresql, slow=True) as writers:
        end, over = time.monotonic() + 5, False
        while True:
            if time.monotonic() > end and not over:
                writers.over.set()
                await asyncio.to_thread(lambda: [thread.join() for thread in writers.threads])
                over = True
            finished = over
            rows = await store.read(None, (), (), limit)
            sent += [(row.key or "", int(row.payload or b"")) for row in rows]
            await store.settle(rows)
            floors.add(store._floor.position)
            if finished and not rows:
                break
    await store.close()
    assert inversions(sent) == 0
    assert len(sent) == sum(writers.last.values()) > 500
    assert on_postgresql.count() == 0
    assert len(floors) > 3, "the floor did not move, so nothing was tried here"


# ------------------------------------------------------------ one at a time


@pytest.fixture
async def store(on_postgresql: Database, monkeypatch: pytest.MonkeyPatch) -> PostgresqlStore:
    monkeypatch.setattr(postgresql, "LOOK", 0.0)  # each read looks
    return PostgresqlStore(on_postgresql.tables, on_postgresql.engine)


async def read_all(store: PostgresqlStore, in_flight: dict[int, int], times: int = 6, **filters: object) -> list[str]:
    """Read often enough for the floor to go as far as it may; what was read stays in flight."""
    found = []
    for _ in range(times):
        rows = await store.read(filters.get("buckets"), in_flight, filters.get("topics", ()), 100)  # type: ignore[arg-type]
        in_flight.update({row.position: row.bucket for row in rows})
        found += [row.key or "" for row in rows]
    return found


async def test_the_floor_waits_for_the_open_transaction_with_the_newest_id(
    store: PostgresqlStore, on_postgresql: Database
) -> None:
    """Its id is not below the snapshot's xmax, which is the highest id that has *ended*, plus one."""
    in_flight: dict[int, int] = {}
    with psycopg.connect(on_postgresql.url) as early, on_postgresql.open_transaction() as late:
        early.execute("select pg_current_xact_id()")  # has locked its entity, and has no position yet
        on_postgresql.add("late", connection=late)  # a newer id, a lower position
        early.execute("insert into outbox_message (id, bucket, topic, key) values (gen_random_uuid(), 0, 't', 'early')")
        early.commit()
        assert await read_all(store, in_flight) == ["early"]
        late.get_transaction().commit()  # type: ignore[union-attr]
    assert await read_all(store, in_flight) == ["late"]
    await store.close()


async def test_a_held_snapshot_freezes_the_floor_and_nothing_is_lost(
    store: PostgresqlStore, on_postgresql: Database
) -> None:
    in_flight: dict[int, int] = {}
    with psycopg.connect(on_postgresql.url) as holder:
        holder.execute("set transaction isolation level repeatable read")
        holder.execute("select count(*) from outbox_message")
        holder.execute("select pg_current_xact_id()")
        on_postgresql.add("a")
        assert await read_all(store, in_flight) == ["a"]
        frozen = store._floor.position
        on_postgresql.add("b")
        assert await read_all(store, in_flight) == ["b"]
        assert store._floor.position == frozen
    assert await read_all(store, in_flight) == []
    assert store._floor.position == max(in_flight)
    on_postgresql.add("c")
    assert await read_all(store, in_flight) == ["c"]
    await store.close()


async def test_a_late_commit_comes_before_what_was_committed_after_it(
    store: PostgresqlStore, on_postgresql: Database
) -> None:
    in_flight: dict[int, int] = {}
    with on_postgresql.open_transaction() as slow:
        on_postgresql.add("slow-1", connection=slow)
        for n in range(5):
            on_postgresql.add(f"quick-{n}")
            assert await read_all(store, in_flight) == [f"quick-{n}"]
            await store.settle([at(position) for position in in_flight])
    on_postgresql.add("slow-2")
    assert await read_all(store, in_flight) == ["slow-1", "slow-2"]
    await store.close()


async def test_a_late_commit_inside_a_range_that_is_settled_is_read_afterwards(
    store: PostgresqlStore, on_postgresql: Database
) -> None:
    with on_postgresql.open_transaction() as slow:
        on_postgresql.add(*[f"quick-{n}" for n in range(10)])
        on_postgresql.add("slow", connection=slow)
        on_postgresql.add(*[f"quick-{n}" for n in range(10, 20)])
        rows = await store.read(None, (), (), 100)
        assert [row.key for row in rows] == [f"quick-{n}" for n in range(20)]
        slow.get_transaction().commit()  # type: ignore[union-attr]
        assert await store.settle(rows) == 20
    (late,) = await store.read(None, (), (), 100)
    assert late.key == "slow"
    assert rows[9].position < late.position < rows[10].position
    assert await store.settle([late]) == 1
    assert on_postgresql.count() == 0
    await store.close()


async def test_a_page_that_is_full_moves_the_floor_only_to_its_end(
    store: PostgresqlStore, on_postgresql: Database
) -> None:
    in_flight: dict[int, int] = {}
    with on_postgresql.open_transaction() as slow:
        on_postgresql.add(*[f"slow-{n}" for n in range(20)], connection=slow)
        on_postgresql.add("quick")
        assert await read_all(store, in_flight) == ["quick"]
    found = []
    for _ in range(12):
        rows = await store.read(None, in_flight, (), 3)
        in_flight.update({row.position: row.bucket for row in rows})
        found += [row.key for row in rows]
    assert found == [f"slow-{n}" for n in range(20)]
    await store.close()


async def test_rows_of_a_bucket_that_was_not_read_before_are_below_the_floor(
    store: PostgresqlStore, on_postgresql: Database
) -> None:
    ours, others = key_in_bucket(1), key_in_bucket(2)
    on_postgresql.add(others, ours)
    in_flight: dict[int, int] = {}
    assert await read_all(store, in_flight, buckets=[1]) == [ours]
    assert await read_all(store, in_flight, buckets=[1, 2]) == [others]
    await store.close()


async def test_rows_of_a_topic_that_was_left_out_are_not_passed(
    store: PostgresqlStore, on_postgresql: Database
) -> None:
    on_postgresql.add("a", topic="down")
    on_postgresql.add("b", topic="up")
    in_flight: dict[int, int] = {}
    assert await read_all(store, in_flight, topics=["down"]) == ["b"]
    assert await read_all(store, in_flight) == ["a"]
    await store.close()


def test_an_open_transaction_of_hours_does_not_fill_the_memory() -> None:
    floor = Floor()
    for n in range(1, 2 * WAITING):
        floor.has_read(n, full=False)
        floor.look(xmin=1, xid=n if floor.wants_id else None)
    assert len(floor._waiting) <= WAITING
    floor.look(xmin=10 * WAITING, xid=None)
    floor.has_read(None, full=False)
    assert floor.position > 1.9 * WAITING


def test_what_is_asked_between_two_looks_notes_nothing() -> None:
    """The id that belongs to a position is that of the look after, not of a question a moment later: a transaction may have
    taken its position and not yet its id."""
    floor = Floor()
    floor.has_read(10, full=False)
    floor.look(xmin=5, xid=None)  # notes position 10
    assert floor.wants_id
    assert not floor.waits
    floor.ended(xmin=100)
    floor.has_read(20, full=False)
    assert floor.wants_id
    floor.look(xmin=100, xid=101)
    assert floor.waits
    floor.ended(xmin=100)  # 101 is still open
    floor.has_read(30, full=False)
    assert floor.position < 10
    floor.ended(xmin=102)
    floor.has_read(40, full=False)
    assert floor.position == 10
