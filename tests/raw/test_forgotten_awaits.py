"""What is wrong with a call is said where it is written; what cannot be refused is at least not silent."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from typing import Any

import aiosqlite
import psycopg
import psycopg_pool
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from outbox import EncodingError
from tests.raw.shops import RawShop
from tests.staging.shop import outbox


@pytest.fixture
async def connection(sqlite_shop: RawShop) -> AsyncIterator[aiosqlite.Connection]:
    async with aiosqlite.connect(str(sqlite_shop.url.database)) as connection:
        yield connection


@pytest.fixture
def sync_connection(sqlite_shop: RawShop) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(str(sqlite_shop.url.database))
    yield connection
    connection.close()


CALLS: dict[str, Callable[[Any], Any]] = {
    "aadd": lambda connection: outbox.aadd(connection, "orders", b"a"),
    "aadd_all": lambda connection: outbox.aadd_all(connection, [{"topic": "orders", "payload": b"a"}]),
    "acancel": lambda connection: outbox.acancel(connection, uuid.uuid4()),
    "aclaim": lambda connection: outbox.aclaim(connection, "billing", "id"),
}


@pytest.mark.parametrize("verb", CALLS)
async def test_a_call_that_nobody_awaits_is_an_error_in_the_log_beside_python_s_warning(
    verb: str, connection: aiosqlite.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.warns(RuntimeWarning, match=f"coroutine 'Outbox.{verb}' was never awaited"):
        CALLS[verb](connection)
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith(f"outbox.{verb}(…) was never awaited: ")


async def test_the_log_names_the_message_but_not_what_is_in_it(
    connection: aiosqlite.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    id = uuid.uuid4()
    with pytest.warns(RuntimeWarning):
        outbox.aadd(connection, "orders", b"secret", id=id)
    assert caplog.messages == [f"outbox.aadd(…) was never awaited: message {id} for 'orders' is not written"]


@pytest.mark.parametrize("verb", CALLS)
async def test_a_call_without_await_is_neither_true_nor_false(verb: str, connection: aiosqlite.Connection) -> None:
    call = CALLS[verb](connection)
    with pytest.raises(TypeError, match=rf"outbox.{verb}\(…\) has no result yet: write await outbox.{verb}"):
        bool(call)
    call.close()


async def test_a_call_may_become_a_task(
    connection: aiosqlite.Connection, sqlite_shop: RawShop, caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.create_task(outbox.aadd(connection, "orders", b"a"))
    await asyncio.gather(outbox.aadd(connection, "orders", b"b"))
    await asyncio.wait_for(outbox.aadd(connection, "orders", b"c"), 10)
    await connection.commit()
    assert sqlite_shop.messages() == ["a", "b", "c"]
    assert caplog.records == []


async def test_what_cannot_be_encoded_raises_before_the_await(connection: aiosqlite.Connection) -> None:
    with pytest.raises(EncodingError, match="key is None"):
        outbox.aadd(connection, "orders", b"", key=None)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="the payload is missing"):
        outbox.aadd(connection, "orders")
    with pytest.raises(TypeError, match="needs 'topic' and 'payload'"):
        outbox.aadd_all(connection, [{}])


# ---------------------------------------------------------------- sync for async, and the other way round


async def test_the_sync_verbs_say_what_to_write_for_an_async_connection(connection: Any) -> None:
    for verb, arguments in (
        ("add", ("orders", b"")),
        ("add_all", ([],)),
        ("cancel", (uuid.uuid4(),)),
        ("claim", ("billing", "id")),
    ):
        with pytest.raises(TypeError, match=rf"write await outbox.a{verb}\(connection, …\)"):
            getattr(outbox, verb)(connection, *arguments)


def test_the_async_verbs_say_what_to_write_for_a_sync_connection(
    sync_connection: sqlite3.Connection, sqlite_shop: RawShop
) -> None:
    with Session(sqlite_shop.engine) as session:
        for where in (sync_connection, session, scoped_session(sessionmaker(sqlite_shop.engine))):
            for verb, call in CALLS.items():
                with pytest.raises(TypeError, match=rf"needs no await: write outbox.{verb[1:]}\(…\)"):
                    call(where)


async def test_nothing_is_staged_on_a_connection_of_any_kind(
    connection: aiosqlite.Connection, sync_connection: sqlite3.Connection, sqlite_shop: RawShop
) -> None:
    engine = create_async_engine(sqlite_shop.url.set(drivername="sqlite+aiosqlite"))
    async with engine.connect() as core:
        for where in (connection, sync_connection, core):
            assert outbox.staged(where) == []
    await engine.dispose()
    with pytest.raises(TypeError, match="object is no session or connection"):
        outbox.staged(object())  # type: ignore[arg-type]


async def test_an_async_connection_of_sqlalchemy_has_two_ways(sqlite_shop: RawShop) -> None:
    engine = create_async_engine(sqlite_shop.url.set(drivername="sqlite+aiosqlite"))
    async with engine.connect() as connection:
        with pytest.raises(TypeError, match=r"await connection.run_sync\(outbox.add, …\), or await outbox.aadd"):
            outbox.add(connection, "orders", b"")  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=r"run_sync\(outbox.claim, …\), or await outbox.aclaim"):
            outbox.claim(connection, "billing", "id")  # type: ignore[arg-type]
    await engine.dispose()


def test_what_is_no_connection_says_what_to_pass(sync_connection: sqlite3.Connection) -> None:
    pool = psycopg_pool.ConnectionPool(open=False)
    for thing, instead in (
        (sync_connection.cursor(), "Cursor is no session or connection: pass the connection of this cursor"),
        (pool, r"pass what `with pool.connection\(\) as connection:` gives"),
        (object(), "object is no session or connection: pass a Session, .* or a connection of psycopg, "),
        (sa.create_engine("sqlite://"), "Engine is no session or connection"),
        (None, "NoneType is no session or connection"),
        (psycopg, "module is no session or connection"),
    ):
        with pytest.raises(TypeError, match=instead):
            outbox.add(thing, "orders", b"")  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=instead):
            outbox.aadd(thing, "orders", b"")  # type: ignore[call-overload]


async def test_a_message_that_is_not_due_is_cancelled_on_the_connection_that_scheduled_it(
    connection: aiosqlite.Connection,
) -> None:
    message = await outbox.aadd(connection, "orders", b"a", deliver_at=timedelta(hours=1))
    assert await outbox.acancel(connection, message.id)
