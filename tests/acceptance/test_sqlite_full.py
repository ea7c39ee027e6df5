"""SQLite's disk is full: whoever writes is told so, nothing is lost, no attempt is spent; with room again it goes on."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import TransactionError
from outbox.transport import Outcome
from outbox.transports import memory
from tests.consumer.billing import Billing, OrderPlaced, charge, placed, running, until, until_finished
from tests.relay import running as relaying
from tests.relay.database import Database
from tests.relay.scripted import Scripted
from tests.staging.shop import Base, Order, Shop, outbox, place

FULL = "database or disk is full"


class Disk:
    """Engines whose database file may not grow: their limit is that of SQLite's own, which fails as a full disk does."""

    def __init__(self, file: Path) -> None:
        self.url = f"sqlite:///{file}"
        self.pages = 1 << 30
        self.engines: list[sa.Engine] = []

    def engine(self) -> sa.Engine:
        engine = sa.create_engine(self.url)
        self.engines.append(engine)

        @sa.event.listens_for(engine, "checkout")
        def limit(connection: Any, *_: Any) -> None:
            connection.execute(f"PRAGMA max_page_count = {self.pages}")  # a lower one than there are is what there are

        return engine

    def is_full(self) -> None:
        self.pages = 1

    def has_room(self) -> None:
        self.pages = 1 << 30


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "shop.db")
    yield disk
    for engine in disk.engines:
        engine.dispose()


@pytest.mark.parametrize("flush", [True, False])
def test_an_order_that_finds_no_room_has_no_message_and_later_ones_have_theirs(disk: Disk, flush: bool) -> None:
    engine = disk.engine()
    Base.metadata.create_all(engine)
    disk.is_full()
    with Session(engine) as session:
        committed: list[str] = []
        with pytest.raises(sa.exc.OperationalError, match=FULL):
            _place_orders_for_ever(session, flush, committed)
        session.rollback()
        assert Shop(engine).holds(*committed)
        disk.has_room()
        place(session, "then")
        session.commit()
    assert Shop(engine).holds(*committed, "then")


def _place_orders_for_ever(session: Session, flush: bool, committed: list[str]) -> None:
    for number in count():
        name = f"order {number} {'x' * 100}"
        place(session, name)
        if flush:
            session.flush()
        session.commit()
        committed.append(name)


def test_a_message_that_finds_no_room_takes_its_order_along(disk: Disk) -> None:
    engine = disk.engine()
    Base.metadata.create_all(engine)
    disk.is_full()
    with Session(engine) as session:
        session.add(Order(name="a"))
        session.flush()
        outbox.add(session, "orders", b"a" * 1_000_000)
        with pytest.raises(sa.exc.OperationalError, match=FULL):
            session.commit()
        # SQLite has rolled the order back by then, and nobody is told that it was committed
        with pytest.raises(TransactionError, match="rolled back"):
            session.commit()
        session.rollback()
        assert Shop(engine).holds()
        disk.has_room()
        place(session, "b")
        session.commit()
    assert Shop(engine).holds("b")


async def test_a_relay_empties_a_full_database(disk: Disk) -> None:
    database = Database(disk.url).create()
    ids = database.add(*["a", "b"] * 300, payload=b"x" * 1000)
    disk.is_full()
    broker = Scripted()
    async with relaying.running(relaying.relay(database, broker, database=disk.engine())):
        await relaying.eventually(lambda: database.count() == 0)
    assert broker.ids() == ids
    database.close()


async def test_a_relay_that_finds_no_room_to_park_in_keeps_the_message_and_parks_it_later(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(disk.url).create()
    ids = database.add("a", "a", payload=b"x" * 1_000_000)
    disk.is_full()
    broker = Scripted(lambda row, tries: Outcome.retry("not now") if disk.pages == 1 or row.id == ids[0] else None)
    async with relaying.running(relaying.relay(database, broker, database=disk.engine())):
        await relaying.eventually(lambda: any(FULL in record.getMessage() for record in caplog.records))
        assert (database.count(), database.count("parked"), database.count("dead_letter")) == (2, 0, 0)
        broker.script = lambda row, tries: None
        disk.has_room()
        await relaying.eventually(lambda: database.count() + database.count("parked") == 0)
    assert broker.first_ids() == ids
    database.close()


async def test_a_consumer_that_finds_no_room_spends_no_attempt_and_goes_on(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    name = f"full-{uuid.uuid4().hex}"
    billing = Billing(disk.url, f"memory://{name}")
    consumer = billing.consumer(database=disk.engine(), retries=1)
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        await billing.publish(placed(0))
        await until_finished(consumer, 1)
        disk.is_full()
        await billing.publish(*(placed(number) for number in range(1, 300)))
        await until(lambda: FULL in (consumer.state.database or ""))
        disk.has_room()
        await until_finished(consumer, 300)
    assert billing.charges() == list(range(300))
    assert billing.dead() == []
    assert billing.rows("attempt") == []
    billing.close()
    memory.forget(name)
