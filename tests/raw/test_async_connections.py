"""`aadd` and its like with an async driver's own connection."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from outbox import Message, TransactionError
from outbox.testing import capture
from tests.raw.shops import RawShop
from tests.raw.test_connections import INSERT, rows
from tests.relay.running import eventually
from tests.staging.shop import outbox
from tests.staging.test_many import odd

refused = pytest.raises(TransactionError, match="autocommit mode and in no transaction")
closed = pytest.raises(TransactionError, match="closed or lost")


async def execute(connection: Any, statement: str) -> None:
    if isinstance(connection, asyncpg.Connection):
        await connection.execute(statement)
        return
    async with connection.cursor() as cursor:
        await cursor.execute(statement)


async def begin(driver: str, connection: Any) -> None:
    """Begin a transaction as its own code does; the others begin one by themselves."""
    if driver == "asyncpg":
        await execute(connection, "BEGIN")


async def place(connection: Any, name: str) -> Message:
    """An order and its message."""
    await execute(connection, INSERT.format(name))
    return await outbox.aadd(connection, "orders", name.encode(), key=name)


async def test_an_order_and_its_message_commit_together(
    async_driver: str, async_shop: RawShop, async_connection: Any
) -> None:
    for name, how in (("a", "COMMIT"), ("b", "ROLLBACK"), ("c", "COMMIT")):
        await begin(async_driver, async_connection)
        await place(async_connection, name)
        await execute(async_connection, how)
    assert async_shop.holds("a", "c")


async def test_a_savepoint_that_is_rolled_back_takes_exactly_its_own(
    async_driver: str, async_shop: RawShop, async_connection: Any
) -> None:
    await begin(async_driver, async_connection)
    await place(async_connection, "a")
    await execute(async_connection, "SAVEPOINT one")
    await place(async_connection, "b")
    await execute(async_connection, "ROLLBACK TO SAVEPOINT one")
    await place(async_connection, "c")
    await execute(async_connection, "COMMIT")
    assert async_shop.holds("a", "c")


async def set_autocommit(driver: str, connection: Any) -> None:
    if driver == "psycopg":
        await connection.set_autocommit(True)
    elif driver == "asyncmy":
        await connection.autocommit(True)
    elif driver == "aiosqlite":  # from the thread that has the connection
        await connection._execute(setattr, connection._conn, "isolation_level", None)


async def test_autocommit_is_refused_but_within_a_transaction(
    async_driver: str, async_shop: RawShop, async_connection: Any
) -> None:
    await set_autocommit(async_driver, async_connection)
    with refused:
        await outbox.aadd(async_connection, "orders", b"a")
    with refused:
        await outbox.aadd_all(async_connection, [{"topic": "orders", "payload": b"a"}])
    with refused:
        await outbox.aclaim(async_connection, "billing", "id")
    with refused:
        await outbox.acancel(async_connection, uuid.uuid4())
    await execute(async_connection, "BEGIN")
    await place(async_connection, "b")
    await execute(async_connection, "COMMIT")
    with refused:
        await outbox.aadd(async_connection, "orders", b"c")
    assert async_shop.holds("b")


async def test_a_closed_connection_is_refused(async_connection: Any) -> None:
    ended = async_connection.close()
    if ended is not None:
        await ended
    with closed:
        await outbox.aadd(async_connection, "orders", b"a")


async def test_rows_are_those_that_a_session_writes(
    async_driver: str, async_shop: RawShop, async_connection: Any
) -> None:
    due = dt.datetime(2040, 1, 2, 3, 4, 5, 678901, dt.UTC)
    messages = [odd(number, id=uuid.uuid4()) for number in range(40)]
    messages += [odd(number, id=uuid.uuid4(), deliver_at=due) for number in range(12)]
    with Session(async_shop.engine) as session:
        outbox.add_all(session, messages)
        session.commit()
    tables = (outbox.tables.message, outbox.tables.scheduled)
    expected = [rows(async_shop, table) for table in tables]
    assert [len(found) for found in expected] == [40, 12]
    for at_once in (1, 5, 52):
        with async_shop.engine.begin() as engine_connection:
            for table in tables:
                engine_connection.execute(sa.delete(table))
        await begin(async_driver, async_connection)
        for start in range(0, 52, at_once):
            await outbox.aadd_all(async_connection, messages[start : start + at_once])
        await execute(async_connection, "COMMIT")
        assert [rows(async_shop, table) for table in tables] == expected


async def test_claims_and_cancellations(async_driver: str, async_shop: RawShop, async_connection: Any) -> None:
    id = uuid.uuid4()
    inbox = outbox.tables.inbox
    with async_shop.engine.begin() as engine_connection:
        dead = {"consumer": "mailer", "message_id": id, "outcome": "dead", "cycle": 2}
        engine_connection.execute(inbox.insert(), dead)
    await begin(async_driver, async_connection)
    message = await outbox.aadd(async_connection, "orders", b"a", deliver_at=dt.timedelta(hours=1))
    assert await outbox.aclaim(async_connection, "billing", id)
    assert not await outbox.aclaim(async_connection, "billing", str(id))
    assert not await outbox.aclaim(async_connection, "mailer", id)
    assert await outbox.aclaim(async_connection, "mailer", id, cycle=2)
    assert not await outbox.aclaim(async_connection, "mailer", id, cycle=2)
    assert await outbox.acancel(async_connection, message.id)
    assert not await outbox.acancel(async_connection, message.id)
    await execute(async_connection, "COMMIT")
    assert len(rows(async_shop, inbox)) == 2
    assert rows(async_shop, outbox.tables.scheduled) == []


async def test_captured_messages_are_those_that_were_inserted(async_driver: str, async_connection: Any) -> None:
    await begin(async_driver, async_connection)
    with capture(outbox) as sent:
        await place(async_connection, "a")
        await outbox.aadd_all(async_connection, [{"topic": "orders", "payload": b"b"}] * 12)
        await outbox.aadd_all(async_connection, [])
    assert [message.payload for message in sent] == [b"a"] + [b"b"] * 12
    await execute(async_connection, "ROLLBACK")


# ---------------------------------------------------------------- what is particular to one of them


async def test_asyncpg_with_its_pool_and_transaction_blocks(postgresql_shop: RawShop) -> None:
    async with asyncpg.create_pool(postgresql_shop.dsn, min_size=1) as pool:
        async with pool.acquire() as connection:
            with refused:
                await outbox.aadd(connection, "orders", b"")
            async with connection.transaction():
                await connection.execute(INSERT.format("a"))
                await outbox.aadd(connection, "orders", b"a")
                savepoint = connection.transaction()
                await savepoint.start()
                await connection.execute(INSERT.format("b"))
                await outbox.aadd(connection, "orders", b"b")
                await savepoint.rollback()
        with closed:
            await outbox.aadd(connection, "orders", b"given back to the pool")
        with pytest.raises(TypeError, match=r"Pool is no session or connection: .*pool.acquire\(\)"):
            outbox.aadd(pool, "orders", b"")  # type: ignore[call-overload]
    assert postgresql_shop.holds("a")


async def test_asyncpg_s_failed_transaction(postgresql_shop: RawShop) -> None:
    connection = await asyncpg.connect(postgresql_shop.dsn)
    async with connection.transaction():
        await connection.execute(INSERT.format("a"))
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.execute("SELECT 1/0")
        with pytest.raises(asyncpg.InFailedSQLTransactionError, match="current transaction is aborted"):
            await outbox.aadd(connection, "orders", b"a")
    await connection.close()
    assert postgresql_shop.holds()


async def test_asyncpg_with_codecs_of_the_user_s_own(postgresql_shop: RawShop) -> None:
    connection = await asyncpg.connect(postgresql_shop.dsn)
    await connection.set_type_codec("uuid", encoder=str, decoder=str, schema="pg_catalog")
    async with connection.transaction():
        message = await outbox.aadd(connection, "orders", b"a")
    await connection.close()
    assert rows(postgresql_shop, outbox.tables.message)[0]["id"] == message.id


async def test_psycopg_s_transaction_blocks_and_pipeline(postgresql_shop: RawShop) -> None:
    connection = await psycopg.AsyncConnection.connect(postgresql_shop.dsn, autocommit=True)
    connection.cursor_factory = psycopg.AsyncRawCursor  # $1, not %s
    async with connection.transaction():
        await connection.execute(INSERT.format("a").encode())
        await outbox.aadd(connection, "orders", b"a")
        async with connection.transaction():
            await connection.execute(INSERT.format("b").encode())
            await outbox.aadd(connection, "orders", b"b")
            raise psycopg.Rollback
    await connection.set_autocommit(False)
    async with connection.pipeline():
        await connection.execute(INSERT.format("c").encode())
        await outbox.aadd(connection, "orders", b"c")
        assert await outbox.aclaim(connection, "billing", "id")
        assert not await outbox.aclaim(connection, "billing", "id")
        await connection.commit()
    await connection.close()
    assert postgresql_shop.holds("a", "c")


async def test_messages_of_an_entity_are_in_the_order_of_its_lock(postgresql_shop: RawShop) -> None:
    first, second = [await asyncpg.connect(postgresql_shop.dsn) for _ in range(2)]
    await first.execute(INSERT.format("entity"))
    lock = "UPDATE shop_order SET name = 'entity'"

    async def wait_for_it() -> None:
        async with second.transaction():
            await second.execute(lock)
            await outbox.aadd(second, "orders", b"second", key="entity")

    async with first.transaction():
        await first.execute(lock)
        waiting = asyncio.create_task(wait_for_it())
        with postgresql_shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
            count = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            await eventually(lambda: other.exec_driver_sql(count).scalar())
        await outbox.aadd(first, "orders", b"first", key="entity")
    await waiting
    await first.close()
    await second.close()
    assert postgresql_shop.messages() == ["first", "second"]


# ---------------------------------------------------------------- SQLAlchemy's


async def test_sqlalchemy_s_async_connections_and_sessions_take_them_too(postgresql_shop: RawShop) -> None:
    engine = create_async_engine(postgresql_shop.url.set(drivername="postgresql+asyncpg"))
    async with engine.begin() as connection:
        await connection.exec_driver_sql(INSERT.format("a"))
        await outbox.aadd(connection, "orders", b"a")
        assert await outbox.aclaim(connection, "billing", "id")
        raw = (await connection.get_raw_connection()).driver_connection
        await outbox.aadd(raw, "orders", b"below")
    async with AsyncSession(engine) as session, session.begin():
        await session.execute(sa.text(INSERT.format("b")))
        await outbox.aadd(session, "orders", b"b")
        assert [message.payload for message in outbox.staged(session)] == [b"b"]
        later = await outbox.aadd(session, "orders", b"c", deliver_at=dt.timedelta(days=1))
        assert await outbox.acancel(session, later.id)
        await outbox.aadd_all(session, [{"topic": "orders", "payload": b"d"}])
        assert not await outbox.aclaim(session, "billing", "id")
    await engine.dispose()
    assert postgresql_shop.messages() == ["a", "below", "b", "d"]
