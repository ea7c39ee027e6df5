"""An inbox in daily partitions beside one that is one table: claims, and removing what is over."""

from __future__ import annotations

import datetime as dt
import time

import sqlalchemy as sa

import outbox_migrations
from benchmarks.figures import Report
from benchmarks.servers import postgresql
from outbox import Outbox
from outbox._message import new_id
from outbox.cleanup import Retention
from outbox.cleanup.sweep import Sweep
from outbox.observe.partitions import lowest_id

CLAIMS = 4000
ROWS = 1_000_000
DAYS = range(-20, 8)

outbox = Outbox()

# {first}: milliseconds; ids of version 7, 86 ms apart: a million a day
A_DAY = """
insert into outbox_inbox (consumer, message_id, outcome, processed_at)
select 'billing', (lpad(to_hex({first} + n * {step}), 12, '0') || '70008000000000000000')::uuid, 'done',
       now() - interval '39 days'
from generate_series(1, {rows}) n
"""


def run(report: Report, *, repeat: int, scale: float) -> None:
    with postgresql() as url:
        engine = sa.create_engine(url)
        try:
            outbox_migrations.migrate(engine)
            _claims(report, engine, repeat, round(CLAIMS * scale))
            _removal(report, engine, repeat, round(ROWS * scale))
        finally:
            engine.dispose()


def _claims(report: Report, engine: sa.Engine, repeat: int, claims: int) -> None:
    rates: dict[bool, list[float]] = {False: [], True: []}
    today = dt.datetime.now(dt.UTC).date()
    for _ in range(repeat):
        rates[False].append(_claim(engine, claims))
        outbox_migrations.partition_inbox(engine)
        with engine.begin() as connection:
            connection.exec_driver_sql("truncate outbox_inbox")
            for n in DAYS:
                _make(connection, today + dt.timedelta(days=n))
        rates[True].append(_claim(engine, claims))
        outbox_migrations.unpartition_inbox(engine)
    ratios = [with_ / without for with_, without in zip(rates[True], rates[False], strict=True)]
    report.figure("stores.postgresql.partitions.claim.one_table", rates[False], "claims/s")
    report.figure("stores.postgresql.partitions.claim", rates[True], "claims/s", reference="one_table", ratios=ratios)


def _claim(engine: sa.Engine, claims: int) -> float:
    ids = [new_id() for _ in range(claims)]
    with engine.connect() as connection:
        start = time.perf_counter()
        for id in ids:
            outbox.claim(connection, "billing", id)
            connection.commit()
        return claims / (time.perf_counter() - start)


def _removal(report: Report, engine: sa.Engine, repeat: int, rows: int) -> None:
    took: dict[bool, list[float]] = {False: [], True: []}
    day = dt.datetime.now(dt.UTC).date() - dt.timedelta(days=40)
    for _ in range(repeat):
        for partitioned in (False, True):
            if partitioned:
                outbox_migrations.partition_inbox(engine)
            with engine.begin() as connection:
                connection.exec_driver_sql("truncate outbox_inbox")
                if partitioned:
                    _make(connection, day)
                first, step = lowest_id(day).int >> 80, 86_000_000 // rows
                connection.exec_driver_sql(A_DAY.format(first=first, step=step, rows=rows))
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("vacuum analyze outbox_inbox")
            took[partitioned].append(_sweep(engine, rows))
        outbox_migrations.unpartition_inbox(engine)
    report.figure("stores.postgresql.partitions.remove.by_row", took[False], "s")
    ratios = [with_ / without for with_, without in zip(took[True], took[False], strict=True)]
    report.figure("stores.postgresql.partitions.remove", took[True], "s", reference="by_row", ratios=ratios)


def _sweep(engine: sa.Engine, rows: int) -> float:
    """Seconds in transactions: without the pauses, which are nine times as long."""
    sweep, took = Sweep(outbox.tables, Retention(inbox=30 * 86400.0)), 0.0
    with engine.begin() as connection:
        sweep.begin(connection)
    while True:
        start = time.perf_counter()
        with engine.begin() as connection:
            batch = sweep.batch(connection)
        took += time.perf_counter() - start
        sweep.done(batch, 0.0)
        if batch.last:
            break
    if sweep.removed != {"inbox": rows}:
        raise RuntimeError(f"removed {sweep.removed} of {rows}")
    return took


def _make(connection: sa.Connection, day: dt.date) -> None:
    first, until = lowest_id(day), lowest_id(day + dt.timedelta(days=1))
    connection.exec_driver_sql(
        f"create table outbox_inbox_d{day:%Y%m%d} partition of outbox_inbox for values from ('{first}') to ('{until}')"
    )
