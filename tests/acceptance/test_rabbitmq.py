"""From the table through RabbitMQ into a handler's table, by the commands as people run them."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Consumer, Outbox
from outbox_migrations import migrate
from tests.cli.command import outbox as command
from tests.transports.tools import until

KEYS = 25


async def test_what_is_added_is_charged_once_and_in_order_and_waits_while_nobody_would_get_it(
    tmp_path: Path, rabbitmq_url: str
) -> None:
    topic, url = f"orders-{uuid.uuid4().hex[:8]}", f"sqlite:///{tmp_path}/shop.db"
    broker = f"{rabbitmq_url}?partitions=2"
    engine = sa.create_engine(url)
    metadata = sa.MetaData()
    outbox = Outbox()
    charges = sa.Table("charge", metadata, sa.Column("at", sa.Integer, primary_key=True), sa.Column("n", sa.Integer))
    metadata.create_all(engine)
    with engine.begin() as connection:
        migrate(connection)

    def add(first: int, count: int) -> None:
        with engine.begin() as connection:
            for number in range(first, first + count):
                outbox.add(connection, topic, {"n": number}, key=str(number % KEYS), type="order.placed")

    def drain() -> tuple[int, str]:
        done = command("relay", "--drain", "--database", url, "--transport", broker)
        return done.status, done.err

    def left() -> int:
        with engine.connect() as connection:
            return connection.scalar(sa.text("select count(*) from outbox_message")) or 0

    def charged() -> list[int]:
        with engine.connect() as connection:
            return list(connection.scalars(sa.select(charges.c.n).order_by(charges.c.at)))

    add(0, 100)
    status, said = await asyncio.to_thread(drain)
    assert status == 3
    assert "no queue is bound" in said
    assert "guest:guest" not in said
    assert left() == 100

    billing = Consumer("billing", outbox, database=url, transport=broker)

    @billing.on(topic)
    def charge(order: dict[str, int], session: Session) -> None:
        session.execute(sa.insert(charges).values(n=order["n"]))

    async with billing:
        await until(billing.state.subscribed.is_set)
        status, said = await asyncio.to_thread(drain)
        assert status == 0, said
        await until(lambda: len(charged()) == 100)
    add(100, 100)
    status, said = await asyncio.to_thread(drain)
    assert status == 0, said
    assert left() == 0
    async with billing:
        await until(lambda: len(charged()) == 200)
    by_key = defaultdict(list)
    for number in charged():
        by_key[number % KEYS].append(number)
    assert by_key == {key: list(range(key, 200, KEYS)) for key in range(KEYS)}
    engine.dispose()
