"""What users write, as type checkers see it. Never run: test_typing.py gives it to mypy and pyright.

`assert_type` says what must be inferred; a `type: ignore` says what must be refused, and both checkers complain if it is not.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import datetime as dt
import sqlite3
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, assert_type

import aiosqlite
import psycopg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import DeclarativeBase, Session, scoped_session

from outbox import Message, Outbox, event


class Base(DeclarativeBase):
    pass


outbox = Outbox(Base.metadata)
assert_type(outbox, Outbox)
assert_type(outbox.metadata, sa.MetaData)


# ---- a declared class keeps its type, its constructor and its attributes


@event("orders", type="order.placed", key="order_id", version=2)
@dataclass
class OrderPlaced:
    order_id: int
    total: str


@event("orders", type="order.cancelled", key=lambda message: message.order_id)
@dataclass(frozen=True, slots=True)
class OrderCancelled:
    order_id: uuid.UUID


assert_type(OrderPlaced(1, "2").order_id, int)
assert_type(OrderCancelled(uuid.uuid4()).order_id, uuid.UUID)
declared: type[OrderPlaced] = OrderPlaced
make: Callable[[int, str], OrderPlaced] = OrderPlaced

OrderPlaced(1)  # type: ignore[call-arg]
OrderPlaced("1", "2")  # type: ignore[arg-type]


@event("orders")  # type: ignore[call-arg]
class WithoutType:
    pass


@event(type="a")  # type: ignore[call-arg]
class WithoutTopic:
    pass


@event("orders", type=None)  # type: ignore[arg-type]
class WithNoType:
    pass


# ---- add: wherever there is a transaction


def everywhere(
    session: Session,
    scoped: scoped_session[Session],
    async_session: AsyncSession,
    async_scoped: async_scoped_session[AsyncSession],
    connection: sa.Connection,
) -> None:
    assert_type(outbox.add(session, "orders", {"a": 1}), Message)
    assert_type(outbox.add(scoped, "orders", [1]), Message)
    assert_type(outbox.add(async_session, "orders", b""), Message)
    assert_type(outbox.add(async_scoped, "orders", None), Message)
    assert_type(outbox.add(connection, "orders", "text"), Message)
    assert_type(outbox.add(session, OrderPlaced(1, "2")), Message)
    assert_type(outbox.add(async_session, OrderPlaced(1, "2"), headers={"a": "b"}), Message)


def nowhere(engine: sa.Engine, async_connection: AsyncConnection) -> None:
    outbox.add(engine, "orders", b"")  # type: ignore[call-overload]
    outbox.add(async_connection, "orders", b"")  # type: ignore[call-overload]
    outbox.add("orders", {"a": 1})  # type: ignore[call-overload]


# ---- add: with what


def arguments(session: Session) -> None:
    outbox.add(session, "orders", {}, key="a")
    outbox.add(session, "orders", {}, key=1)
    outbox.add(session, "orders", {}, key=uuid.uuid4())
    outbox.add(session, "orders", {}, type="a", headers={"a": "b"}, content_type="a/b", id=uuid.uuid4())
    outbox.add(session, "orders", {}, deliver_at=dt.timedelta(hours=1), bind_arguments={"mapper": Base})
    outbox.add(session, OrderPlaced(1, "2"), deliver_at=dt.datetime.now(dt.UTC), id=uuid.uuid4())

    outbox.add(session, "orders", {}, key=1.5)  # type: ignore[call-overload]
    outbox.add(session, "orders", {}, key=None)  # type: ignore[call-overload]
    outbox.add(session, "orders", {}, headers={"a": 1})  # type: ignore[dict-item]
    outbox.add(session, "orders", {}, deliver_at=60)  # type: ignore[call-overload]
    outbox.add(session, "orders", {}, id="a")  # type: ignore[call-overload]
    outbox.add(session, "orders", {}, typ="a")  # type: ignore[call-overload]
    outbox.add(session, OrderPlaced(1, "2"), {})  # type: ignore[call-overload]
    outbox.add(session, OrderPlaced(1, "2"), key=1)  # type: ignore[call-overload]
    outbox.add(session)  # type: ignore[call-overload]


def unflushed(session: Session, order_id: int | None) -> None:
    outbox.add(session, "orders", {}, key=order_id)  # type: ignore[arg-type]


# ---- the others


def others(session: Session, connection: sa.Connection, message: Message) -> None:
    assert_type(outbox.add_all(session, [OrderPlaced(1, "2"), message, {"topic": "a", "payload": 1}]), list[Message])
    assert_type(outbox.staged(session), list[Message])
    assert_type(outbox.cancel(connection, message.id), bool)
    assert_type(outbox.claim(session, "billing", message.id), bool)
    assert_type(outbox.claim(session, "billing", "foreign id", cycle=1), bool)
    assert_type(message.id, uuid.UUID)
    assert_type(message.key, str | None)
    assert_type(message.payload, bytes | None)

    message.key = "b"  # type: ignore[misc]
    outbox.claim(session, "billing", 7)  # type: ignore[arg-type]


async def in_async_code(session: AsyncSession, connection: AsyncConnection, id: uuid.UUID) -> None:
    assert_type(await session.run_sync(outbox.claim, "billing", id), bool)
    assert_type(await session.run_sync(outbox.cancel, id), bool)
    assert_type(await connection.run_sync(outbox.add, "orders", {"a": 1}), Message)

    outbox.claim(session, "billing", id)  # type: ignore[arg-type]
    outbox.cancel(session, id)  # type: ignore[arg-type]


# ---- connections of drivers


def of_sync_drivers(
    connection: psycopg.Connection[tuple[Any, ...]],
    sqlite: sqlite3.Connection,
    pool: sa.PoolProxiedConnection,
    id: uuid.UUID,
) -> None:
    assert_type(outbox.add(connection, "orders", {"a": 1}, key=1), Message)
    assert_type(outbox.add(sqlite, OrderPlaced(1, "2")), Message)
    assert_type(outbox.add(pool, "orders", b""), Message)
    assert_type(outbox.add_all(sqlite, [OrderPlaced(1, "2")]), list[Message])
    assert_type(outbox.cancel(connection, id), bool)
    assert_type(outbox.claim(sqlite, "billing", id), bool)

    outbox.add(sqlite.cursor(), "orders", {})  # type: ignore[call-overload]
    outbox.add(connection, "orders", {}, key=None)  # type: ignore[call-overload]


async def of_async_drivers(
    connection: psycopg.AsyncConnection[tuple[Any, ...]],
    sqlite: aiosqlite.Connection,
    asyncpg: WhatAsyncpgHas,
    core: AsyncConnection,
    session: AsyncSession,
    sync: sqlite3.Connection,
    id: uuid.UUID,
) -> None:
    assert_type(await outbox.aadd(connection, "orders", {"a": 1}, key=1), Message)
    assert_type(await outbox.aadd(sqlite, OrderPlaced(1, "2"), headers={"a": "b"}), Message)
    assert_type(await outbox.aadd(asyncpg, "orders", b""), Message)
    assert_type(await outbox.aadd(core, "orders", b""), Message)
    assert_type(await outbox.aadd_all(session, [OrderPlaced(1, "2")]), list[Message])
    assert_type(await outbox.acancel(asyncpg, id), bool)
    assert_type(await outbox.aclaim(connection, "billing", id, cycle=1), bool)

    outbox.aadd(sqlite, "orders", {})  # type: ignore[unused-coroutine]
    outbox.add(connection, "orders", {})  # type: ignore[call-overload]
    outbox.add(sqlite, "orders", {})  # type: ignore[call-overload]
    outbox.add(asyncpg, "orders", {})  # type: ignore[call-overload]
    outbox.claim(asyncpg, "billing", id)  # type: ignore[arg-type]
    await outbox.aadd(sync, "orders", {})  # type: ignore[call-overload]
    await outbox.aadd(connection, "orders", {}, key=None)  # type: ignore[call-overload]
    await outbox.aclaim(sync, "billing", id)  # type: ignore[arg-type]


class WhatAsyncpgHas:
    """It has no types of its own."""

    def is_in_transaction(self) -> bool:
        raise NotImplementedError

    async def executemany(self, command: str, args: Any, *, timeout: float | None = None) -> None:
        raise NotImplementedError
