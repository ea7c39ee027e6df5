"""The local log between processes, of which some are killed, and with files that cannot be used."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from outbox.errors import ConfigurationError, Unavailable
from outbox.testing.conformance import ids, message, numbered
from outbox.transport import Delivery, Transport
from outbox.transports import open_transport

NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
async def log(path: Path) -> AsyncIterator[Transport]:
    transport = open_transport(f"local://{path}?session=1")
    yield transport
    await transport.close()


Start = Callable[..., Awaitable[Process]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts workers; returns when one is ready. Whatever still runs after the test is killed."""
    processes: list[Process] = []

    async def another(*arguments: object) -> Process:
        command = [sys.executable, "-m", "tests.transports.local_worker", *map(str, arguments)]
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
        processes.append(process)
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 30) == b"ready\n"
        return process

    yield another
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def lines(process: Process, count: int) -> list[str]:
    assert process.stdout is not None
    return [(await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip() for _ in range(count)]


async def the_rest(process: Process) -> list[str]:
    """What it printed until it ended."""
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    return output.decode().split()


async def read_all(transport: Transport, topic: str) -> list[Delivery]:
    """Everything in the topic."""
    subscription = await transport.subscribe([topic], f"all-{time.monotonic_ns()}", window=1_000_000)
    found: list[Delivery] = []
    while batch := await subscription.fetch(10_000, 0.2):
        found += batch
    await subscription.close()
    return found


async def test_several_processes_publish_at_once_and_nothing_is_lost(log: Transport, path: Path, start: Start) -> None:
    await log.declare(["t"])
    workers = [await start("publish", f"local://{path}", "t", name, 20, 50) for name in ("a", "b", "c")]
    for worker in workers:
        assert sorted(map(int, await the_rest(worker))) == list(range(50))
        assert worker.returncode == 0
    found = await read_all(log, "t")
    payloads = Counter((delivery.payload or b"").decode() for delivery in found)
    assert payloads == Counter(f"{name}:{n}:{at}" for name in "abc" for n in range(50) for at in range(20))
    offsets: dict[int | None, list[int | None]] = defaultdict(list)
    by_key: dict[bytes | None, list[tuple[int, ...]]] = defaultdict(list)
    for delivery in found:
        offsets[delivery.partition].append(delivery.offset)
        _, *numbers = (delivery.payload or b"").decode().split(":")
        by_key[delivery.key].append(tuple(map(int, numbers)))
    assert all(seen == list(range(len(seen))) for seen in offsets.values())
    assert all(seen == sorted(seen) for seen in by_key.values())


async def test_what_a_killed_publisher_reported_is_stored_and_no_batch_is_stored_in_part(
    log: Transport, path: Path, start: Start
) -> None:
    reported = set()
    names = [f"p{number}" for number in range(6)]
    for at, name in enumerate(names):
        worker = await start("publish", f"local://{path}", "t", name, 50, 100_000)
        seen = await lines(worker, 3 + 5 * at)
        worker.send_signal(signal.SIGKILL)
        seen += await the_rest(worker)
        # The kill may have cut the last line; the one before it is whole.
        reported |= {f"{name}:{number}" for number in seen[:-1]}
    batches = Counter((delivery.payload or b"").decode().rpartition(":")[0] for delivery in await read_all(log, "t"))
    assert set(batches.values()) == {50}
    assert reported <= batches.keys()
    # and it is at once there for the next
    (outcome,) = await log.publish([message("t", "k")])
    assert outcome.kind == "sent"


async def test_what_a_killed_consumer_had_not_acknowledged_goes_to_another(
    log: Transport, path: Path, start: Start
) -> None:
    sent = numbered("t", 2000)
    await log.publish(sent)
    handed_out: Counter[str] = Counter()
    for _ in range(4):
        worker = await start("consume", f"local://{path}?session=0.5", "t", "g", "")
        seen = await lines(worker, 100)
        worker.send_signal(signal.SIGKILL)
        handed_out.update({*seen, *(await the_rest(worker))[:-1]})
    subscription = await log.subscribe(["t"], "g", window=1000)
    rest: list[Delivery] = []
    deadline = time.monotonic() + 20
    while not {*handed_out, *ids(rest)} >= {m.id for m in sent}:
        assert time.monotonic() < deadline
        batch = await subscription.fetch(1000, 0.5)
        await subscription.ack(batch)
        rest += batch
    # What came twice is bounded: a window for each partition and death.
    twice = sum(count - 1 for count in handed_out.values()) + len({*handed_out} & {*ids(rest)})
    assert twice <= 4 * 4 * 50
    by_key: dict[bytes | None, list[int]] = defaultdict(list)
    for delivery in rest:
        by_key[delivery.key].append(int(delivery.payload or b""))
    assert all(seen == sorted(seen) for seen in by_key.values())


async def test_a_static_member_that_was_killed_has_its_partitions_back_long_before_its_session_ends(
    log: Transport, path: Path, start: Start
) -> None:
    await log.publish(numbered("t", 1000))
    url = f"local://{path}?session=600"
    first = await start("consume", url, "t", "g", "pod-0")
    seen = await lines(first, 100)
    first.send_signal(signal.SIGKILL)
    seen += (await the_rest(first))[:-1]
    begun = time.monotonic()
    second = await start("consume", url, "t", "g", "pod-0")
    while len(set(seen)) < 1000:
        seen += await lines(second, 1)
    assert time.monotonic() - begun < 20
    second.send_signal(signal.SIGKILL)


async def test_a_consumer_in_another_process_gets_a_message_within_the_poll(
    log: Transport, path: Path, start: Start
) -> None:
    await log.declare(["t"])
    worker = await start("consume", f"local://{path}", "t", "g", "")
    took = []
    for _ in range(10):
        sent = message("t", "k")
        begun = time.monotonic()
        await log.publish([sent])
        assert await lines(worker, 1) == [sent.id]
        took.append(time.monotonic() - begun)
    assert sorted(took)[5] < 0.2


# ---- files that cannot be used


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process is in a transaction, for as long as this lasts."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    yield
    db.execute("ROLLBACK")
    db.close()


async def test_a_locked_file_makes_messages_unavailable_until_it_is_free(log: Transport, path: Path) -> None:
    await log.declare(["t"])
    hasty = open_transport(f"local://{path}?busy=0.2")
    with locked(path):
        begun = time.monotonic()
        outcomes = await hasty.publish([message("t", "k"), message("t")])
        assert time.monotonic() - begun < 2
        assert {(outcome.kind, outcome.scope) for outcome in outcomes} == {("unavailable", "transport")}
        assert "locked by another process" in outcomes[0].reason
        with pytest.raises(Unavailable, match="locked by another process"):
            await hasty.declare(["another"])
    assert [outcome.kind for outcome in await hasty.publish([message("t", "k")])] == ["sent"]
    assert len(await read_all(log, "t")) == 1
    await hasty.close()


async def test_waiting_for_a_lock_does_not_hold_up_the_event_loop(log: Transport, path: Path) -> None:
    await log.declare(["t"])
    with locked(path):
        publishing = asyncio.create_task(log.publish([message("t")]))
        slowest = 0.0
        for _ in range(20):
            begun = time.monotonic()
            await asyncio.sleep(0.01)
            slowest = max(slowest, time.monotonic() - begun)
        assert not publishing.done()
    assert slowest < 0.2
    assert [outcome.kind for outcome in await publishing] == ["sent"]


async def test_nothing_is_stored_after_an_abort(log: Transport, path: Path) -> None:
    await log.declare(["t"])
    doomed = open_transport(f"local://{path}")
    await doomed.connect()
    with locked(path):
        calls = [asyncio.create_task(doomed.publish([message("t", "k")])) for _ in range(5)]
        await asyncio.sleep(0.05)
        begun = time.monotonic()
        await doomed.close(abort=True)
        assert time.monotonic() - begun < 1
    assert {outcome.kind for call in calls for outcome in await call} == {"unavailable"}
    assert await read_all(log, "t") == []


async def test_a_commit_that_meets_a_lock_is_made_later(log: Transport, path: Path) -> None:
    await log.publish(numbered("t", 20))
    hasty = open_transport(f"local://{path}?busy=0.1")
    subscription = await hasty.subscribe(["t"], "g", window=100)
    found = await subscription.fetch(20, 5)
    with locked(path):
        await subscription.ack(found)
        await asyncio.sleep(0.5)  # reading and staying a member need no lock
        assert await subscription.fetch(20, 0.1) == []
    await hasty.close()
    again = await log.subscribe(["t"], "g", window=100)
    assert await again.fetch(20, 0.5) == []


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """root may write to everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def as_root() -> Iterator[None]:
    """Within `as_nobody`, where that is a change."""
    before = os.geteuid()
    if os.getuid() == 0:
        os.seteuid(0)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A log that this user may read and not write, in a folder where nothing may be made; not below pytest's own folder,
    which only its owner may enter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.db"
        transport = open_transport(f"local://{path}")
        asyncio.run(transport.publish([message("t")]))
        asyncio.run(transport.close())
        path.chmod(0o444)
        path.parent.chmod(0o555)
        with as_nobody():
            yield path
        path.parent.chmod(0o755)


async def test_a_read_only_file_says_so(read_only: Path) -> None:
    transport = open_transport(f"local://{read_only}")
    with pytest.raises(ConfigurationError, match=r"log\.db (is read-only|cannot be opened)"):
        await transport.connect()
    (outcome,) = await transport.publish([message("t")])
    assert outcome.kind == "unavailable"
    assert "log.db" in outcome.reason
    await transport.close()


async def test_a_file_that_becomes_writable_is_written_to(read_only: Path) -> None:
    """SQLite opens a file that may not be written read-only, and such a connection stays read-only."""
    with as_root():
        read_only.parent.chmod(0o777)
    transport = open_transport(f"local://{read_only}")
    (outcome,) = await transport.publish([message("t", "k")])
    assert outcome.kind == "unavailable"
    assert "log.db-wal and log.db-shm" in outcome.reason
    with as_root():
        for file in read_only.parent.iterdir():
            file.chmod(0o666)
    await asyncio.sleep(0.01)  # a caller backs off, as it was asked to
    (outcome,) = await transport.publish([message("t", "k")])
    assert outcome.kind == "sent", outcome.reason
    assert len(await read_all(transport, "t")) == 2
    await transport.close()


async def test_a_file_that_was_replaced_is_the_one_that_is_written_to(log: Transport, path: Path) -> None:
    """The old one, open still, would swallow what is stored there."""
    await log.publish([message("t", "k")])
    for file in path.parent.glob("log.db*"):
        file.rename(file.with_name(f"old-{file.name}"))
    assert [outcome.kind for outcome in await log.publish(numbered("t", 3))] == ["sent"] * 3
    other = open_transport(f"local://{path}")
    assert len(await read_all(other, "t")) == 3
    await other.close()


async def test_a_file_that_cannot_be_opened_for_a_while_is_no_mistake(log: Transport, path: Path) -> None:
    """It was opened before; so whoever reads it waits."""
    await log.publish([message("t", "k")])
    subscription = await log.subscribe(["t"], "g", window=100)
    for file in path.parent.glob("log.db*"):
        file.unlink()
    await asyncio.to_thread(path.mkdir)
    with pytest.raises(Unavailable, match="is a folder"):
        await subscription.fetch(10, 0.2)
    await asyncio.to_thread(path.rmdir)
    await subscription.fetch(10, 0.2)


async def test_a_reader_outlives_the_replacement_of_its_file(
    log: Transport, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "outbox.transports")
    await log.publish(numbered("t", 3))
    subscription = await log.subscribe(["t"], "g", window=100)
    await subscription.ack(await subscription.fetch(10, 5))  # a position in the former log, and none in the new one
    for file in path.parent.glob("log.db*"):
        file.unlink()
    await subscription.fetch(10, 0.2)
    assert [outcome.kind for outcome in await log.publish(numbered("t", 2))] == ["sent"] * 2
    found: list[Delivery] = []
    deadline = time.monotonic() + 20
    while len(found) < 2:
        assert time.monotonic() < deadline
        with contextlib.suppress(Unavailable):
            found += await subscription.fetch(10, 0.2)
    assert "was removed or replaced" in caplog.text
    assert f"made a new log, {path}" in caplog.text


async def test_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    transport = open_transport(f"local://{tmp_path}/missing/log.db")
    with pytest.raises(ConfigurationError, match="missing does not exist"):
        await transport.connect()
    assert "missing" in (await transport.check(["t"]))[0]
    await transport.close()


async def test_the_database_of_something_else_is_left_alone(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE shop_order (id INTEGER PRIMARY KEY)")
        db.commit()
    transport = open_transport(f"local://{path}")
    with pytest.raises(ConfigurationError, match="database of something else"):
        await transport.connect()
    (outcome,) = await transport.publish([message("t")])
    assert outcome.kind == "unavailable"
    await transport.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("shop_order",)]


@pytest.fixture
def diary(path: Path) -> Iterator[Path]:
    text = "Dear diary, " * 1000
    path.write_text(text)
    yield path
    assert path.read_text() == text


async def test_a_file_that_is_no_database_is_left_alone(diary: Path) -> None:
    transport = open_transport(f"local://{diary}")
    with pytest.raises(ConfigurationError, match="no SQLite file"):
        await transport.connect()
    await transport.close()


async def test_a_log_of_a_later_version_is_left_alone(log: Transport, path: Path) -> None:
    await log.connect()
    await log.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 2")
    with pytest.raises(ConfigurationError, match="another version of pyoutbox"):
        await open_transport(f"local://{path}").connect()


async def test_what_was_sent_is_there_when_it_is_opened_again(path: Path) -> None:
    for turn in range(3):
        transport = open_transport(f"local://{path}")
        await transport.publish(numbered("t", 10, first=10 * turn))
        assert len(await read_all(transport, "t")) == 10 * (turn + 1)
        await transport.close()
    mode = sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone()
    assert mode == ("wal",)


async def test_a_folder_in_the_place_of_the_file_is_named_as_what_it_is(tmp_path: Path) -> None:
    transport = open_transport(f"local:{tmp_path}")
    with pytest.raises(ConfigurationError, match=f"local: {tmp_path} is a folder; name a file in it"):
        await transport.connect()
    await transport.close()
