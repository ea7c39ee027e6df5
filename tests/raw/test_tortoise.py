"""Tortoise: its transaction's connection is a wrapper, and taken as it is."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tortoise import Tortoise, fields
from tortoise.models import Model
from tortoise.transactions import in_transaction

from outbox import TransactionError
from tests.raw.conftest import emptied
from tests.raw.shops import RawShop
from tests.services.fixtures import INSTALL_TIMEOUT
from tests.staging.shop import outbox

DRIVERS = [
    "sqlite",
    pytest.param("asyncpg", marks=pytest.mark.timeout(INSTALL_TIMEOUT)),
    pytest.param("psycopg", marks=pytest.mark.timeout(INSTALL_TIMEOUT)),
]


class Order(Model):
    id = fields.IntField(primary_key=True)
    name = fields.TextField()

    class Meta:
        table = "shop_order"


async def place(name: str) -> None:
    """An order and its message, in the transaction that the context holds."""
    await Order.create(name=name)
    await outbox.aadd(Order._meta.db, "orders", name.encode(), key=name)


@pytest.fixture(params=DRIVERS)
async def shop(request: pytest.FixtureRequest) -> AsyncIterator[RawShop]:
    for shop in emptied("sqlite" if request.param == "sqlite" else "postgresql", request):
        url = (
            f"sqlite://{shop.url.database}"
            if request.param == "sqlite"
            else str(shop.url.set(drivername=request.param))
        )
        # each driver under a name of its own: Tortoise keeps the SQL of a model by that
        app = {"models": [__name__], "default_connection": request.param}
        await Tortoise.init({"connections": {request.param: url}, "apps": {"shop": app}})
        yield shop
        await Tortoise.close_connections()


async def test_an_order_and_its_message_commit_together(shop: RawShop) -> None:
    async with in_transaction() as connection:
        await Order.create(name="a", using_db=connection)
        message = await outbox.aadd(connection, "orders", b"a", key=1)
        assert await outbox.aclaim(connection, "billing", message.id)
    assert shop.holds("a")


async def test_a_rollback_takes_both(shop: RawShop) -> None:
    async def fail() -> None:
        async with in_transaction():
            await place("a")
            raise ValueError

    with pytest.raises(ValueError):
        await fail()
    async with in_transaction():
        await place("b")
    assert shop.holds("b")


async def test_a_nested_block_that_is_rolled_back_takes_exactly_its_own(shop: RawShop) -> None:
    async def fail() -> None:
        async with in_transaction():
            await place("b")
            raise ValueError

    async with in_transaction():
        await place("a")
        with pytest.raises(ValueError):
            await fail()
        await place("c")
        async with in_transaction():
            await place("d")
    assert shop.holds("a", "c", "d")


async def test_a_message_outside_a_transaction_is_refused(shop: RawShop) -> None:
    with pytest.raises(TransactionError, match="autocommit mode and in no transaction"):
        await outbox.aadd(Order._meta.db, "orders", b"a")
    with pytest.raises(TypeError, match=r"write await outbox.aadd\(connection, …\)"):
        outbox.add(Order._meta.db, "orders", b"a")  # type: ignore[call-overload]
    assert shop.holds()
