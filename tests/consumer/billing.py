"""The service that the consumer's tests drive: its tables and messages, and what tests ask of them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from msgspec.structs import replace
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox import Outbox, event
from outbox._message import bucket_of, new_id
from outbox._outgoing import Outgoing
from outbox.backoff import Backoff
from outbox.consumer import Consumer, Retries
from outbox.dead_letters import DeadLetter, DeadLetters
from outbox.dialects import clock
from outbox.stores.engine import sync_engine_for
from outbox.transport import Transport
from outbox.transports import open_transport

TIMEOUT = 30.0  # seconds; far beyond what anything here takes

QUICKLY = Backoff(first=0.02, factor=1.0, most=0.02)


class Base(DeclarativeBase):
    pass


class Charge(Base):
    """The effect. Nothing in the database forbids a second one, on purpose."""

    __tablename__ = "charges"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    amount: Mapped[str] = mapped_column(sa.String(20), default="")


outbox = Outbox(Base.metadata)


@event("orders", type="order.placed", key="order_id")
@dataclass
class OrderPlaced:
    order_id: int
    total: Decimal = Decimal("1.50")


@event("charges", type="charged", key="order_id")
@dataclass
class Charged:
    order_id: int


class Billing:
    """One database and one broker, with everything that tests count in them."""

    def __init__(self, url: str, transport: str) -> None:
        self.url = url
        self.transport_url = transport
        self.engine = sync_engine_for(url, create=True)
        Base.metadata.create_all(self.engine)
        self.tables = outbox.tables
        self.letters = DeadLetters(outbox, database=self.engine)
        self.sent = 0

    def consumer(self, name: str = "billing", **options: Any) -> Consumer:
        options.setdefault("database", self.url)
        options.setdefault("transport", self.transport_url)
        options.setdefault("retries", Retries(attempts=3, backoff=QUICKLY))
        return Consumer(name, outbox, **options)

    # ------------------------------------------------------------ the broker

    async def publish(self, *messages: Outgoing, transport: Transport | None = None) -> None:
        opened = transport or open_transport(self.transport_url)
        outcomes = await opened.publish(messages)
        assert [outcome.kind for outcome in outcomes] == ["sent"] * len(messages)
        if transport is None:
            await opened.close()

    # ------------------------------------------------------------ the database

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All rows of one of the outbox's tables, by primary key."""
        return self._rows(getattr(self.tables, name))

    def _rows(self, table: sa.Table) -> list[dict[str, Any]]:
        with self.engine.connect() as connection:
            query = sa.select(table).order_by(*table.primary_key.columns)
            return [dict(row._mapping) for row in connection.execute(query)]

    def charges(self) -> list[int]:
        """The order ids that were charged, in the order in which that happened."""
        return [row["order_id"] for row in self._rows(Base.metadata.tables["charges"])]

    def dead(self, **wanted: Any) -> list[DeadLetter]:
        return self.letters.find(state="any", limit=10_000, **wanted)

    def expire_replay_leases(self) -> None:
        """As if the time had passed after which another process takes a dead one's replays."""
        attempt = self.tables.attempt
        with self.engine.begin() as connection:
            connection.execute(sa.update(attempt).where(attempt.c.state == "replay").values(next_attempt_at=clock()))

    def close(self) -> None:
        self.letters.close()
        self.engine.dispose()


def placed(order_id: int, *, key: str | None = "same", id: uuid.UUID | None = None, **changes: Any) -> Outgoing:
    """The message of an order, as the relay hands it to a transport."""
    id = id or new_id()
    message = Outgoing(
        position=0,
        id=str(id),
        topic="orders",
        key=key,
        type="order.placed",
        payload=f'{{"order_id": {order_id}, "total": "1.50"}}'.encode(),
        content_type="application/json",
        headers=None,
        bucket=bucket_of(key, id),
    )
    return replace(message, **changes)


def charge(event: OrderPlaced, session: Session) -> None:
    session.add(Charge(order_id=event.order_id, amount=str(event.total)))


@asynccontextmanager
async def running(*consumers: Consumer) -> AsyncIterator[None]:
    """These consumers, subscribed."""
    for consumer in consumers:
        await consumer.__aenter__()
    try:
        for consumer in consumers:
            await asyncio.wait_for(consumer.state.subscribed.wait(), TIMEOUT)
        yield
    finally:
        for consumer in consumers:
            await consumer.__aexit__()


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Return as soon as the condition holds; fail when it does not in `TIMEOUT` seconds."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what or condition}"
        await asyncio.sleep(0.01)


async def until_finished(consumer: Consumer, count: int) -> None:
    """Until so many messages (replays included) of this consumer are handled, skipped or dead."""
    counts = consumer.state.counts
    await until(
        lambda: (
            counts.handled + counts.skipped + counts.ignored + counts.dead >= count and consumer.state.in_memory == 0
        ),
        f"{count} messages; there are {consumer.state}",
    )


def order_of(seen: Sequence[tuple[str, int]], key: str) -> list[int]:
    return [number for of, number in seen if of == key]
