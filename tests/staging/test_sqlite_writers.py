"""SQLite has one writer: what others get who want to write meanwhile depends on how their engine begins."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox.transport import Outcome
from tests.relay.database import Database
from tests.relay.running import eventually, relay, running
from tests.relay.scripted import Scripted
from tests.staging.conftest import send_begin
from tests.staging.shop import TABLES, Base, Order, Shop, outbox, place

PATIENCE = 20.0  # seconds that each engine here waits for the writer


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A shop's database in WAL mode, as it is once a relay or consumer has opened it."""
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    engine = sa.create_engine(url)
    Base.metadata.create_all(engine, tables=TABLES)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar() == "wal"
    engine.dispose()
    return url


@pytest.fixture
def shop(url: str, begin: str) -> Iterator[Shop]:
    engine = sa.create_engine(url, connect_args={"timeout": PATIENCE})
    if begin:
        send_begin(engine, begin)
    yield Shop(engine)
    engine.dispose()


begins_with = pytest.mark.parametrize("begin", ["", "BEGIN", "BEGIN IMMEDIATE"])
only_begin = pytest.mark.parametrize("begin", ["BEGIN"])


@only_begin
def test_who_has_read_and_then_writes_after_another_is_refused_at_once_with_his_message(shop: Shop) -> None:
    """SQLITE_BUSY_SNAPSHOT: what he read is no longer so, and no waiting makes it so again."""
    with Session(shop.engine) as first, Session(shop.engine) as second:
        first.scalars(sa.select(Order)).all()
        place(second, "second")
        second.commit()
        began = time.monotonic()
        place(first, "first")
        with pytest.raises(sa.exc.OperationalError, match="locked"):
            first.commit()
        assert time.monotonic() - began < PATIENCE / 2
        first.rollback()
        place(first, "another try")
        first.commit()
    assert shop.holds("second", "another try")


@pytest.mark.parametrize("begin", ["", "BEGIN IMMEDIATE"])
def test_who_begins_by_writing_waits_for_the_other_and_both_are_committed(shop: Shop, begin: str) -> None:
    """The driver by itself begins no transaction before the first change: what was read before is not part of it."""
    started = threading.Event()

    def second() -> None:
        with Session(shop.engine) as session, session.begin():
            started.set()
            session.scalars(sa.select(Order)).all()
            place(session, "second")

    with Session(shop.engine) as first:
        first.scalars(sa.select(Order)).all()
        place(first, "first")
        first.flush()
        thread = threading.Thread(target=second)
        thread.start()
        assert started.wait(10) or begin  # with BEGIN IMMEDIATE it waits already
        first.commit()
    thread.join(PATIENCE)
    assert shop.holds("first", "second")


@begins_with
async def test_a_relay_on_such_an_engine_beside_writers_sends_all_of_it(shop: Shop, url: str) -> None:
    """Also what it parks and what it moves when it is due, for which it reads before it writes."""
    database = Database(url)
    database.create()
    broker = Scripted(lambda row, tries: Outcome.retry("not now") if tries == 0 and int(row.id[-1], 16) < 2 else None)
    expected: list[str] = []
    lock = threading.Lock()

    def write(number: int) -> None:
        for turn in range(25):
            later = timedelta() if turn % 5 == 0 else None
            while True:
                try:
                    with Session(shop.engine) as session, session.begin():
                        session.scalars(sa.select(Order)).all()
                        message = outbox.add(session, "orders", b"{}", key=number, deliver_at=later)
                        session.add(Order(name=f"{number}.{turn}"))
                    break
                except sa.exc.OperationalError:  # locked: see above
                    continue
            with lock:
                expected.append(str(message.id))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    async with running(relay(database, broker, database=shop.engine)):
        for thread in threads:
            thread.start()
        await eventually(lambda: not any(thread.is_alive() for thread in threads), 60)
        await eventually(lambda: set(expected) <= set(broker.acked))
        await eventually(lambda: database.count() + database.count("parked") + database.count("scheduled") == 0)
    assert sorted(set(broker.first_ids())) == sorted(expected)
    assert database.count("dead_letter") == 0
    database.close()
