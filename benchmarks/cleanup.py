"""A million old inbox rows are removed beside a relay and a consumer: what that takes from them, and how long it takes."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Any

import sqlalchemy as sa

from benchmarks.figures import Report
from benchmarks.relay import fill
from benchmarks.servers import postgresql
from outbox import Consumer, Outbox
from outbox.cleanup import Cleanup
from outbox.relay import Relay
from outbox.transports import memory

OLD, RELAYED, CONSUMED = 1_000_000, 300_000, 5_000
RUNS = 3  # of each kind, in turn, for each repetition

OLD_ROWS = """
insert into outbox_inbox (consumer, message_id, outcome, processed_at)
select 'billing', gen_random_uuid(), 'done', now() - interval '60 days' + g * interval '1 second'
from generate_series(1, {rows}) g
"""

outbox = Outbox()
charge = sa.Table("charge", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("payload", sa.Text))


def run(report: Report, *, repeat: int, scale: float) -> None:
    with postgresql() as url:
        engine = sa.create_engine(url)
        try:
            outbox.metadata.create_all(engine)
            charge.metadata.create_all(engine)
            _run(report, engine, repeat, scale)
        finally:
            engine.dispose()


def _run(report: Report, engine: sa.Engine, repeat: int, scale: float) -> None:
    url = engine.url.render_as_string(hide_password=False)
    rates: dict[str, dict[bool, list[float]]] = {name: {False: [], True: []} for name in ("relay", "consumer")}
    with engine.begin() as connection:
        connection.exec_driver_sql(OLD_ROWS.format(rows=round(OLD * scale)))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("vacuum analyze outbox_inbox")
    with Cleaning(url) as cleaning:
        for turn in range(RUNS * repeat):
            for beside in (False, True) if turn % 2 else (True, False):
                with cleaning.at_work(beside):
                    rates["relay"][beside].append(relayed(engine, round(RELAYED * scale)))
                with cleaning.at_work(beside):
                    rates["consumer"][beside].append(consumed(engine, round(CONSUMED * scale)))
        rest, took = cleaning.finish(engine)
    for name, found in rates.items():
        report.figure(f"stores.postgresql.cleanup.{name}.alone", found[False], "msg/s")
        report.figure(
            f"stores.postgresql.cleanup.{name}.beside",
            found[True],
            "msg/s",
            reference="alone",
            ratios=[with_ / without for with_, without in zip(found[True], found[False], strict=True)],
        )
    report.figure("stores.postgresql.cleanup.rows1000000", [rest / took], "rows/s")


class Cleaning:
    """``outbox cleanup`` in a process of its own, which rests between two transactions unless it is `at_work`."""

    def __init__(self, url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._go, self._rests = context.Event(), context.Event()
        self._process = context.Process(target=clean, args=(url, self._go, self._rests))

    def __enter__(self) -> Cleaning:
        self._process.start()
        self._go.set()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._process.terminate()
        self._process.join()

    @contextmanager
    def at_work(self, beside: bool) -> Iterator[None]:
        if beside:
            self._rests.clear()
            self._go.set()
            yield
            if not self._process.is_alive():
                raise RuntimeError("the cleanup ended before what it was to run beside")
        else:
            self._go.clear()
            if not self._rests.wait(60):
                raise RuntimeError("the cleanup does not come to rest")
            yield

    def finish(self, engine: sa.Engine) -> tuple[int, float]:
        """Let it end: rows that it still removed, and the seconds that took."""
        count = sa.text("select count(*) from outbox_inbox where processed_at < now() - interval '30 days'")
        with engine.connect() as connection:
            before = int(connection.scalar(count) or 0)
        start = time.perf_counter()
        self._go.set()
        self._process.join()
        took = time.perf_counter() - start
        with engine.connect() as connection:
            left = connection.scalar(count)
        if left or self._process.exitcode:
            raise RuntimeError(f"the cleanup left {left} rows and ended with {self._process.exitcode}")
        return before, took


def clean(url: str, go: Event, rests: Event) -> None:
    """The cleanup's process."""

    def progress(removed: dict[str, int]) -> None:
        if not go.is_set():
            rests.set()
            go.wait()

    Cleanup(outbox, database=url).run(progress=progress)


def relayed(engine: sa.Engine, rows: int) -> float:
    """Messages a second of a relay that drains a backlog into memory."""
    fill(engine, "orders", 1000, rows)
    with _broker() as broker:
        relay = Relay(outbox, database=engine, transport=broker)
        start = time.perf_counter()
        sent = relay.drain().sent
        took = time.perf_counter() - start
    if sent != rows:
        raise RuntimeError(f"{sent} of {rows} messages were sent")
    return rows / took


def consumed(engine: sa.Engine, rows: int) -> float:
    """Messages a second of a consumer that inserts a row for each."""
    fill(engine, "orders", 1000, rows)
    with _broker() as broker:
        Relay(outbox, database=engine, transport=broker).drain()
        return asyncio.run(_consume(engine, broker, rows))


async def _consume(engine: sa.Engine, broker: str, rows: int) -> float:
    billing = Consumer(f"billing-{uuid.uuid4().hex[:8]}", outbox, database=engine, transport=broker)
    handled, all_of_them = [0], asyncio.Event()
    loop = asyncio.get_running_loop()

    @billing.on("orders", type="order.placed")
    def handle(payload: bytes, connection: sa.orm.Session) -> None:
        connection.execute(charge.insert().values(payload=payload.decode()))
        handled[0] += 1
        if handled[0] == rows:
            loop.call_soon_threadsafe(all_of_them.set)

    start = time.perf_counter()
    async with billing:
        await all_of_them.wait()
        return rows / (time.perf_counter() - start)


@contextmanager
def _broker() -> Iterator[str]:
    name = f"bench-{uuid.uuid4().hex}"
    yield f"memory://{name}"
    memory.forget(name)
