"""Outboxes in the states that operators meet, as relays and consumers leave them behind."""

from __future__ import annotations

import uuid
from typing import Any

import sqlalchemy as sa

from outbox import Message
from outbox.dialects import clock
from outbox.tables import BODY
from tests.cli.conftest import Shop


def add(shop: Shop, key: str = "1", **options: Any) -> Message:
    """A committed message."""
    with shop.engine.begin() as connection:
        return shop.outbox.add(connection, "orders", {"n": 1}, key=key, type="order.placed", **options)


def park(shop: Shop, message: Message, role: str = "head") -> None:
    """What a relay does with a message that the broker refused for now."""
    tables = shop.outbox.tables
    body = [tables.message.c[name] for name in ("position", *BODY)]
    values = {"role": role, "attempts": 2, "next_attempt_at": clock(60), "last_error": "Refused: too warm"}
    with shop.engine.begin() as connection:
        row = connection.execute(sa.select(*body).where(tables.message.c.id == message.id)).one()
        connection.execute(sa.insert(tables.parked).values(**row._mapping, **values))
        connection.execute(sa.delete(tables.message).where(tables.message.c.id == message.id))


def bury(shop: Shop, message: Message, consumer: str = "", **changes: Any) -> uuid.UUID:
    """What a relay (a consumer) does with a message that it gives up. Returns the dead letter's id."""
    tables = shop.outbox.tables
    shop.execute(sa.delete(tables.message).where(tables.message.c.id == message.id))
    id = uuid.uuid4()
    dead = {
        "id": id,
        "consumer": consumer,
        "message_id": message.id,
        "topic": "orders",
        "key": message.key,
        "reason": "retries-exhausted",
        "exception_type": "ValueError",
        "fingerprint": "F3A9C012",
        "attempts": 8,
        "state": "open",
        "cycle": 0,
        **changes,
    }
    shop.execute(sa.insert(tables.dead_letter).values(**dead))
    if consumer and not dead["cycle"]:
        remember(shop, message.id, consumer, "dead")
    return id


def remember(shop: Shop, id: uuid.UUID, consumer: str, outcome: str = "done", **changes: Any) -> None:
    """A consumer's inbox row."""
    row = {"consumer": consumer, "message_id": id, "outcome": outcome, **changes}
    shop.execute(sa.insert(shop.outbox.tables.inbox).values(**row))


def wait(shop: Shop, id: uuid.UUID, consumer: str, due: float = 60, **changes: Any) -> None:
    """A message that a consumer failed with, and tries again in ``due`` seconds."""
    row = {
        "consumer": consumer,
        "message_id": id,
        "topic": "orders",
        "key": "1",
        "state": "waiting",
        "attempts": 3,
        "next_attempt_at": clock(due),
        "first_failed_at": clock(-10),
        "last_error": "ValueError: no such order",
        **changes,
    }
    shop.execute(sa.insert(shop.outbox.tables.attempt).values(**row))


def relay(
    shop: Shop,
    owner: str = "host:1",
    *,
    buckets: range = range(64),
    lease: float = 10,
    silent: float = 0,
    state: str | None = None,
) -> None:
    """A relay that has registered and was last heard of ``silent`` seconds ago, when it took its buckets for ``lease``."""
    tables = shop.outbox.tables
    shop.execute(
        sa.insert(tables.relay).values(
            owner=owner, host="host", version="1.0", state=state, heartbeat_at=clock(-silent)
        )
    )
    shop.execute(
        sa.update(tables.lease)
        .where(tables.lease.c.bucket.in_(list(buckets)))
        .values(owner=owner, expires_at=clock(lease - silent))
    )


def age(shop: Shop, table: sa.Table, seconds: float) -> None:
    shop.execute(sa.update(table).values(created_at=clock(-seconds)))
