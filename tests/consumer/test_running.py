"""Ways to run a consumer, how it ends, and what is refused at the start."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from outbox import ConfigurationError, Consumer, Outbox, SchemaMismatch, StoreUnavailable
from outbox.stores.engine import async_engine_for
from outbox.transports import open_transport
from tests.consumer.billing import Billing, OrderPlaced, charge, outbox, placed, running, until, until_finished
from tests.consumer.wrapped import WrappedTransport


async def charge_async(event: OrderPlaced, session: AsyncSession) -> None:
    charge(event, session.sync_session)


async def test_missing_tables_are_said_when_it_is_entered(tmp_path: Path, broker: str) -> None:
    (tmp_path / "empty.db").touch()
    consumer = Consumer("billing", outbox, database=f"sqlite:///{tmp_path / 'empty.db'}", transport=broker)
    consumer.on(OrderPlaced)(charge)
    with pytest.raises(SchemaMismatch, match="no outbox tables here"):
        await consumer.__aenter__()
    assert not consumer.state.running


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_misspelt_sqlite_file_is_not_made_and_said_at_the_start(tmp_path: Path, broker: str, kind: str) -> None:
    file = tmp_path / "shpo.db"
    consumer = Consumer("billing", outbox, database=f"sqlite:///{file}", transport=broker)
    consumer.on(OrderPlaced)(charge if kind == "sync" else charge_async)
    for start in (consumer.__aenter__, lambda: consumer.arun(asyncio.Event())):
        with pytest.raises(StoreUnavailable, match=f"{file}: there is no such file.*outbox migrate"):
            await start()
    assert not consumer.state.running
    assert not file.exists()


async def test_a_file_that_goes_away_later_is_waited_for(
    tmp_path: Path, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.consumer.transactions.require_file", lambda database: None)  # it was there at the start
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    consumer = Consumer("billing", outbox, database=url, transport=broker)
    consumer.on(OrderPlaced)(charge)
    async with consumer:
        await until(lambda: "there is no such file" in (consumer.state.database or ""))
        billing = Billing(url, broker)  # it comes back
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert billing.charges() == [1]
    billing.close()


async def test_tables_elsewhere_are_named(tmp_path: Path, broker: str) -> None:
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    other = Outbox(prefix="shop_")
    engine = sa.create_engine(url)
    other.metadata.create_all(engine)
    engine.dispose()
    consumer = Consumer("billing", outbox, database=url, transport=broker)
    consumer.on(OrderPlaced)(charge)
    with pytest.raises(SchemaMismatch, match="found shop_message: pass --prefix shop_"):
        await consumer.arun(asyncio.Event())


async def test_it_can_be_run_again_after_it_ended(sqlite_billing: Billing) -> None:
    consumer = sqlite_billing.consumer()
    consumer.on(OrderPlaced)(charge)
    for number in range(2):
        async with running(consumer):
            await sqlite_billing.publish(placed(number))
            await until_finished(consumer, 1)
    assert sqlite_billing.charges() == [0, 1]


async def test_it_says_what_it_reads_and_what_it_has_done(
    sqlite_billing: Billing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "outbox.consumer")
    consumer = sqlite_billing.consumer()
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        await sqlite_billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert caplog.messages == [
        "consumer billing reads orders from memory",
        "consumer billing stops: 1 handled, 0 skipped, 0 attempts failed, 0 dead letters",
    ]


async def test_it_does_not_run_twice_at_once(sqlite_billing: Billing) -> None:
    consumer = sqlite_billing.consumer()
    consumer.on(OrderPlaced)(charge)
    async with running(consumer):
        with pytest.raises(ConfigurationError, match="running in this process already"):
            await consumer.__aenter__()
        await sqlite_billing.publish(placed(1))
        await until_finished(consumer, 1)


async def test_what_is_at_work_is_finished_when_it_stops(sqlite_billing: Billing) -> None:
    billing = sqlite_billing
    transport = WrappedTransport(open_transport(billing.transport_url))
    consumer = billing.consumer(transport=transport, concurrency=2)
    begun, go_on = threading.Semaphore(0), threading.Event()

    @consumer.on(OrderPlaced)
    def slowly(event: OrderPlaced, session: Session) -> None:
        begun.release()
        assert go_on.wait(20)
        charge(event, session)

    stop = asyncio.Event()
    working = asyncio.create_task(consumer.arun(stop))
    await billing.publish(*(placed(number, key=str(number)) for number in range(10)))
    await until(lambda: begun.acquire(blocking=False))
    await until(lambda: begun.acquire(blocking=False))
    stop.set()
    await until(lambda: consumer.state.in_memory == 2)
    go_on.set()
    await working
    assert len(billing.charges()) == len(transport.acked) == 2


async def test_an_error_that_nobody_can_wait_out_ends_it_and_is_seen(
    sqlite_billing: Billing, caplog: pytest.LogCaptureFixture
) -> None:
    transport = WrappedTransport(open_transport(sqlite_billing.transport_url))

    def refuse(step: str) -> None:
        if step == "subscribe":
            raise ConfigurationError("there is no such group")

    transport.before = refuse
    consumer = sqlite_billing.consumer(transport=transport)
    consumer.on(OrderPlaced)(charge)
    async with consumer:  # the application goes on
        await until(lambda: consumer.state.error)
    assert "no such group" in str(consumer.state.error)
    assert "consumer billing in this process has died" in caplog.text
    with pytest.raises(ConfigurationError, match="no such group"):
        await consumer.arun(asyncio.Event())


# ---------------------------------------------------------------- a process of its own

SCRIPT = """
import sys, threading
from tests.consumer.billing import *
consumer = Consumer("billing", outbox)
@consumer.on(OrderPlaced)
def handle(event: OrderPlaced, session: Session) -> None:
    session.add(Charge(order_id=event.order_id))
    session.flush()
    print("begun", flush=True)
    if event.order_id == 1:
        threading.Event().wait()
consumer.run(deadline=0.5)
print("drained", flush=True)
"""


def start(environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("hangs", [False, True])
async def test_sigterm_ends_it_within_its_deadline_even_if_a_handler_hangs(
    database_url: str, tmp_path: Path, hangs: bool
) -> None:
    billing = Billing(database_url, f"local:///{tmp_path / 'broker.db'}")
    await billing.publish(placed(int(hangs)))
    environment = {**os.environ, "OUTBOX_DATABASE": billing.url, "OUTBOX_TRANSPORT": billing.transport_url}
    process = start(environment)
    try:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "begun\n"
        if not hangs:
            await until(lambda: billing.charges() == [0])
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, err = await asyncio.to_thread(process.communicate, timeout=30)
        took = time.monotonic() - asked
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (0, "drained\n"), err
    assert took < 10
    assert billing.charges() == ([] if hangs else [0])
    billing.close()


# ---------------------------------------------------------------- what is refused


async def test_a_consumer_without_a_handler_is_refused(sqlite_billing: Billing) -> None:
    with pytest.raises(ConfigurationError, match="has no handler"):
        await sqlite_billing.consumer().__aenter__()


async def test_a_consumer_without_a_transport_is_refused(
    sqlite_billing: Billing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUTBOX_TRANSPORT", raising=False)
    consumer = sqlite_billing.consumer(transport=None)
    consumer.on(OrderPlaced)(charge)
    with pytest.raises(ConfigurationError, match="OUTBOX_TRANSPORT"):
        await consumer.__aenter__()


async def test_no_secret_is_needed_until_it_starts(monkeypatch: pytest.MonkeyPatch, sqlite_billing: Billing) -> None:
    consumer = Consumer("billing", outbox)
    consumer.on(OrderPlaced)(charge)
    monkeypatch.setenv("OUTBOX_DATABASE", sqlite_billing.url)
    monkeypatch.setenv("OUTBOX_TRANSPORT", sqlite_billing.transport_url)
    async with running(consumer):
        await sqlite_billing.publish(placed(1))
        await until_finished(consumer, 1)
    assert sqlite_billing.charges() == [1]


async def test_an_async_session_that_the_database_cannot_serve_is_refused(sqlite_billing: Billing) -> None:
    for options in ({"database": sqlite_billing.engine}, {"database": None, "session": sessionmaker()}):
        consumer = sqlite_billing.consumer(**options)

        @consumer.on(OrderPlaced)
        async def handle(event: OrderPlaced, my_session: AsyncSession) -> None:
            """Never called."""

        with pytest.raises(
            ConfigurationError, match=r"handle: argument 'my_session' is an AsyncSession, but .* is sync"
        ):
            await consumer.__aenter__()


async def test_a_sync_handler_that_the_database_cannot_serve_is_refused(sqlite_billing: Billing) -> None:
    engine = async_engine_for(sqlite_billing.url)
    options: list[dict[str, Any]] = [
        {"database": engine},
        {"database": None, "session": async_sessionmaker(engine)},
    ]
    for one in options:
        consumer = sqlite_billing.consumer(**one)
        consumer.on(OrderPlaced)(charge)
        with pytest.raises(ConfigurationError, match=r"handler charge is sync, but .* is async"):
            await consumer.__aenter__()
    await engine.dispose()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": ""}, "1 to 128"),
        ({"name": "x" * 129}, "1 to 128"),
        ({"ordering": "random"}, "'key' and 'none'"),
        ({"concurrency": 0}, "concurrency"),
        ({"window": 0}, "window"),
        ({"retries": 0}, "attempts"),
        ({"around": 3}, "around"),
        ({"session": "db"}, "sessionmaker"),
    ],
)
def test_what_can_never_work_is_refused_when_it_is_made(options: dict[str, Any], said: str) -> None:
    name = options.pop("name", "billing")
    with pytest.raises(ConfigurationError, match=said):
        Consumer(name, outbox, **options)


def test_a_session_instead_of_a_sessionmaker_is_refused() -> None:
    session = Session()
    with pytest.raises(ConfigurationError, match="each message gets a session of its own"):
        Consumer("billing", outbox, session=session)
    session.close()
