"""The connection of an application or a consumer is cut in the middle of its transaction: data and message are both there or
neither is, an effect happens once, and the next transaction knows nothing of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from outbox.transports import memory
from tests.consumer.billing import Billing, Charge, OrderPlaced, charge, outbox, placed, running, until_finished
from tests.outages.cutter import WHENS, Cutter, When, cutting
from tests.services import DatabaseServer

DRIVERS = [
    *("postgresql+psycopg", "postgresql+psycopg async", "postgresql+asyncpg"),
    *("mysql+pymysql", "mysql+asyncmy"),
]
SERVERS = {"postgresql": "postgresql", "mysql": "mariadb"}
STEPS = {"inserting": "insert into outbox_message", "committing": "commit"}


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def billing(request: pytest.FixtureRequest, driver: str) -> Iterator[Billing]:
    server: DatabaseServer = request.getfixturevalue(SERVERS[driver.split("+")[0]])
    url = server.create_database()
    name = uuid.uuid4().hex
    found = Billing(url, f"memory://{name}")
    yield found
    found.close()
    memory.forget(name)
    server.drop_database(url)


@pytest.fixture
def cutter(billing: Billing) -> Iterator[Cutter]:
    with cutting(billing.url) as found:
        yield found


class Application:
    """Sync or async sessions of that driver, through the cutter."""

    def __init__(self, url: str, driver: str) -> None:
        self._engine: Any
        plain, _, kind = driver.partition(" ")
        found = sa.make_url(url).set(drivername=plain)
        self._is_async = bool(kind) or found.get_dialect().is_async
        self._engine = create_async_engine(found) if self._is_async else sa.create_engine(found)

    async def order(self, order_id: int) -> None:
        if not self._is_async:
            with Session(self._engine) as session, session.begin():
                self._add(session, order_id)
            return
        async with AsyncSession(self._engine) as session, session.begin():
            self._add(session, order_id)

    def _add(self, session: Any, order_id: int) -> None:
        session.add(Charge(order_id=order_id))
        outbox.add(session, OrderPlaced(order_id))

    async def close(self) -> None:
        await self._engine.dispose() if self._is_async else self._engine.dispose()


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("step", STEPS)
async def test_data_and_message_are_both_there_or_neither_is(
    billing: Billing, cutter: Cutter, driver: str, step: str, when: When
) -> None:
    application = Application(cutter.url, driver)
    await application.order(1)
    await application.close()  # on a new connection, a statement is sent as text even where drivers prepare it
    cutter.arm(STEPS[step], when)
    with pytest.raises(sa.exc.DBAPIError):
        await application.order(2)
    assert cutter.seen == 1
    for again in range(5):  # the pool may have other connections that died
        try:
            await application.order(3)
            break
        except sa.exc.DBAPIError:
            assert again < 4
    committed = [1, 2, 3] if (step, when) == ("committing", "at its answer") else [1, 3]
    assert billing.charges() == committed
    assert [row["key"] for row in billing.rows("message")] == [str(id) for id in committed]
    await application.close()


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+pymysql"], indirect=True)
@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("step", ["insert into outbox_inbox", "insert into charges", "commit"])
async def test_an_effect_happens_once(billing: Billing, cutter: Cutter, step: str, when: When) -> None:
    consumer = billing.consumer(database=cutter.url)
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
        cutter.arm(step, when, times=2)
        await billing.publish(*(placed(n) for n in range(2, 8)))
        await until_finished(consumer, 7)
    assert cutter.seen == 2
    assert billing.charges() == [1, 2, 3, 4, 5, 6, 7]
    assert [row["outcome"] for row in billing.rows("inbox")] == ["done"] * 7
    assert billing.dead() == []
