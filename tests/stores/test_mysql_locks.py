"""MySQL and MariaDB: who waits for whom. Nobody for a relay, a relay for nobody; and what is done again after a deadlock."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from outbox.dialects import insert_if_absent, was_absent
from outbox.stores import open_store
from outbox.stores.mysql import MysqlStore
from tests.relay.database import Database
from tests.stores.users import users_engine


@contextmanager
def impatient(database: Database) -> Iterator[sa.Connection]:
    """A writer whose statements fail when they have to wait for a second."""
    engine = users_engine(database, "set innodb_lock_wait_timeout = 1")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def a_gap(database: Database) -> int:
    """A position that is no longer there, between two that are."""
    database.add("a", "b", "c")
    first, missing, _ = [found.position for found in database.rows("message")]
    database.execute(sa.delete(database.tables.message).where(database.tables.message.c.position == missing))
    assert missing == first + 1
    return int(missing)


def test_what_repeatable_read_would_do(on_mariadb: Database) -> None:
    """Why the stores are READ COMMITTED: to delete what is not there locks the gap, up to the end of the table."""
    message = on_mariadb.tables.message
    on_mariadb.add("a")
    engine = users_engine(on_mariadb)
    for level, waits in (("REPEATABLE READ", True), ("READ COMMITTED", False)):
        with engine.connect().execution_options(isolation_level=level) as settling, settling.begin():
            settling.execute(sa.delete(message).where(message.c.position == 10**9))
            with impatient(on_mariadb) as writer:
                if waits:
                    with pytest.raises(sa.exc.OperationalError, match="1205"):
                        on_mariadb.add("b", connection=writer)
                else:
                    on_mariadb.add("b", connection=writer)
    engine.dispose()


@pytest.mark.parametrize("whose", ["ours", "sync", "async"])
async def test_transactions_of_the_store_lock_no_gap(on_mariadb: Database, whose: str) -> None:
    missing = a_gap(on_mariadb)
    message = on_mariadb.tables.message
    engine: Any = on_mariadb.url
    if whose == "sync":
        engine = users_engine(on_mariadb)
    elif whose == "async":
        engine = create_async_engine(sa.make_url(on_mariadb.url).set(drivername="mysql+asyncmy"))
    store = open_store(engine, on_mariadb.tables)
    deleted, go_on = threading.Event(), threading.Event()

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.delete(message).where(message.c.position.in_([missing, 10**9])))
        deleted.set()
        if whose != "async":
            go_on.wait(30)
        else:  # this is the event loop's thread
            write()

    def write() -> None:
        with impatient(on_mariadb) as writer, writer.begin():
            on_mariadb.add("b", connection=writer, position=missing)
            on_mariadb.add("b", connection=writer)

    running = asyncio.create_task(store.run(work))
    if whose != "async":
        await asyncio.to_thread(deleted.wait, 30)
        await asyncio.to_thread(write)
        go_on.set()
    await running
    assert on_mariadb.count() == 4
    await store.close()
    if whose == "sync":
        engine.dispose()
    elif whose == "async":
        await engine.dispose()


# the two have different names for it
ISOLATION = "show session variables where variable_name in ('tx_isolation', 'transaction_isolation')"


@pytest.mark.parametrize("driver", ["mysql", "mysql+pymysql"])
async def test_the_hot_path_is_read_committed_and_in_autocommit_mode(on_mariadb: Database, driver: str) -> None:
    store = open_store(sa.make_url(on_mariadb.url).set(drivername=driver), on_mariadb.tables)
    assert isinstance(store, MysqlStore)
    for line in (store._reader, store._settler):
        found, _ = await line.execute(ISOLATION)
        assert {value for _, value in found} == {"READ-COMMITTED"}
        ((autocommit,),), _ = await line.execute("select @@autocommit")
        assert autocommit == 1
    await store.close()


async def test_neither_reading_nor_settling_waits_for_an_open_transaction(on_mariadb: Database) -> None:
    """Nor for the row that one has inserted right behind those that are settled."""
    store = open_store(on_mariadb.url, on_mariadb.tables)
    on_mariadb.add("a", "b")
    with on_mariadb.open_transaction() as writer:
        on_mariadb.add("late", connection=writer)
        on_mariadb.add("c")
        rows = await store.read(None, (), (), 10)
        assert [row.key for row in rows] == ["a", "b", "c"]
        assert await asyncio.wait_for(store.settle(rows), 10) == 3
    assert [row.key for row in await store.read(None, (), (), 10)] == ["late"]
    await store.close()


async def test_a_settle_that_is_a_deadlocks_victim_is_tried_again(on_mariadb: Database) -> None:
    message = on_mariadb.tables.message
    store = open_store(on_mariadb.url, on_mariadb.tables)
    on_mariadb.add("a", "b")
    first, second = await store.read(None, (), (), 10)
    with on_mariadb.open_transaction() as other:
        on_mariadb.add(*["heavy"] * 50, connection=other)  # whoever has written less is the victim
        other.execute(sa.select(message.c.id).where(message.c.position == second.position).with_for_update())
        settling = asyncio.create_task(store.settle([first, second]))
        await waiting_for_a_lock(on_mariadb)
        locked = sa.select(message.c.id).where(message.c.position == first.position).with_for_update()
        await asyncio.to_thread(other.execute, locked)
        assert not settling.done()
    assert await asyncio.wait_for(settling, 10) == 2
    await store.close()


async def test_work_that_is_a_deadlocks_victim_is_done_again(on_mariadb: Database) -> None:
    message = on_mariadb.tables.message
    store = open_store(on_mariadb.url, on_mariadb.tables)
    on_mariadb.add("a", "b")
    first, second = (found.position for found in on_mariadb.rows("message"))
    begun = 0

    def locked(position: int) -> Any:
        return sa.select(message.c.id).where(message.c.position == position).with_for_update()

    def work(connection: sa.Connection) -> None:
        nonlocal begun
        begun += 1
        connection.execute(locked(first))
        connection.execute(locked(second))

    with on_mariadb.open_transaction() as other:
        on_mariadb.add(*["heavy"] * 50, connection=other)
        other.execute(locked(second))
        working = asyncio.create_task(store.run(work))
        await waiting_for_a_lock(on_mariadb)
        await asyncio.to_thread(other.execute, locked(first))
    await working
    assert begun == 2
    await store.close()


async def waiting_for_a_lock(database: Database) -> None:
    """Until one transaction waits for another."""
    asked = sa.text("select count(*) from information_schema.innodb_trx where trx_state = 'LOCK WAIT'")
    for _ in range(200):
        with database.engine.connect() as connection:
            if connection.scalar(asked):
                return
        await asyncio.sleep(0.12)  # asked more often than every 0.1 s that table does not change
    raise AssertionError("nobody waits")


def test_of_two_claims_at_once_the_second_waits_for_the_first_to_end(on_mariadb: Database) -> None:
    insert = insert_if_absent(on_mariadb.tables.inbox, "mysql")
    given = {"consumer": "billing", "message_id": uuid.uuid4(), "outcome": "done"}
    found: list[bool] = []

    def second() -> None:
        with on_mariadb.engine.begin() as connection:
            found.append(was_absent(connection.execute(insert, given), "mysql"))

    for ends, expected in (("rollback", True), ("commit", False)):
        with on_mariadb.engine.connect() as first:
            first.execute(insert, given | ({"message_id": uuid.uuid4()} if ends == "commit" else {}))
            if ends == "commit":
                given = given | {"message_id": uuid.uuid4()}
                first.execute(insert, given)
            waiting = threading.Thread(target=second)
            waiting.start()
            asyncio.run(waiting_for_a_lock(on_mariadb))
            assert waiting.is_alive()
            getattr(first, ends)()
        waiting.join(10)
        assert found.pop() is expected
