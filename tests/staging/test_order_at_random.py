"""Messages of one entity come in the order of its locks, whatever else their transactions do, and none is lost or too many,
however late it was committed: random transactions of several threads and processes, read by the relay's store meanwhile.

``OUTBOX_TEST_ORDER_PROGRAMS`` makes it longer (transactions of each thread), ``OUTBOX_TEST_SEED`` repeats one's choices, not
the threads' timing.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox._outgoing import Outgoing
from outbox.stores import open_store
from tests.services.fixtures import INSTALL_TIMEOUT
from tests.staging.programs import ENTITIES, Base, Entity, Place
from tests.staging.shop import TABLES, outbox
from tests.staging.shop import Base as ShopBase

PROGRAMS = int(os.environ.get("OUTBOX_TEST_ORDER_PROGRAMS", "8"))
PROCESSES = 2
THREADS = 3

LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
EVERYWHERE = [
    pytest.param(("sqlite", ""), id="sqlite"),
    pytest.param(("sqlite", "BEGIN IMMEDIATE"), id="sqlite, BEGIN IMMEDIATE"),
    *(
        pytest.param((server, level), id=f"{server}, {level}", marks=pytest.mark.timeout(INSTALL_TIMEOUT))
        for server in ("postgresql", "mariadb")
        for level in LEVELS
    ),
]
DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "sqlite": "sqlite"}


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The URL of a database with entities, and the isolation level, or SQLite's BEGIN, of its writers."""
    database, level = request.param
    on_file = f"sqlite:///{tmp_path / 'shop.db'}"
    found = sa.make_url(on_file if database == "sqlite" else request.getfixturevalue(f"{database}_shop_url"))
    url = found.set(drivername=DRIVERS[found.get_backend_name()]).render_as_string(hide_password=False)
    engine = sa.create_engine(url)
    if database == "sqlite":
        ShopBase.metadata.create_all(engine, tables=TABLES)
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add_all([Entity(id=id, n=0) for id in range(ENTITIES)])
    yield url, level
    Base.metadata.drop_all(engine)
    engine.dispose()


class Run:
    """What processes of random writers committed, and what the store gave out meanwhile."""

    def __init__(self, url: str, level: str, *, at_once: bool = False) -> None:
        self.url, self.level, self.at_once = url, level, at_once
        self.seed = os.environ.get("OUTBOX_TEST_SEED") or str(random.randrange(10**6))
        self.committed: list[Place] = []
        self.failed = 0
        self.sent: list[str] = []

    async def write_and_read(self) -> Run:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.read([tasks.create_task(self.write(number)) for number in range(PROCESSES)]))
        return self

    async def write(self, number: int) -> None:
        arguments = [self.url, self.level, f"{self.seed}/{number}", THREADS, PROGRAMS, self.at_once]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.staging.programs", json.dumps(arguments)), stdout=asyncio.subprocess.PIPE
        )
        try:
            output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, f"seed {self.seed}"
        found = json.loads(output)
        self.committed += [tuple(place) for place in found["committed"]]
        self.failed += found["failed"]

    async def read(self, writers: Sequence[asyncio.Task[None]]) -> None:
        store = open_store(self.url, outbox.tables)
        chance = random.Random(self.seed)
        try:
            while True:
                over = all(writer.done() for writer in writers)
                rows: list[Outgoing] = await store.read(None, (), (), chance.choice([1, 5, 1000]))
                self.sent += [(row.payload or b"").decode() for row in rows]
                await store.settle(rows)
                if over and not rows:
                    return
                await asyncio.sleep(0.005)
        finally:
            await store.close()

    def inversions(self) -> list[tuple[Place, Place]]:
        """Neighbours among the messages of one entity that came in the wrong order."""
        places = {place[3]: place for place in self.committed}
        by_entity: dict[int, list[Place]] = defaultdict(list)
        for text in self.sent:
            by_entity[places[text][0]].append(places[text])
        return [(a, b) for found in by_entity.values() for a, b in pairwise(found) if a > b]


@pytest.mark.parametrize("place", EVERYWHERE, indirect=True)
async def test_every_committed_message_comes_once_and_in_the_order_of_its_entitys_locks(place: tuple[str, str]) -> None:
    run = await Run(*place).write_and_read()
    texts = [text for *_, text in run.committed]
    assert len(texts) > PROGRAMS * PROCESSES * THREADS / 2, f"seed {run.seed}: most of the programs commit something"
    assert sorted(run.sent) == sorted(texts), f"seed {run.seed}: lost, too many, or not committed"
    assert run.inversions() == [], f"seed {run.seed}"


@pytest.mark.parametrize("place", [EVERYWHERE[2], EVERYWHERE[5]], indirect=True)
async def test_where_add_inserts_at_once_the_order_is_another(place: tuple[str, str]) -> None:
    """Or the test above could not tell. Not so where who waited for a lock is refused: on SQLite, and with PostgreSQL's
    higher levels."""
    for _ in range(10):
        run = await Run(*place, at_once=True).write_and_read()
        assert len(run.sent) == len(run.committed)
        if run.inversions():
            return
    pytest.fail("these programs do not overlap enough")
