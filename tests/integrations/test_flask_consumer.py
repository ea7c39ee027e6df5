"""`outbox_flask.Consumer`: a handler that writes to ``db.session`` writes to the transaction of the inbox row."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from flask import current_app, g

import outbox as core
from outbox import ConfigurationError, Relay, event
from outbox.backoff import Backoff
from outbox.consumer import Retries
from outbox.transports import memory
from outbox_flask import Consumer, Outbox
from tests.integrations.test_flask import OrderPlaced, Shop, shop, url, visits

__all__ = ["shop", "url", "visits"]

BROKER = "memory://flask"


@event("charges", type="charged", key="order_id")
@dataclass
class Charged:
    order_id: int


@pytest.fixture(autouse=True)
def broker() -> Iterator[None]:
    yield
    memory.forget("flask")


def consumer_of(shop: Shop, attempts: int = 2) -> Consumer:
    return Consumer(
        "billing", shop.outbox, transport=BROKER, retries=Retries(attempts=attempts, backoff=Backoff(first=0.01))
    )


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # it comes true in another thread
            await asyncio.sleep(0.01)


async def deliver(shop: Shop, consumer: Consumer, done: Callable[[], object], model: Any = None) -> None:
    """Place order 1, and let relay and consumer work until that has had its effect."""
    with shop.app.app_context():
        shop.outbox.add(OrderPlaced(1))
        shop.db.session.commit()
    async with Relay(shop.outbox, database=shop.outbox.engine, transport=BROKER), consumer:
        await until(done)


def count(shop: Shop, table: sa.Table, **where: Any) -> int:
    query = sa.select(sa.func.count()).select_from(table).filter_by(**where)
    with shop.outbox.engine.connect() as connection:
        return connection.scalar(query) or 0


async def test_what_a_handler_writes_to_db_session_commits_with_the_inbox_row(shop: Shop) -> None:
    consumer = consumer_of(shop)
    seen: list[Any] = []

    @consumer.on(OrderPlaced)
    def charge(placed: OrderPlaced, session: sa.orm.Session) -> Charged:
        shop.db.session.add(shop.Order(id=placed.order_id))
        shop.db.session.flush()
        seen.append(session is shop.db.session())
        seen.append(count(shop, shop.outbox.tables.inbox) if shop.db.engine.dialect.name != "sqlite" else 0)
        return Charged(placed.order_id)

    inbox, orders = shop.outbox.tables.inbox, shop.Order.__table__
    await deliver(shop, consumer, lambda: count(shop, inbox, outcome="done"))
    assert seen == [True, 0]  # one session; and nobody has seen the inbox row before the effect
    assert count(shop, orders) == 1


async def test_what_a_handler_wrote_to_db_session_before_it_raised_is_not_there(shop: Shop) -> None:
    consumer = consumer_of(shop)

    @consumer.on(OrderPlaced)
    def charge(placed: OrderPlaced) -> None:
        shop.db.session.add(shop.Order(id=placed.order_id))
        shop.db.session.flush()
        shop.outbox.add("charges", {})
        raise ZeroDivisionError("no change for this order")

    await deliver(shop, consumer, lambda: count(shop, shop.outbox.tables.dead_letter))
    assert count(shop, shop.Order.__table__) == 0
    assert count(shop, shop.outbox.tables.inbox, outcome="done") == 0
    assert [topic for topic, _ in shop.messages() if topic == "charges"] == []


async def test_a_handler_that_fails_once_has_its_effect_once(shop: Shop) -> None:
    consumer = consumer_of(shop)
    failures = [ZeroDivisionError("not yet")]

    @consumer.on(OrderPlaced)
    def charge(placed: OrderPlaced) -> None:
        shop.db.session.add(shop.Order())
        shop.db.session.flush()
        if failures:
            raise failures.pop()

    await deliver(shop, consumer, lambda: count(shop, shop.outbox.tables.inbox))
    assert count(shop, shop.Order.__table__) == 1


async def test_each_message_has_an_app_context_of_its_own(shop: Shop) -> None:
    consumer = consumer_of(shop)
    seen: list[Any] = []

    @consumer.on(OrderPlaced)
    def charge(placed: OrderPlaced) -> None:
        seen.append((current_app.name, "left_over" in g))
        g.left_over = True

    with shop.app.app_context():
        shop.outbox.add(OrderPlaced(2))
        shop.db.session.commit()
    await deliver(shop, consumer, lambda: len(seen) == 2)
    assert seen == [("shop", False)] * 2


async def test_a_consumer_of_a_bind_works_in_its_database(visits: Shop) -> None:
    consumer = consumer_of(visits)
    failures = [ZeroDivisionError("not yet")]

    @consumer.on(OrderPlaced)
    def charge(placed: OrderPlaced) -> None:
        visits.db.session.add(visits.Visit(id=placed.order_id))
        visits.db.session.flush()
        if failures:
            raise failures.pop()

    await deliver(visits, consumer, lambda: count(visits, visits.outbox.tables.inbox))
    assert count(visits, visits.Visit.__table__) == 1
    assert consumer.state.counts.failed == 1


def test_a_consumer_without_an_app_says_so_at_its_start() -> None:
    from flask_sqlalchemy import SQLAlchemy

    consumer = Consumer("billing", Outbox(SQLAlchemy()), transport=BROKER)
    consumer.on("orders")(lambda order: None)
    with pytest.raises(ConfigurationError, match=r"call outbox.init_app\(app\)"):
        consumer.run()


def test_a_consumer_takes_the_outbox_of_flask() -> None:
    with pytest.raises(ConfigurationError, match=r"takes an outbox_flask.Outbox"):
        Consumer("billing", core.Outbox())  # type: ignore[arg-type]


def test_it_is_a_consumer_like_any_other(shop: Shop) -> None:
    consumer = consumer_of(shop)
    consumer.on(OrderPlaced)(lambda placed: shop.db.session.add(shop.Order(id=placed.order_id)))
    with shop.app.app_context():
        assert consumer.handle(OrderPlaced(5), shop.db.session)
        shop.db.session.commit()
    assert count(shop, shop.Order.__table__, id=5) == 1
