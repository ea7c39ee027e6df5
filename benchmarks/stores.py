"""Reading and removing rows through each store, beside its bare driver doing the same two statements; long backlogs; a
snapshot that somebody holds open; what one message adds to a business transaction (`benchmarks.transactions`).

Nothing is published here. ``read_delete``: one page is read, then removed, then the next is read. ``pipelined``: the next is
read while the last is removed, as the relay does it, with what is in flight left out of each read.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from benchmarks import transactions
from benchmarks.figures import Report
from benchmarks.servers import mariadb, postgresql
from benchmarks.ways import BATCH, Bench, OnAiosqlite, OnMariadb, OnPostgresql, OnSqlite, OnSqliteFromAThread
from outbox.store import Store

WINDOW = 4000  # rows in flight at the most, pipelined
ROWS = 200_000
LONG, SHORT = 1_000_000, 10_000
LONGEST = 60.0  # seconds of one drain


async def connect(store: Store) -> None:
    """What is made once is not a row's."""
    (row,) = await store.read(None, (), (), 1)
    await store.settle([replace(row, position=-1)])
    store.rewind()


async def in_turn(store: Store, rows: int) -> float:
    """Seconds; after `LONGEST` it is broken off, and counted as if it had gone on like that."""
    await connect(store)
    start, left = time.perf_counter(), rows
    while left:
        found = await store.read(None, (), (), BATCH)
        left -= await store.settle(found)
        if left and time.perf_counter() - start > LONGEST:
            return (time.perf_counter() - start) * rows / (rows - left)
    return time.perf_counter() - start


async def pipelined(store: Store, rows: int) -> float:
    """As `outbox.relay.flow`: reads and settles side by side, all that was read meanwhile in one settle."""
    in_flight: dict[int, int] = {}
    read: list[Any] = []
    to_settle, settled = asyncio.Event(), asyncio.Event()

    async def settle() -> None:
        while True:
            await to_settle.wait()
            to_settle.clear()
            these = read[:]
            read.clear()
            await store.settle(these)
            for row in these:
                del in_flight[row.position]
            settled.set()

    await connect(store)
    settling = asyncio.create_task(settle())
    start, left = time.perf_counter(), rows
    while left or in_flight:
        settled.clear()
        room = min(BATCH, WINDOW - len(in_flight))
        found = await store.read(None, in_flight, (), room) if room and left else []
        if not found:
            await settled.wait()
            continue
        left -= len(found)
        in_flight.update((row.position, row.bucket) for row in found)
        read += found
        to_settle.set()
    took = time.perf_counter() - start
    settling.cancel()
    await asyncio.gather(settling, return_exceptions=True)
    return took


def read_delete(report: Report, bench: Bench, repeat: int, rows: int, figure: str) -> None:
    rates: dict[str, list[float]] = {"bare": [], "in_turn": [], "pipelined": []}
    with bench.store() as run:
        for _ in range(repeat):
            for name, work in (
                ("bare", lambda: bench.bare(rows)),
                ("in_turn", lambda: run(lambda store: in_turn(store, rows))),
                ("pipelined", lambda: run(lambda store: pipelined(store, rows))),
            ):
                bench.fill(rows)
                rates[name].append(rows / work())
    report.figure(f"{figure}.bare", rates["bare"], "rows/s")
    for name, suffix in (("in_turn", ""), ("pipelined", ".pipelined")):
        ratios = [ours / bare for ours, bare in zip(rates[name], rates["bare"], strict=True)]
        report.figure(f"{figure}{suffix}", rates[name], "rows/s", reference=bench.reference, ratios=ratios)


def backlogs(report: Report, bench: Bench, repeat: int, scale: float) -> None:
    """The rate over all of a long backlog, beside that over a short one and beside one under a held snapshot."""
    long, short = round(LONG * scale), round(SHORT * scale)
    rates: dict[str, list[float]] = {"short": [], "long": [], "held": []}
    with bench.store() as run:
        for _ in range(repeat):
            several = 5  # a short one is over in a moment
            took = 0.0
            for _ in range(several):
                bench.fill(short)
                took += run(lambda store: in_turn(store, short))
            rates["short"].append(short * several / took)
            bench.fill(long)
            rates["long"].append(long / run(lambda store: in_turn(store, long)))
            bench.fill(long)
            with bench.snapshot():
                rates["held"].append(long / run(lambda store: in_turn(store, long)))
    figure = f"stores.{bench.name}.read_delete"
    report.figure(f"{figure}.backlog10000", rates["short"], "rows/s")
    for name, suffix, reference in (
        ("long", "backlog1000000", "short"),
        ("held", "backlog1000000.snapshot_held", "long"),
    ):
        ratios = [a / b for a, b in zip(rates[name], rates[reference], strict=True)]
        beside = {"short": "backlog10000", "long": "without_snapshot"}[reference]
        report.figure(f"{figure}.{suffix}", rates[name], "rows/s", reference=beside, ratios=ratios)
    if isinstance(bench, OnSqlite):
        report.figure(f"stores.{bench.name}.wal.backlog1000000.snapshot_held", [bench.wal], "MB")


def run(report: Report, *, repeat: int, scale: float) -> None:
    rows = round(ROWS * scale)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outbox-bench-")))
        server = stack.enter_context(postgresql())
        other_server = stack.enter_context(mariadb())
        benches: list[Bench] = [OnPostgresql(server), OnMariadb(other_server), OnSqlite(folder)]
        benches += [OnSqliteFromAThread(folder), OnAiosqlite(folder)]
        for bench in benches:
            stack.callback(bench.close)
            suffix = ".from_a_thread" if isinstance(bench, OnSqliteFromAThread) else ""
            read_delete(report, bench, repeat, rows, f"stores.{bench.name}.read_delete{suffix}")
        for bench in benches[:3]:
            backlogs(report, bench, max(1, repeat // 2), scale)
        transactions.run(report, server, other_server, folder, repeat=repeat, scale=scale)
