"""`outbox_fastapi.session_dependency`: order and message commit before the response is sent, or neither does.

Without ``from __future__ import annotations``: FastAPI could not resolve the local ``get_session``.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI, HTTPException, Response
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from outbox import ConfigurationError, Outbox
from outbox_fastapi import session_dependency


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customer"
    id: Mapped[int] = mapped_column(primary_key=True)


class Order(Base):
    __tablename__ = "shop_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    # checked at the commit: the way for a commit to fail after the path operation has returned
    customer_id: Mapped[int] = mapped_column(sa.ForeignKey("customer.id", deferrable=True, initially="DEFERRED"))


outbox = Outbox(Base.metadata)


def routes_of(get_session: Any, is_async: bool) -> FastAPI:
    app = FastAPI()
    if is_async:

        @app.post("/orders/{customer}")
        async def aplace(
            customer: int, session: Annotated[AsyncSession, Depends(get_session, scope="function")], end: str = ""
        ) -> Any:
            order = Order(customer_id=customer)
            session.add(order)
            await session.flush()
            outbox.add(session, "orders", {"id": order.id}, key=order.id)
            return finish(end, order.id)

    else:

        @app.post("/orders/{customer}")
        def place(
            customer: int, session: Annotated[Session, Depends(get_session, scope="function")], end: str = ""
        ) -> Any:
            order = Order(customer_id=customer)
            session.add(order)
            session.flush()
            outbox.add(session, "orders", {"id": order.id}, key=order.id)
            return finish(end, order.id)

    return app


def finish(end: str, id: int) -> Any:
    if end == "http error":
        raise HTTPException(409, "somebody else has it")
    if end == "defect":
        raise ZeroDivisionError
    return Response(status_code=202) if end == "response" else {"id": id}


@dataclass
class Shop:
    client: httpx.AsyncClient
    engine: sa.Engine

    async def post(self, customer: int, end: str = "") -> int:
        return (await self.client.post(f"/orders/{customer}", params={"end": end})).status_code

    def rows(self) -> tuple[int, int]:
        """Committed orders and messages."""
        with self.engine.connect() as connection:
            orders, messages = (
                connection.scalar(sa.select(sa.func.count()).select_from(table))
                for table in (Order.__table__, outbox.tables.message)
            )
        assert orders is not None
        assert messages is not None
        return orders, messages


def foreign_keys(connection: Any, record: object) -> None:
    connection.execute("PRAGMA foreign_keys = ON")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> sa.URL:
    if request.param == "sqlite":
        return sa.make_url(f"sqlite:///{tmp_path}/shop.db")
    return sa.make_url(request.getfixturevalue("postgresql_url")).set(drivername="postgresql+psycopg")


@pytest.fixture(params=["sync", "async"])
async def shop(request: pytest.FixtureRequest, url: sa.URL) -> AsyncIterator[Shop]:
    engine = sa.create_engine(url)
    async_engine = create_async_engine(url.set(drivername=url.drivername.replace("sqlite", "sqlite+aiosqlite")))
    if url.drivername == "sqlite":
        sa.event.listen(engine, "connect", foreign_keys)
        sa.event.listen(async_engine.sync_engine, "connect", foreign_keys)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Customer).values(id=1))
    if request.param == "async":
        app = routes_of(session_dependency(async_sessionmaker(async_engine)), is_async=True)
    else:
        app = routes_of(session_dependency(sessionmaker(engine)), is_async=False)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        yield Shop(client, engine)
    await async_engine.dispose()
    engine.dispose()


async def test_the_order_and_its_message_are_committed_when_the_response_is_there(shop: Shop) -> None:
    assert await shop.post(customer=1) == 200
    assert shop.rows() == (1, 1)


async def test_a_commit_that_fails_is_a_500_and_leaves_neither(shop: Shop) -> None:
    assert await shop.post(customer=2) == 500
    assert shop.rows() == (0, 0)


@pytest.mark.parametrize(("end", "status"), [("http error", 409), ("defect", 500)])
async def test_an_exception_out_of_the_path_operation_rolls_back(shop: Shop, end: str, status: int) -> None:
    assert await shop.post(1, end) == status
    assert shop.rows() == (0, 0)


async def test_a_response_that_is_returned_commits_whatever_its_status(shop: Shop) -> None:
    assert await shop.post(1, "response") == 202
    assert shop.rows() == (1, 1)


async def test_after_a_failure_the_next_request_has_a_session_of_its_own(shop: Shop) -> None:
    for customer, end in ((2, ""), (1, "defect")):
        await shop.post(customer, end)
    assert await shop.post(1) == 200
    assert shop.rows() == (1, 1)


@pytest.mark.parametrize("wrong", [sa.create_engine("sqlite://"), Session(), None, "sqlite://"])
def test_what_makes_no_sessions_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"takes a sessionmaker or an async_sessionmaker, not a \w+"):
        session_dependency(wrong)
