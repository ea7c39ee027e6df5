"""What one message adds to a business transaction, on each database through each driver: an ORM session that inserts an order
and changes a customer, with and without `outbox.add`. One client at a time, in microseconds (and bytes of WAL on PostgreSQL);
and as many transactions as sixteen clients can do.

The clients are Python: two processes of eight threads, each with a connection of its own. They, and not the server, are
what is busy on a small machine, so the ratio says what a service would see and not how much more the server could do.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks.figures import Report
from outbox import Outbox
from outbox.stores.engine import sync_engine_for

PROCESSES, THREADS = 2, 8
SECONDS = 4.0  # of the sixteen clients, each time
CHUNK = 50  # transactions; in turn with and without, so that a slow moment of the machine is everybody's
CUSTOMERS = 1000


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "bench_customer"
    id: Mapped[int] = mapped_column(primary_key=True)
    orders: Mapped[int] = mapped_column(default=0)


class Order(Base):
    __tablename__ = "bench_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[int]
    note: Mapped[str] = mapped_column(sa.String(100))


outbox = Outbox(Base.metadata)


def prepare(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        if not connection.scalar(sa.select(sa.func.count()).select_from(Customer)):
            connection.execute(sa.insert(Customer), [{"id": n + 1, "orders": 0} for n in range(CUSTOMERS)])
        if engine.dialect.name != "sqlite":
            # what other benchmarks left: a row that goes into an old page writes all of that to the WAL, once a checkpoint
            connection.exec_driver_sql("truncate table outbox_message")


def business(session: Session | AsyncSession, n: int) -> sa.Update:
    """An order is added; the statement that is still to be executed is returned, since an async session awaits it."""
    session.add(Order(customer=n % CUSTOMERS + 1, note="a note of the usual length"))
    return sa.update(Customer).where(Customer.id == n % CUSTOMERS + 1).values(orders=Customer.orders + 1)


def message(session: Session | AsyncSession, n: int) -> None:
    payload = {"order_id": n, "customer": n % CUSTOMERS, "total": "19.90", "currency": "EUR", "lines": [1, 2, 3]}
    outbox.add(session, "orders", payload, key=n % CUSTOMERS, type="order.placed")


def sync_transactions(engine: sa.Engine, first: int, count: int, with_message: bool) -> None:
    for n in range(first, first + count):
        with Session(engine) as session, session.begin():
            session.execute(business(session, n))
            if with_message:
                message(session, n)


async def async_transactions(engine: Any, first: int, count: int, with_message: bool) -> None:
    for n in range(first, first + count):
        async with AsyncSession(engine) as session, session.begin():
            await session.execute(business(session, n))
            if with_message:
                message(session, n)


@dataclass(frozen=True)
class Way:
    """A driver's name in figures, its URL, and the database that it is one of."""

    name: str
    url: str
    sync_url: str


def ways(server: str, other_server: str, folder: Path) -> list[Way]:
    file = folder / "transactions.db"
    return [
        Way("psycopg", server, server),
        Way("asyncpg", server.replace("+psycopg", "+asyncpg"), server),
        Way("pymysql", other_server, other_server),
        Way("asyncmy", other_server.replace("mysql:", "mysql+asyncmy:"), other_server),
        Way("sqlite3", f"sqlite:///{file}", f"sqlite:///{file}"),
        Way("aiosqlite", f"sqlite+aiosqlite:///{file}", f"sqlite:///{file}"),
    ]


def one_client(report: Report, way: Way, repeat: int, rounds: int) -> None:
    engine = sync_engine_for(way.sync_url, create=True)
    prepare(engine)
    plain: list[float] = []
    added: list[float] = []
    with asyncio.Runner() as runner:
        if sa.make_url(way.url).get_dialect().is_async:
            own = create_async_engine(way.url)

            def transact(with_message: bool, count: int = CHUNK) -> float:
                start = time.perf_counter()
                runner.run(async_transactions(own, 0, count, with_message))
                return (time.perf_counter() - start) / count

        else:

            def transact(with_message: bool, count: int = CHUNK) -> float:
                start = time.perf_counter()
                sync_transactions(engine, 0, count, with_message)
                return (time.perf_counter() - start) / count

        transact(True)  # what is made once is not a transaction's
        for _ in range(repeat):
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(rounds):
                for with_message in (False, True):
                    times[with_message].append(transact(with_message))
            # medians, since a transaction ends with a flush to the disk, which others use too
            without = statistics.median(times[False])
            plain.append(without * 1e6)
            added.append((statistics.median(times[True]) - without) * 1e6)
        report.figure(f"stores.transaction.{way.name}", plain, "us")
        report.figure(
            f"stores.transaction.{way.name}.message",
            added,
            "us",
            reference="transaction",
            ratios=[more / base for more, base in zip(added, plain, strict=True)],
        )
        if way.name == "psycopg":
            wal(report, engine, transact, repeat)
        if way.url != way.sync_url:
            runner.run(own.dispose())
    engine.dispose()


def wal(report: Report, engine: sa.Engine, transact: Callable[..., float], repeat: int) -> None:
    def written(with_message: bool, count: int) -> float:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            lsn = "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')"
            before = connection.scalar(sa.text(lsn))
            transact(with_message, count)
            return float(connection.scalar(sa.text(lsn)) - before) / count  # type: ignore[operator]

    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("checkpoint")
    for with_message in (False, True):  # the first change of a page after a checkpoint writes all of the page
        transact(with_message, 500)
    plain, added = [], []
    for _ in range(max(3, repeat)):
        plain.append(written(False, 300))
        added.append(written(True, 300) - plain[-1])
    report.figure("stores.transaction.postgresql.wal", plain, "bytes")
    report.figure("stores.transaction.postgresql.wal.message", added, "bytes")


def sixteen_clients(report: Report, name: str, url: str, repeat: int, seconds: float) -> None:
    engine = sync_engine_for(url)
    prepare(engine)
    engine.dispose()
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeat):
        for with_message in (False, True):
            rates[with_message].append(_clients(url, with_message, seconds))
    figure = f"stores.{name}.transactions.clients{PROCESSES * THREADS}"
    report.figure(figure, rates[False], "tx/s")
    report.figure(
        f"{figure}.message",
        rates[True],
        "tx/s",
        reference="without_message",
        ratios=[a / b for a, b in zip(rates[True], rates[False], strict=True)],
    )


def _clients(url: str, with_message: bool, seconds: float) -> float:
    command = [sys.executable, "-m", "benchmarks.transactions", "--seconds", str(seconds)]
    command += ["--message"] if with_message else []
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)
    ]
    for child in children:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"{url}\n")  # not an argument, which every user of the machine may see
        child.stdin.flush()
    for child in children:
        child.stdout.readline()  # it is connected
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    done = 0
    for child in children:
        out, _ = child.communicate(timeout=seconds + 60)
        if child.returncode != 0:
            raise RuntimeError(f"a client ended with status {child.returncode}")
        done += int(out)
    return done / seconds


def client() -> None:
    """One process of clients: the URL and a line that says go come in, the number of transactions goes out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--message", action="store_true")
    options = parser.parse_args()
    engine = sync_engine_for(sys.stdin.readline().strip(), pool_size=THREADS, pre_ping=False)
    counts = [0] * THREADS
    for connection in [engine.connect() for _ in range(THREADS)]:
        connection.close()
    sync_transactions(engine, 0, 10, options.message)
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.perf_counter() + options.seconds

    def work(thread: int) -> None:
        n = thread * 7919
        while time.perf_counter() < end:
            sync_transactions(engine, n, 1, options.message)
            counts[thread] += 1
            n += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(sum(counts))


def run(report: Report, server: str, other_server: str, folder: Path, *, repeat: int, scale: float) -> None:
    for way in ways(server, other_server, folder):
        one_client(report, way, repeat, max(2, round(20 * scale)))
    for name, url in (("postgresql", server), ("mariadb", other_server)):
        sixteen_clients(report, name, url, repeat, max(1.0, SECONDS * scale))


if __name__ == "__main__":
    client()
