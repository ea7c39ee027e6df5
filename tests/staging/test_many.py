"""Many messages at once: what one statement with arrays writes is what single inserts would, in the order of ``add``."""

from __future__ import annotations

import datetime as dt
import logging
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from outbox import Message, Outbox
from outbox.encoding import load_headers
from outbox.testing import capture
from tests.services.fixtures import INSTALL_TIMEOUT
from tests.staging.conftest import postgresql_engine
from tests.staging.shop import Shop, outbox

pytestmark = pytest.mark.timeout(INSTALL_TIMEOUT)

TEXTS = [
    "NULL",
    "null",
    '"',
    "'",
    "\\",
    "{}",
    "{a,b}",
    ",",
    " ",
    "\n",
    "%s",
    "%(id)s",
    ":id",
    "$1",
    "Zoë",
    "日本",
    "🐘",
]
PAYLOADS = [None, b"", b"\x00", b"\xff\\000", b"NULL", b"x" * 3000]


def odd(number: int, **more: Any) -> dict[str, Any]:
    """A message of something that an array could get wrong."""
    text = TEXTS[number % len(TEXTS)]
    message: dict[str, Any] = {"topic": text * (number % 255 + 1), "payload": PAYLOADS[number % len(PAYLOADS)], **more}
    message["topic"] = message["topic"][:255]
    if number % 2:
        message["key"] = text
    if number % 3:
        message["type"] = text
    if number % 5:
        message["content_type"] = text
    if number % 7:
        message["headers"] = {text: text}
    return message


def written(messages: list[Message]) -> list[tuple[Any, ...]]:
    return [(m.id, m.topic, m.payload, m.key, m.type, m.content_type, dict(m.headers), m.deliver_at) for m in messages]


def read(connection: sa.Connection, table: sa.Table, of: Outbox = outbox) -> list[tuple[Any, ...]]:
    """The messages of a table as `written` lists them, those of the message table by position."""
    rows = connection.execute(sa.select(table).order_by(table.primary_key.columns.values()[0])).mappings()
    return [
        (
            *(row[name] for name in ("id", "topic", "payload", "key", "type", "content_type")),
            load_headers(row["headers"]),
            row.get("deliver_at"),
        )
        for row in rows
    ]


@contextmanager
def executions(engine: sa.Engine) -> Iterator[list[tuple[str, bool]]]:
    """The inserts into our tables meanwhile, each with whether it was an executemany."""
    seen: list[tuple[str, bool]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        if statement.startswith("INSERT INTO") and "outbox_" in statement:
            seen.append((statement, executemany))

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


def numbers(shop: Shop) -> list[int]:
    return [int(name) for name in shop.messages()]


def test_positions_are_in_the_order_of_add(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        # of two ids or keys none says which comes first
        outbox.add_all(session, [{"topic": "orders", "payload": n, "key": n * 7919 % 1000} for n in range(10_000)])
    assert numbers(shop) == list(range(10_000))


def test_positions_are_in_the_order_of_add_whatever_the_size_of_the_payloads(shop: Shop) -> None:
    """Some statements have arrays then, and some are executed row by row."""
    with Session(shop.engine) as session, session.begin():
        sizes = (n // 1000 % 2 * 6000 for n in range(4005))
        outbox.add_all(
            session, [{"topic": "orders", "payload": b"%d" % n + b" " * size} for n, size in enumerate(sizes)]
        )
    assert numbers(shop) == list(range(4005))


@pytest.mark.parametrize("count", [9, 10, 11, 999, 1000, 1001, 1010])
def test_any_number_is_written_once(postgresql_shop: Shop, count: int) -> None:
    with Session(postgresql_shop.engine) as session, session.begin():
        outbox.add_all(session, [{"topic": "orders", "payload": n} for n in range(count)])
    assert numbers(postgresql_shop) == list(range(count))


def test_every_column_is_what_was_given(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        added = outbox.add_all(session, [odd(n) for n in range(500)])
    with shop.engine.connect() as connection:
        assert read(connection, outbox.tables.message) == written(added)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_all_payloads_alike(shop: Shop, payload: bytes | None) -> None:
    """And all other columns that may be NULL are."""
    with Session(shop.engine) as session, session.begin():
        added = outbox.add_all(session, [{"topic": "orders", "payload": payload} for _ in range(20)])
    with shop.engine.connect() as connection:
        assert read(connection, outbox.tables.message) == written(added)


def test_the_bucket_is_the_keys_own_however_many_there_are(postgresql_shop: Shop) -> None:
    table = outbox.tables.message
    for count in (1, 64):
        with Session(postgresql_shop.engine) as session, session.begin():
            outbox.add_all(session, [{"topic": str(count), "payload": b"", "key": n} for n in range(count)])
    with postgresql_shop.engine.connect() as connection:
        buckets = {
            (row.topic, row.key): row.bucket
            for row in connection.execute(sa.select(table.c.topic, table.c.key, table.c.bucket))
        }
        created = connection.scalars(sa.select(table.c.created_at)).all()
    assert buckets["1", "0"] == buckets["64", "0"]
    assert len(set(buckets.values())) > 20
    assert all(dt.datetime.now(dt.UTC) - at < dt.timedelta(minutes=5) for at in created)


def test_scheduled_and_other_messages_go_to_their_tables(shop: Shop) -> None:
    due = dt.datetime(2031, 1, 2, 3, 4, 5, 678901, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    with Session(shop.engine) as session, session.begin():
        added = outbox.add_all(
            session, [odd(n, deliver_at=due + dt.timedelta(days=n)) if n % 2 else odd(n) for n in range(200)]
        )
    with shop.engine.connect() as connection:
        assert read(connection, outbox.tables.message) == written([m for m in added if m.deliver_at is None])
        later = sorted((m for m in added if m.deliver_at is not None), key=lambda message: message.id)
        assert read(connection, outbox.tables.scheduled) == written(later)


def test_the_same_connection_again_and_again(postgresql_shop: Shop) -> None:
    """The driver prepares the statement after some, and PostgreSQL plans it for any arrays."""
    with Session(postgresql_shop.engine) as session:
        expected = 0
        for count in (10, 100, 10, 50, 12, 1000, 11, 10, 300, 10, 10, 10, 500):
            outbox.add_all(session, [{"topic": "orders", "payload": expected + n} for n in range(count)])
            session.commit()
            expected += count
    assert numbers(postgresql_shop) == list(range(expected))


class TestTheStatement:
    def test_is_one_for_many_small_messages(self, postgresql_shop: Shop) -> None:
        with executions(postgresql_shop.engine) as seen, Session(postgresql_shop.engine) as session, session.begin():
            outbox.add_all(session, [odd(n) for n in range(100)])
        ((statement, executemany),) = seen
        assert "unnest" in statement
        assert not executemany

    @pytest.mark.parametrize(("count", "size"), [(1, 10), (9, 10), (20, 10_000)])
    def test_is_a_plain_insert_for_few_or_large_ones(self, postgresql_shop: Shop, count: int, size: int) -> None:
        with executions(postgresql_shop.engine) as seen, Session(postgresql_shop.engine) as session, session.begin():
            outbox.add_all(session, [{"topic": "orders", "payload": b"x" * size} for _ in range(count)])
        ((statement, executemany),) = seen
        assert "VALUES" in statement
        assert executemany == (count > 1)

    def test_counts_large_headers_too(self, postgresql_shop: Shop) -> None:
        headers = {"trace": "x" * 10_000}
        with executions(postgresql_shop.engine) as seen, Session(postgresql_shop.engine) as session, session.begin():
            outbox.add_all(session, [{"topic": "orders", "payload": b"", "headers": headers} for _ in range(20)])
        ((statement, _),) = seen
        assert "VALUES" in statement

    def test_is_seen_by_listeners_as_an_insert_into_our_table(self, shop: Shop) -> None:
        seen: list[sa.Table] = []

        def before(connection: Any, statement: Any, *rest: Any) -> None:
            if isinstance(statement, sa.Insert):
                seen.append(statement.table)  # type: ignore[arg-type]

        sa.event.listen(shop.engine, "before_execute", before)
        with Session(shop.engine) as session, session.begin():
            outbox.add_all(session, [odd(n) for n in range(100)])
        assert seen == [outbox.tables.message]

    def test_is_logged_with_echo(self, postgresql_shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
        engine = postgresql_engine(postgresql_shop.engine.url, echo=True)
        with caplog.at_level(logging.INFO, "sqlalchemy.engine"), Session(engine) as session, session.begin():
            outbox.add_all(session, [odd(n) for n in range(100)])
        engine.dispose()
        assert any("INSERT INTO outbox_message" in record.getMessage() for record in caplog.records)

    def test_is_compiled_once(self, postgresql_shop: Shop) -> None:
        compiled: list[str] = []

        def note(
            connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
        ) -> None:
            if "unnest" in statement:
                compiled.append(context.cache_hit.name)

        sa.event.listen(postgresql_shop.engine, "before_cursor_execute", note)
        for count in (20, 30):
            with Session(postgresql_shop.engine) as session, session.begin():
                outbox.add_all(session, [odd(n) for n in range(count)])
        assert compiled == ["CACHE_MISS", "CACHE_HIT"]


class TestWhereTheTablesAre:
    @staticmethod
    def _adds_many(engine: sa.Engine, target: Outbox, table: str) -> None:
        with Session(engine) as session, session.begin():
            added = target.add_all(session, [odd(n) for n in range(100)])
            target.add_all(session, [odd(n, deliver_at=dt.timedelta(days=1)) for n in range(100)])
        with engine.connect() as connection:
            assert read(connection, target.tables.message) == written(added)
            assert connection.scalar(sa.text(f"SELECT count(*) FROM {table}message")) == 100
            assert connection.scalar(sa.text(f"SELECT count(*) FROM {table}scheduled")) == 100

    def test_in_a_schema_with_a_prefix(self, postgresql_shop: Shop) -> None:
        engine = postgresql_shop.engine
        with engine.begin() as connection:
            connection.execute(sa.text('CREATE SCHEMA "App"'))
        target = Outbox(schema="App", prefix="shop_")
        target.metadata.create_all(engine)
        self._adds_many(engine, target, '"App".shop_')

    def test_in_a_schema_that_is_mapped_when_it_is_executed(self, postgresql_shop: Shop) -> None:
        with postgresql_shop.engine.begin() as connection:
            connection.execute(sa.text("CREATE SCHEMA one"))
            connection.execute(sa.text("CREATE SCHEMA two"))
        target = Outbox(schema="tenant")
        for tenant in ("one", "two"):
            engine = postgresql_shop.engine.execution_options(schema_translate_map={"tenant": tenant})
            target.metadata.create_all(engine)
            self._adds_many(engine, target, f"{tenant}.outbox_")


class TestWhenItFails:
    def test_a_rolled_back_savepoint_takes_its_many(self, shop: Shop) -> None:
        with Session(shop.engine) as session, session.begin():
            session.connection()
            outbox.add_all(session, [{"topic": "orders", "payload": n} for n in range(50)])
            savepoint = session.begin_nested()
            outbox.add_all(session, [{"topic": "orders", "payload": 50 + n} for n in range(50)])
            savepoint.rollback()
            outbox.add_all(session, [{"topic": "orders", "payload": 100 + n} for n in range(50)])
        assert numbers(shop) == [*range(50), *range(100, 150)]

    def test_a_statement_that_was_executed_is_not_executed_again(
        self, postgresql_shop: Shop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A listener of the application's refuses the second of three, and the application commits all the same."""
        count = 0

        def refuse(connection: Any, statement: Any, *rest: Any) -> None:
            nonlocal count
            count += isinstance(statement, sa.Insert)
            if count == 2:
                raise RuntimeError

        with Session(postgresql_shop.engine) as session:
            session.connection()
            outbox.add_all(session, [{"topic": "orders", "payload": n} for n in range(2500)])
            sa.event.listen(postgresql_shop.engine, "before_execute", refuse)
            with pytest.raises(RuntimeError):
                session.commit()
            session.commit()
        assert numbers(postgresql_shop) == list(range(2500))

    def test_what_a_listener_adds_meanwhile_is_written_too(self, shop: Shop) -> None:
        with Session(shop.engine) as session:

            def more(connection: Any, statement: Any, *rest: Any) -> None:
                if isinstance(statement, sa.Insert) and not extra:
                    extra.append(outbox.add(session, "orders", 50))

            extra: list[Message] = []
            session.connection()
            outbox.add_all(session, [{"topic": "orders", "payload": n} for n in range(50)])
            sa.event.listen(shop.engine, "before_execute", more)
            session.commit()
        assert numbers(shop) == list(range(51))


def test_all_are_captured_in_order(shop: Shop) -> None:
    with capture(outbox) as sent, Session(shop.engine) as session:
        added = outbox.add_all(
            session, [odd(n, deliver_at=dt.timedelta(days=1)) if n % 3 == 0 else odd(n) for n in range(3000)]
        )
        session.commit()
        outbox.add_all(session, [odd(n) for n in range(100)])
        session.rollback()
    assert written(sent.all) == written(sorted(added, key=lambda message: message.deliver_at is None))


@pytest.fixture(params=["postgresql+asyncpg", "postgresql+psycopg"])
async def async_engine(request: pytest.FixtureRequest, postgresql_shop_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(sa.make_url(postgresql_shop_url).set(drivername=request.param))
    yield engine
    await engine.dispose()


class TestAsync:
    async def test_positions_are_in_the_order_of_add(self, async_engine: AsyncEngine) -> None:
        async with AsyncSession(async_engine) as session, session.begin():
            added = outbox.add_all(
                session, [{"topic": "orders", "payload": n, "key": n * 7919 % 1000} for n in range(10_000)]
            )
        async with async_engine.connect() as connection:
            assert await connection.run_sync(read, outbox.tables.message) == written(added)

    async def test_the_statement_is_one(self, async_engine: AsyncEngine) -> None:
        with executions(async_engine.sync_engine) as seen:
            async with AsyncSession(async_engine) as session, session.begin():
                outbox.add_all(session, [odd(n) for n in range(100)])
        ((statement, executemany),) = seen
        assert "unnest" in statement
        assert not executemany

    async def test_every_column_is_what_was_given(self, async_engine: AsyncEngine) -> None:
        due = dt.datetime(2031, 1, 2, 3, 4, 5, 678901, tzinfo=dt.timezone(dt.timedelta(hours=2)))
        async with AsyncSession(async_engine) as session:
            for _ in range(8):  # prepared by then
                added = outbox.add_all(session, [odd(n) for n in range(200)])
                later = outbox.add_all(session, [odd(n, deliver_at=due) for n in range(200)])
                await session.commit()
        async with async_engine.connect() as connection:
            assert (await connection.run_sync(read, outbox.tables.message))[-200:] == written(added)
            assert (await connection.run_sync(read, outbox.tables.scheduled))[-200:] == written(later)

    async def test_all_payloads_alike(self, async_engine: AsyncEngine) -> None:
        async with AsyncSession(async_engine) as session, session.begin():
            added = [
                message
                for payload in PAYLOADS
                for message in await session.run_sync(
                    outbox.add_all, [{"topic": "orders", "payload": payload} for _ in range(20)]
                )
            ]
        async with async_engine.connect() as connection:
            assert await connection.run_sync(read, outbox.tables.message) == written(added)

    async def test_ids_that_the_driver_returned(self, async_engine: AsyncEngine) -> None:
        """asyncpg has a UUID of its own; one list may have both kinds."""
        async with async_engine.connect() as connection:
            got = [await connection.scalar(sa.text("SELECT gen_random_uuid()")) for _ in range(10)]
        async with AsyncSession(async_engine) as session, session.begin():
            ids = [id for pair in zip(got, (uuid.uuid4() for _ in got), strict=True) for id in pair]
            added = outbox.add_all(session, [{"topic": "orders", "payload": b"", "id": id} for id in ids])
        async with async_engine.connect() as connection:
            assert await connection.run_sync(read, outbox.tables.message) == written(added)
