"""The same call in async code: `add` needs no await, whatever the driver."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from outbox import TransactionError
from tests.services.fixtures import INSTALL_TIMEOUT
from tests.staging.shop import Base, Order, Shop, outbox, tell

DRIVERS = [
    "sqlite+aiosqlite",
    pytest.param("postgresql+asyncpg", marks=pytest.mark.timeout(INSTALL_TIMEOUT)),
    pytest.param("postgresql+psycopg", marks=pytest.mark.timeout(INSTALL_TIMEOUT)),
    pytest.param("mysql+asyncmy", marks=pytest.mark.timeout(INSTALL_TIMEOUT)),
]


@pytest.fixture(params=DRIVERS)
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    if not request.param.startswith("sqlite"):
        server = "postgresql" if request.param.startswith("postgresql") else "mariadb"
        url = sa.make_url(request.getfixturevalue(f"{server}_shop_url")).set(drivername=request.param)
    else:
        url = sa.make_url(f"{request.param}:///{tmp_path / 'shop.db'}")
    engine = create_async_engine(url)
    if request.param.startswith("sqlite"):
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()


async def holds(engine: AsyncEngine, *names: str) -> bool:
    async with engine.connect() as connection:
        return await connection.run_sync(lambda sync: Shop(_Borrowed(sync)).holds(*names))  # type: ignore[arg-type]


async def messages(engine: AsyncEngine) -> list[str]:
    async with engine.connect() as connection:
        return await connection.run_sync(lambda sync: Shop(_Borrowed(sync)).messages())  # type: ignore[arg-type]


class _Borrowed:
    """Stands for an engine where there is one connection only, that of `run_sync`."""

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection

    def connect(self) -> _Borrowed:
        return self

    def __enter__(self) -> sa.Connection:
        return self.connection

    def __exit__(self, *_: object) -> None:
        pass


def place(session: AsyncSession | async_scoped_session[AsyncSession], name: str) -> None:
    session.add(Order(name=name))
    outbox.add(session, "orders", name.encode())


async def test_a_message_is_committed_with_its_order(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        place(session, "a")
    async with AsyncSession(engine) as session:
        place(session, "b")
        await session.flush()
        place(session, "c")
        await session.commit()
    assert await holds(engine, "a", "b", "c")


async def test_a_message_alone_is_a_transaction(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        outbox.add(session, "orders", b"a")
    async with AsyncSession(engine) as session, session.begin():
        await session.begin_nested()
        outbox.add(session, "orders", b"b")
    assert await messages(engine) == ["a", "b"]


async def test_a_rollback_takes_the_message_back(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        place(session, "a")
        await session.flush()
        await session.rollback()
        place(session, "b")
        await session.close()
        place(session, "c")
        await session.commit()
    assert await holds(engine, "c")


async def test_a_rolled_back_savepoint_takes_its_own_message_and_no_other(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        place(session, "a")
        savepoint = await session.begin_nested()
        place(session, "b")
        await session.flush()
        await savepoint.rollback()
        async with session.begin_nested():
            place(session, "c")
    assert await holds(engine, "a", "c")


async def test_a_rolled_back_savepoint_of_the_connection_takes_its_own_message_and_no_other(
    engine: AsyncEngine,
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        place(session, "a")
        await session.flush()
        savepoint = await (await session.connection()).begin_nested()
        outbox.add(session, "orders", b"b")
        await savepoint.rollback()
    assert await holds(engine, "a")


async def test_each_task_of_a_scoped_session_has_its_own_messages(engine: AsyncEngine) -> None:
    session = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)

    async def order(name: str, commit: bool) -> None:
        place(session, name)
        await asyncio.sleep(0)
        if commit:
            await session.commit()
        await session.remove()

    await asyncio.gather(order("a", True), order("b", False))
    assert await holds(engine, "a")


async def test_an_async_connection_takes_messages_through_run_sync(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(sa.insert(Order).values(name="a"))
        message = await connection.run_sync(outbox.add, "orders", b"a", key=1)
        assert message.key == "1"
    assert await holds(engine, "a")


async def test_an_async_connection_given_directly_is_told_to_use_run_sync(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        with pytest.raises(TypeError, match=r"write await connection\.run_sync\(outbox\.add, …\)"):
            outbox.add(connection, "orders", b"a")  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=r"write await connection\.run_sync\(outbox\.claim, …\)"):
            outbox.claim(connection, "billing", "id")  # type: ignore[arg-type]
    assert await messages(engine) == []


async def test_claim_and_cancel_refuse_async_sessions_since_a_forgotten_await_would_be_true(
    engine: AsyncEngine,
) -> None:
    scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
    async with AsyncSession(engine) as session:
        for where in (session, scoped):
            with pytest.raises(TypeError, match=r"write await session\.run_sync\(outbox\.claim, …\)"):
                outbox.claim(where, "billing", "id")  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=r"write await session\.run_sync\(outbox\.cancel, …\)"):
                outbox.cancel(where, None)  # type: ignore[arg-type]
    await scoped.remove()


async def test_claim_cancel_and_staged_through_run_sync(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        assert await session.run_sync(outbox.claim, "billing", "id")
        assert not await session.run_sync(outbox.claim, "billing", "id")
        message = outbox.add(session, "orders", b"a", deliver_at=timedelta(hours=1))
        assert outbox.staged(session) == [message]
    async with AsyncSession(engine) as session, session.begin():
        assert await session.run_sync(outbox.cancel, message.id)
        assert not await session.run_sync(outbox.cancel, message.id)


async def test_an_outside_connection_that_is_rolled_back_in_the_end(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.begin()
        await connection.execute(sa.insert(Order).values(name="before"))  # so that sqlite3 has sent its BEGIN
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            place(session, "a")
            await session.commit()
            place(session, "b")
            await session.rollback()
        seen = await connection.scalar(sa.select(sa.func.count()).select_from(outbox.tables.message))
        await connection.rollback()
    assert seen == 1
    assert await holds(engine)


async def test_a_sync_listener_adds_the_only_message_in_the_commit(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:

        @event.listens_for(session.sync_session, "before_commit")
        def announce(session: Session) -> None:
            tell(session, "a")

        await session.commit()
    assert await messages(engine) == ["a"]


async def test_autocommit_is_refused(engine: AsyncEngine) -> None:
    async with AsyncSession(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(TransactionError, match="autocommit"):
            outbox.add(session, "orders", b"a")


async def test_raw_commit_text_and_a_commit_on_the_driver_are_logged(
    engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncSession(engine) as session:
        place(session, "a")
        await session.flush()
        await session.execute(sa.text("COMMIT"))
    assert [record.levelno for record in caplog.records if record.name.startswith("outbox")] == [logging.ERROR]
    caplog.clear()
    async with AsyncSession(engine) as session:
        place(session, "b")
        await session.flush()
        driver = (await (await session.connection()).get_raw_connection()).driver_connection
        assert driver is not None
        await (driver.commit() if hasattr(driver, "commit") else driver.execute("COMMIT"))
    assert [record.levelno for record in caplog.records if record.name.startswith("outbox")] == [logging.ERROR]
    caplog.clear()
    async with AsyncSession(engine) as session:
        place(session, "c")
        await session.flush()
    assert not caplog.records
