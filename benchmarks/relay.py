"""Draining a backlog from PostgreSQL to Kafka, beside its two halves alone; memory over a million rows; an idle relay."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import uuid

import psutil
import psycopg
import sqlalchemy as sa

from benchmarks import bare_kafka
from benchmarks.bare_kafka import PARTITIONS
from benchmarks.figures import Report
from benchmarks.servers import kafka, postgresql
from outbox import Outbox
from outbox.relay import Relay
from outbox.transports import open_transport

BATCH = 2000

FILL = """
insert into outbox_message (id, bucket, topic, key, type, payload, content_type, headers)
select gen_random_uuid(), mod(mod(g, {keys}), 64), '{topic}', 'k' || mod(g, {keys}), 'order.placed',
       convert_to(repeat('x', 300), 'UTF8'), 'application/json',
       '{{"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}}'
from generate_series(1, {rows}) g
"""

READ = (
    "select position, id::text, topic, key, type, payload, content_type, headers, bucket from outbox_message"
    " where position > %s order by position limit %s"
)


def fill(engine: sa.Engine, topic: str, keys: int, rows: int) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("truncate outbox_message")
        connection.exec_driver_sql(FILL.format(topic=topic, keys=keys, rows=rows))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("vacuum analyze outbox_message")
        connection.exec_driver_sql("checkpoint")


async def bare_read_delete(url: str, rows: int) -> float:
    """Rows a second: read in batches, delete by list, publish nothing."""
    async with await psycopg.AsyncConnection.connect(url.replace("+psycopg", ""), autocommit=True) as db:
        start, floor = time.perf_counter(), 0
        while True:
            found = await (await db.cursor(binary=True).execute(READ, (floor, BATCH))).fetchall()
            if not found:
                return rows / (time.perf_counter() - start)
            floor = found[-1][0]
            await db.execute("delete from outbox_message where position = any(%s)", ([row[0] for row in found],))


async def drain(outbox: Outbox, url: str, broker: str, rows: int) -> float:
    """Messages a second of one relay, from its start to the last settled row."""
    relay = Relay(outbox, database=url, transport=broker)
    start = time.perf_counter()
    drained = await relay.adrain()
    took = time.perf_counter() - start
    if drained.sent != rows:
        raise RuntimeError(f"{drained.sent} of {rows} messages were sent")
    return rows / took


async def declare(broker: str, topic: str) -> None:
    transport = open_transport(broker)
    try:
        await transport.connect()
        await transport.declare([topic], partitions=PARTITIONS)
    finally:
        await transport.close()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "outbox", "relay", *arguments]


def peak_memory(url: str, broker: str) -> float:
    """MB of a relay process that drains what is there."""
    child = subprocess.Popen(
        command("--database", url, "--transport", broker, "--drain"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"the relay ended with status {child.returncode}")
    return usage.ru_maxrss / 1024


def idle_cpu(url: str, broker: str, seconds: float) -> float:
    """Percent of a core that a relay with nothing to do takes, at a poll of 20 ms."""
    child = subprocess.Popen(
        command("--database", url, "--transport", broker, "--poll", "0.02"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        process = psutil.Process(child.pid)
        time.sleep(4)  # its start is not what is measured
        before = sum(process.cpu_times()[:2])
        time.sleep(seconds)
        return (sum(process.cpu_times()[:2]) - before) / seconds * 100
    finally:
        child.terminate()
        child.wait()


async def bare_idle(url: str, seconds: float) -> float:
    """Percent of a core that a bare loop takes: sleep 20 ms, read nothing with the same statement. The floor on this
    machine, where each waking up costs much more than the work that is done awake."""
    async with await psycopg.AsyncConnection.connect(url.replace("+psycopg", ""), autocommit=True) as db:
        cursor = db.cursor(binary=True)
        start, used = time.perf_counter(), time.process_time()
        while (took := time.perf_counter() - start) < seconds:
            await cursor.execute(READ, (0, BATCH))
            await cursor.fetchall()
            await asyncio.sleep(0.02)
        return (time.process_time() - used) / took * 100


def run(report: Report, *, repeat: int, scale: float) -> None:
    with postgresql() as url, kafka() as broker:
        outbox = Outbox()
        engine = sa.create_engine(url)
        try:
            outbox.metadata.create_all(engine)
            topic = f"bench-{uuid.uuid4().hex[:8]}"
            asyncio.run(declare(broker, topic))
            for keys, rows in ((1000, 100_000), (16, 100_000)):
                count = round(rows * scale)
                reads, publishes, rates = [], [], []
                for _ in range(repeat):
                    fill(engine, topic, keys, count)
                    reads.append(asyncio.run(bare_read_delete(url, count)))
                    publishes.append(asyncio.run(bare_kafka.publish(broker, topic, keys, count)))
                    fill(engine, topic, keys, count)
                    rates.append(asyncio.run(drain(outbox, url, broker, count)))
                name = f"keys{keys}.rows{rows}"
                report.figure(f"relay.bare.read_delete.{name}", reads, "msg/s")
                report.figure(f"relay.bare.publish.{name}", publishes, "msg/s")
                report.figure(
                    f"relay.postgresql.kafka.{name}",
                    rates,
                    "msg/s",
                    reference="slower_bare_half",
                    ratios=[
                        rate / min(read, publish) for rate, read, publish in zip(rates, reads, publishes, strict=True)
                    ],
                )
            rows = round(1_000_000 * scale)
            fill(engine, topic, 1000, rows)
            report.figure("relay.memory.rows1000000", [peak_memory(url, broker)], "MB")
            bare, idle = [], []
            for _ in range(repeat):
                bare.append(asyncio.run(bare_idle(url, 20 * scale)))
                idle.append(idle_cpu(url, broker, 20 * scale))
            report.figure("relay.bare.idle.poll20ms", bare, "% core")
            report.figure(
                "relay.idle.poll20ms",
                idle,
                "% core",
                reference="bare_loop",
                ratios=[ours / floor for ours, floor in zip(idle, bare, strict=True)],
            )
        finally:
            engine.dispose()
