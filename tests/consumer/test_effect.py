"""A message's effect: once, together with its inbox row and with the messages that its handler adds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from outbox import Message
from outbox._message import new_id
from outbox.stores.engine import async_engine_for
from tests.consumer.billing import Billing, Charge, Charged, OrderPlaced, charge, placed, running, until_finished
from tests.consumer.conftest import ON_EACH


@ON_EACH
async def test_a_message_has_its_effect_and_its_inbox_row(billing: Billing) -> None:
    consumer = billing.consumer()
    consumer.on(OrderPlaced)(charge)
    id = new_id()
    async with running(consumer):
        await billing.publish(placed(7, id=id))
        await until_finished(consumer, 1)
    assert billing.charges() == [7]
    (row,) = billing.rows("inbox")
    assert (row["consumer"], row["message_id"], row["outcome"], row["cycle"]) == ("billing", id, "done", 0)
    assert billing.rows("attempt") == []


async def test_a_message_that_is_delivered_twice_has_its_effect_once(billing: Billing) -> None:
    consumer = billing.consumer()
    consumer.on(OrderPlaced)(charge)
    id = new_id()
    async with running(consumer):
        await billing.publish(placed(7, id=id), placed(7, id=id, key="another"), placed(8))
        await until_finished(consumer, 3)
    assert sorted(billing.charges()) == [7, 8]
    assert (consumer.state.counts.handled, consumer.state.counts.skipped) == (2, 1)


async def test_consumers_of_different_names_each_have_the_effect(billing: Billing) -> None:
    consumers = [billing.consumer("billing"), billing.consumer("shipping")]
    for consumer in consumers:
        consumer.on(OrderPlaced)(charge)
    async with running(*consumers):
        await billing.publish(placed(1))
        for consumer in consumers:
            await until_finished(consumer, 1)
    assert billing.charges() == [1, 1]


@pytest.mark.parametrize("returned", ["one", "list", "message"])
async def test_messages_that_a_handler_returns_are_added_in_its_transaction(billing: Billing, returned: str) -> None:
    consumer = billing.consumer()

    @consumer.on(OrderPlaced)
    def charge_and_tell(event: OrderPlaced, session: Session) -> Any:
        session.add(Charge(order_id=event.order_id))
        if returned == "message":
            return Message(id=new_id(), topic="charges", payload=b"{}", key=str(event.order_id))
        return Charged(event.order_id) if returned == "one" else [Charged(event.order_id), Charged(event.order_id)]

    async with running(consumer):
        await billing.publish(placed(1), placed(2))
        await until_finished(consumer, 2)
    added = [(row["topic"], row["key"]) for row in billing.rows("message")]
    assert added == [("charges", key) for key in ("1", "2") for _ in range(2 if returned == "list" else 1)]


async def test_a_handler_that_fails_leaves_no_effect_no_message_and_no_inbox_row(billing: Billing) -> None:
    consumer = billing.consumer()
    tries = 0

    @consumer.on(OrderPlaced)
    def fail_twice(event: OrderPlaced, session: Session) -> Charged:
        nonlocal tries
        tries += 1
        session.add(Charge(order_id=event.order_id))
        session.flush()
        if tries < 3:
            assert [row["outcome"] for row in billing.rows("inbox")] == []
            raise ValueError("not yet")
        return Charged(event.order_id)

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert (tries, billing.charges(), len(billing.rows("message"))) == (3, [1], 1)
    assert billing.rows("attempt") == []


async def test_a_result_that_is_no_message_is_an_error_and_nothing_commits(billing: Billing) -> None:
    consumer = billing.consumer(retries=1)

    @consumer.on(OrderPlaced)
    def returns_a_dict(event: OrderPlaced, session: Session) -> Any:
        session.add(Charge(order_id=event.order_id))
        return {"charged": True}

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert billing.charges() == []
    assert "returned a dict" in str(billing.dead()[0].exception_message)


@pytest.mark.parametrize("ending", ["commit", "rollback", "close"])
async def test_a_handler_cannot_end_the_transaction_of_its_inbox_row(billing: Billing, ending: str) -> None:
    consumer = billing.consumer(retries=1)

    @consumer.on(OrderPlaced)
    def end_it(event: OrderPlaced, session: Session) -> None:
        session.add(Charge(order_id=event.order_id))
        getattr(session, ending)()

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert billing.charges() == []
    (letter,) = billing.dead()
    assert letter.exception_type == "outbox.errors.TransactionError"
    assert "consumer does" in str(letter.exception_message) or "ended the transaction" in str(letter.exception_message)


@ON_EACH
async def test_a_savepoint_that_a_handler_rolls_back_takes_only_its_part(billing: Billing) -> None:
    consumer = billing.consumer()

    @consumer.on(OrderPlaced)
    def try_a_part(event: OrderPlaced, session: Session) -> None:
        for number in (100, 200):
            try:
                with session.begin_nested():
                    session.add(Charge(order_id=number + event.order_id))
                    session.flush()
                    if number == 100:
                        raise KeyError(number)
            except KeyError:
                continue

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert billing.charges() == [201]


async def test_a_released_savepoint_does_not_commit_before_the_inbox_row(billing: Billing) -> None:
    """On SQLite the claim is written last, and sqlite3 begins no transaction for a SAVEPOINT: its release would commit."""
    consumer = billing.consumer(retries=2)
    tries = 0

    @consumer.on(OrderPlaced)
    def fail_after_a_savepoint(event: OrderPlaced, session: Session) -> None:
        nonlocal tries
        tries += 1
        with session.begin_nested():
            session.add(Charge(order_id=event.order_id))
        if tries == 1:
            raise ValueError("after the release")

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert (tries, billing.charges()) == (2, [1])


# ---------------------------------------------------------------- sync and async


@ON_EACH
async def test_async_and_sync_handlers_share_one_database_url(billing: Billing) -> None:
    consumer = billing.consumer()
    loops = set()

    @consumer.on("orders", type="async")
    async def charge_async(event: dict[str, Any], session: AsyncSession) -> Charged:
        session.add(Charge(order_id=event["order_id"]))
        await session.flush()
        loops.add(asyncio.get_running_loop())
        return Charged(event["order_id"])

    @consumer.on("orders", type="sync")
    def charge_sync(event: dict[str, Any], session: Session) -> None:
        session.add(Charge(order_id=event["order_id"]))

    async with running(consumer):
        await billing.publish(placed(1, type="async"), placed(2, type="sync"), placed(3, type="async"))
        await until_finished(consumer, 3)
    assert billing.charges() == [1, 2, 3]
    assert loops == {asyncio.get_running_loop()}
    assert [row["key"] for row in billing.rows("message")] == ["1", "3"]


async def test_an_async_handler_that_fails_is_rolled_back_and_tried_again(billing: Billing) -> None:
    consumer = billing.consumer()
    tries = 0

    @consumer.on(OrderPlaced)
    async def fail_once(event: OrderPlaced, session: AsyncSession) -> None:
        nonlocal tries
        tries += 1
        async with session.begin_nested():
            session.add(Charge(order_id=event.order_id))
        if tries == 1:
            raise ValueError("not yet")

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert (tries, billing.charges()) == (2, [1])


async def test_an_async_handler_without_a_session_needs_no_async_driver(billing: Billing) -> None:
    consumer = billing.consumer(database=billing.engine)
    loops = set()

    @consumer.on(OrderPlaced)
    async def tell(event: OrderPlaced) -> Charged:
        await asyncio.sleep(0)
        loops.add(asyncio.get_running_loop())
        return Charged(event.order_id)

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert [row["topic"] for row in billing.rows("message")] == ["charges"]
    assert loops == {asyncio.get_running_loop()}
    assert len(billing.rows("inbox")) == 1


@ON_EACH
async def test_an_async_engine_serves_async_handlers(billing: Billing) -> None:
    engine = async_engine_for(billing.url)
    consumer = billing.consumer(database=engine)

    @consumer.on(OrderPlaced)
    async def charge_async(event: OrderPlaced, session: AsyncSession) -> None:
        session.add(Charge(order_id=event.order_id))

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert billing.charges() == [1]
    await engine.dispose()


# ---------------------------------------------------------------- the user's own sessions


async def test_sessions_of_a_sessionmaker_need_no_database_besides(billing: Billing) -> None:
    class MySession(Session):
        pass

    consumer = billing.consumer(database=None, session=sessionmaker(billing.engine, class_=MySession), retries=1)
    seen = []

    @consumer.on(OrderPlaced)
    def charge_with_mine(event: OrderPlaced, session: MySession) -> None:
        seen.append(isinstance(session, MySession))
        if event.order_id == 2:
            raise ValueError("two")
        session.add(Charge(order_id=event.order_id))

    async with running(consumer):
        await billing.publish(placed(1), placed(2))
        await until_finished(consumer, 2)
    assert (billing.charges(), seen) == ([1], [True, True])
    assert len(billing.dead()) == 1


async def test_a_scoped_session_used_as_a_global_is_in_our_transaction(billing: Billing) -> None:
    """As in Flask: the handler writes to db.session and never sees ours; both must be one."""
    db_session = scoped_session(sessionmaker(billing.engine))
    entered: list[str] = []

    @contextmanager
    def app_context() -> Iterator[None]:
        entered.append("in")
        try:
            yield
        finally:
            entered.append("out")

    consumer = billing.consumer(database=None, session=db_session, around=app_context)
    tries = 0

    @consumer.on(OrderPlaced)
    def charge_global(event: OrderPlaced) -> None:
        nonlocal tries
        tries += 1
        db_session.add(Charge(order_id=event.order_id))
        db_session.flush()
        if tries == 1:
            raise ValueError("not yet")

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert (tries, billing.charges()) == (2, [1])
    assert entered.count("in") == entered.count("out") >= 2


async def test_sessions_of_an_async_sessionmaker_need_no_database_besides(billing: Billing) -> None:
    engine = async_engine_for(billing.url)
    consumer = billing.consumer(database=None, session=async_sessionmaker(engine), retries=1)

    @consumer.on(OrderPlaced)
    async def charge_async(event: OrderPlaced, session: AsyncSession) -> None:
        if event.order_id == 2:
            raise ValueError("two")
        session.add(Charge(order_id=event.order_id))

    async with running(consumer):
        await billing.publish(placed(1), placed(2))
        await until_finished(consumer, 2)
    assert billing.charges() == [1]
    assert len(billing.dead()) == 1
    await engine.dispose()


async def test_sqlites_write_lock_is_free_while_a_handler_works(sqlite_billing: Billing) -> None:
    """Its claim is read first and written last."""
    billing = sqlite_billing
    consumer = billing.consumer()
    written = []

    @consumer.on(OrderPlaced)
    def look_around(event: OrderPlaced, session: Session) -> None:
        session.execute(sa.select(Charge)).all()
        with sa.create_engine(billing.url, connect_args={"timeout": 0}).begin() as other:
            other.execute(sa.insert(Charge), {"order_id": 100, "amount": ""})
        written.append(event.order_id)
        session.add(Charge(order_id=event.order_id))

    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert (written, billing.charges()) == ([1], [100, 1])


async def test_a_handler_that_ignores_a_deadlock_commits_no_half_effect(mariadb_url: str, broker: str) -> None:
    """InnoDB has rolled back all of it, the inbox row too: what follows would commit alone."""
    billing = Billing(mariadb_url, broker)
    with billing.engine.begin() as connection:
        connection.execute(sa.insert(Charge), [{"order_id": 100 + n, "amount": "0"} for n in range(2)])
        connection.exec_driver_sql("create table ballast (n int primary key)")
    first, second = (sa.select(Charge).where(Charge.id == n).with_for_update() for n in (1, 2))
    tries = 0

    def handle(event: OrderPlaced, session: Session) -> None:
        nonlocal tries
        tries += 1
        session.add(Charge(order_id=event.order_id))
        session.flush()
        if tries == 1:
            deadlock(session)
        session.add(Charge(order_id=event.order_id))

    def deadlock(session: Session) -> None:
        session.execute(first)
        with billing.engine.connect() as other:
            ballast = ", ".join(f"({n})" for n in range(100))
            other.exec_driver_sql(f"insert into ballast values {ballast}")  # who wrote less is the victim
            other.execute(second)
            crossing = threading.Thread(target=other.execute, args=(first,))
            crossing.start()
            with pytest.raises(sa.exc.OperationalError, match="1213"):
                session.execute(second)
            crossing.join()

    consumer = billing.consumer(retries=2)
    consumer.on(OrderPlaced)(handle)
    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert tries == 2
    assert billing.charges() == [100, 101, 1, 1]
    assert [row["outcome"] for row in billing.rows("inbox")] == ["done"]
    billing.close()
