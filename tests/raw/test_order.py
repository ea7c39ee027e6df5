"""Transactions of several threads at once, some of them rolled back: messages of an entity are in the order of its locks, and
none is lost or too many. What the entity counts under its lock says which order that was."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Iterator

import asyncpg
import pytest
import sqlalchemy as sa

from tests.raw.shops import SYNC, RawShop
from tests.services.fixtures import INSTALL_TIMEOUT
from tests.staging.shop import outbox

WRITERS = 4
EACH = int(os.environ.get("OUTBOX_TEST_RAW_TRANSACTIONS", "25"))
ENTITIES = 3

COUNT = "UPDATE counter SET n = n + 1 WHERE entity = {}"
READ = "SELECT n FROM counter WHERE entity = {}"


@pytest.fixture
def counters(request: pytest.FixtureRequest) -> Iterator[RawShop]:
    """The shop of this driver, with an entity's count in each row of another table."""
    shop: RawShop = request.getfixturevalue("shop" if "driver" in request.fixturenames else "postgresql_shop")
    with shop.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE counter (entity integer PRIMARY KEY, n integer NOT NULL)")
        for entity in range(ENTITIES):
            connection.exec_driver_sql(f"INSERT INTO counter VALUES ({entity}, 0)")
    yield shop
    with shop.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE counter")


def each_is_there_in_order(shop: RawShop) -> bool:
    """Whether each entity's messages hold its counts: 1, 2, 3 … in the order of position."""
    message = outbox.tables.message
    with shop.engine.connect() as connection:
        counts = dict(connection.exec_driver_sql("SELECT entity, n FROM counter").all())
        rows = connection.execute(sa.select(message.c.key, message.c.payload).order_by(message.c.position)).all()
    assert sum(counts.values()) > WRITERS * EACH / 3
    found = {entity: [int(payload) for key, payload in rows if key == str(entity)] for entity in counts}
    return found == {entity: list(range(1, n + 1)) for entity, n in counts.items()}


@pytest.mark.parametrize("driver", ["psycopg", "pymysql", "sqlite3"], indirect=True)
@pytest.mark.timeout(INSTALL_TIMEOUT)
def test_messages_of_an_entity_are_in_the_order_of_its_locks(driver: str, counters: RawShop) -> None:
    failures: list[BaseException] = []

    def write(seed: int) -> None:
        rng = random.Random(seed)
        try:
            connection = SYNC[driver][1](counters)
            cursor = connection.cursor()
            if driver == "sqlite3":
                cursor.execute("PRAGMA busy_timeout = 60000")  # its writers wait without a queue
            for _ in range(EACH):
                if driver == "sqlite3":
                    cursor.execute("BEGIN IMMEDIATE")
                entity = rng.randrange(ENTITIES)
                cursor.execute(COUNT.format(entity))
                cursor.execute(READ.format(entity))
                outbox.add(connection, "orders", str(cursor.fetchone()[0]).encode(), key=entity)
                (connection.rollback if rng.random() < 0.3 else connection.commit)()
            connection.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(INSTALL_TIMEOUT)
    assert failures == []
    assert each_is_there_in_order(counters)


@pytest.mark.timeout(INSTALL_TIMEOUT)
async def test_messages_of_an_entity_are_in_the_order_of_its_locks_with_asyncpg(counters: RawShop) -> None:
    async def write(seed: int) -> None:
        rng = random.Random(seed)
        connection = await asyncpg.connect(counters.dsn)
        for _ in range(EACH):
            transaction = connection.transaction()
            await transaction.start()
            entity = rng.randrange(ENTITIES)
            await connection.execute(COUNT.format(entity))
            n = await connection.fetchval(READ.format(entity))
            await outbox.aadd(connection, "orders", str(n).encode(), key=entity)
            await (transaction.rollback if rng.random() < 0.3 else transaction.commit)()
        await connection.close()

    await asyncio.gather(*(write(seed) for seed in range(WRITERS)))
    assert each_is_there_in_order(counters)
