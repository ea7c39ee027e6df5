"""``local:file.db``, ``local:///absolute/path.db``: a durable log in one SQLite file, shared by the processes of one
machine. What the quick start and users' tests run on; not for network file systems.

What `publish` reported as sent has been synced to the disk (WAL, synchronous=FULL) and survives a crash of the process and
of the machine; a batch is stored whole or not at all. Messages are kept for ever: remove the file to begin anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple

from outbox.errors import ConfigurationError, Unavailable
from outbox.transports._group import Group, Member, Share, TopicPartition
from outbox.transports._log import Bell, Row, Stored, Topic
from outbox.transports._log_transport import LogTransport, options
from outbox.transports._url import Url, a_number

log = logging.getLogger("outbox.transports")

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

BUSY: Final = 5.0
"""Seconds to wait for other processes' transactions."""

_APPLICATION: Final = 0x6F626C67  # "oblg", in the file's header: this is one of our logs
_OFFSET_BITS: Final = 40

# A message's rowid is (partition's id << 40 | offset): the rows of a partition lie together in order of their offsets, so
# that a read is one range scan and no second index has to be written. 8 million partitions, 10^12 messages in each.
_SCHEMA: Final = f"""
CREATE TABLE topic (name TEXT PRIMARY KEY, id TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE partition (id INTEGER PRIMARY KEY, topic TEXT NOT NULL, number INTEGER NOT NULL,
    "end" INTEGER NOT NULL DEFAULT 0, UNIQUE (topic, number));
CREATE TABLE message (place INTEGER PRIMARY KEY, key BLOB, payload BLOB, headers BLOB, stored_at INTEGER NOT NULL);
CREATE TABLE member ("group" TEXT, name TEXT, life TEXT NOT NULL, topics TEXT NOT NULL, session REAL NOT NULL,
    expires REAL NOT NULL, PRIMARY KEY ("group", name)) WITHOUT ROWID;
CREATE TABLE share ("group" TEXT, topic TEXT, partition INTEGER, owner TEXT, epoch INTEGER NOT NULL,
    position INTEGER NOT NULL, PRIMARY KEY ("group", topic, partition)) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = 1;
"""
_TOPICS: Final = """SELECT topic.name, topic.id, count(*) FROM topic JOIN partition ON partition.topic = topic.name
    WHERE topic.name IN (SELECT value FROM json_each(?)) GROUP BY topic.name"""
_READ: Final = """SELECT place, key, payload, headers, stored_at FROM message
    WHERE place >= ? AND place < ? ORDER BY place LIMIT ?"""


def from_url(url: Url) -> LogTransport:
    """A path, with the parameters partitions, session, auto_create, max_message_bytes, and busy: seconds to wait while
    another process holds the file's lock."""
    if url.hosts or url.username is not None:
        raise ConfigurationError("local: write local:///absolute/path.db with three slashes, or local:relative.db")
    path = url.path
    if not path or path.endswith("/"):
        raise ConfigurationError("local: the URL names no file; write local:///absolute/path.db or local:relative.db")
    busy = url.parameter("busy", BUSY, a_number(0, 3600))
    # Absolute now: a later chdir must not make two logs of one.
    return LogTransport("local", LocalLog(Path(path).absolute(), busy), **options(url, "busy"))


_bells: dict[Path, Bell] = {}


class LocalLog:
    """A `Log` in an SQLite file: a connection and a thread of its own."""

    def __init__(self, path: Path, busy: float = BUSY) -> None:
        self.path = path
        self.bell = _bells.setdefault(path, Bell())
        self._busy = busy
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outbox-local")
        self._stopped = threading.Event()
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._opened = False  # once: then what is wrong with the file may pass
        self._ids: dict[TopicPartition, int] = {}

    async def run(self, work: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        if self._stopped.is_set():
            raise Unavailable(f"local: {self.path} is closed here")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._guarded, work, *arguments)

    def _guarded(self, work: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        if self._stopped.is_set():
            raise Unavailable(f"local: {self.path} is closed here")
        try:
            self.open()
            return work(*arguments)
        except sqlite3.Error as error:
            if _code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                self._forget()  # what a connection was denied once, it is denied for good: the next call opens another
            raise self._explained(error) from error

    def another(self) -> LocalLog:
        return LocalLog(self.path, self._busy)

    def open(self) -> None:
        if self._db is not None and self._file == _identity(self.path):
            return
        if self._db is not None:
            log.warning("local: %s was removed or replaced; what the former file holds is not read any more", self.path)
        self._forget()  # what is stored in the old one, no one would find
        if not self.path.parent.is_dir():
            wrong = Unavailable if self._opened else ConfigurationError
            raise wrong(f"local: the folder {self.path.parent} does not exist; make it first")
        # timeout=0: waiting for a lock is ours to do, because SQLite's own cannot be interrupted.
        db = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        self._db = db
        try:
            self._patiently(lambda: db.execute("PRAGMA journal_mode = WAL"))
            db.execute("PRAGMA synchronous = FULL")
            self._patiently(lambda: self._transaction("IMMEDIATE", self._make))
            self._file = _identity(self.path)
            self._opened = True
        except BaseException:
            self._db = None
            db.close()
            raise

    def _make(self) -> None:
        """The tables, where the file is new."""
        db = self._connection()
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if application == _APPLICATION and version == 1:
            return
        if application == _APPLICATION:
            raise ConfigurationError(f"local: {self.path} was written by another version of pyoutbox ({version})")
        if application or db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise ConfigurationError(f"local: {self.path} is a database of something else; give the log its own file")
        for statement in _SCHEMA.split(";"):
            db.execute(statement)
        log.info("local: made a new log, %s", self.path)

    def _connection(self) -> sqlite3.Connection:
        assert self._db is not None
        return self._db

    def _patiently(self, work: Callable[[], T]) -> T:
        deadline = time.monotonic() + self._busy
        pause = 0.0005
        while True:
            try:
                return work()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                    raise
            # Random, so that several waiters do not come back at one moment.
            if self._stopped.wait(pause * (0.5 + random.random())):
                raise Unavailable(f"local: {self.path} is closed here")
            pause = min(2 * pause, 0.01)

    def _transaction(self, kind: str, work: Callable[[], T]) -> T:
        db = self._connection()
        db.execute(f"BEGIN {kind}")
        try:
            result = work()
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return result

    def _write(self, work: Callable[[], T]) -> T:
        return self._patiently(lambda: self._transaction("IMMEDIATE", work))

    def topics(self, names: Sequence[str], create: int | None) -> dict[str, Topic]:
        asked = json.dumps(list(names))
        db = self._connection()

        def known() -> dict[str, Topic]:
            return {name: Topic(id, count) for name, id, count in db.execute(_TOPICS, (asked,))}

        def make() -> dict[str, Topic]:
            missing = [name for name in names if name not in known()]
            db.executemany("INSERT INTO topic VALUES (?, ?)", [(name, uuid.uuid4().hex) for name in missing])
            places = [(name, number) for name in missing for number in range(create or 0)]
            db.executemany("INSERT INTO partition (topic, number) VALUES (?, ?)", places)
            return known()

        found = self._patiently(known)
        return found if create is None or len(found) == len(set(names)) else self._write(make)

    def append(self, rows: Mapping[TopicPartition, Sequence[Row]]) -> None:
        now = time.time_ns() // 1_000_000
        db = self._connection()

        def store() -> None:
            for place, new in rows.items():
                id, end = db.execute(
                    'UPDATE partition SET "end" = "end" + ? WHERE topic = ? AND number = ? RETURNING id, "end"',
                    (len(new), *place),
                ).fetchone()
                first = (id << _OFFSET_BITS) + end - len(new)
                db.executemany(
                    f"INSERT INTO message VALUES (?, ?, ?, ?, {now})",
                    [(first + at, *row) for at, row in enumerate(new)],
                )

        self._write(store)

    def read(self, wanted: Sequence[tuple[TopicPartition, int, int]], limit: int) -> dict[TopicPartition, list[Stored]]:
        found: dict[TopicPartition, list[Stored]] = {}
        for place, offset, most in wanted:
            if (id := self._id(place)) is None:
                continue  # the file was replaced, and this is another log
            base = id << _OFFSET_BITS
            bounds = (base + offset, base + (1 << _OFFSET_BITS), min(most, limit))
            rows = self._patiently(partial(self._range, bounds))
            if rows:
                found[place] = self._stored(rows, base)
                limit -= len(rows)
                if not limit:
                    break
        return found

    def _range(self, bounds: tuple[int, int, int]) -> list[tuple[int, bytes | None, bytes | None, bytes, int]]:
        return self._connection().execute(_READ, bounds).fetchall()

    def _stored(self, rows: list[tuple[int, bytes | None, bytes | None, bytes, int]], base: int) -> list[Stored]:
        result = []
        last, when = -1, datetime.now(UTC)
        for place, key, payload, headers, stored_at in rows:
            if stored_at != last:  # the same for a whole batch
                last, when = stored_at, datetime.fromtimestamp(stored_at / 1000, UTC)
            result.append((place - base, key, payload, headers, when))
        return result

    def _id(self, place: TopicPartition) -> int | None:
        id = self._ids.get(place)
        if id is None:
            found = (
                self._connection().execute("SELECT id FROM partition WHERE topic = ? AND number = ?", place).fetchone()
            )
            if found is not None:
                id = self._ids[place] = found[0]
        return id

    def with_group(self, name: str, change: Callable[[Group, float], T]) -> T:
        def once() -> T:
            before, group = self._load(name), self._load(name)
            result = change(group, time.time())
            if group == before:
                return result
            raise _Changed

        def for_good() -> T:
            before, group = self._load(name), self._load(name)
            result = change(group, time.time())
            self._save(name, before, group)
            return result

        # Most beats of a member change nothing: those take no lock and sync nothing to the disk.
        with contextlib.suppress(_Changed):
            return self._patiently(lambda: self._transaction("DEFERRED", once))
        return self._write(for_good)

    def _load(self, name: str) -> Group:
        db = self._connection()
        group = Group()
        for member, life, topics, session, expires in db.execute(
            'SELECT name, life, topics, session, expires FROM member WHERE "group" = ?', (name,)
        ):
            group.members[member] = Member(life, frozenset(json.loads(topics)), session, expires)
        for topic, partition, owner, epoch, position in db.execute(
            'SELECT topic, partition, owner, epoch, position FROM share WHERE "group" = ?', (name,)
        ):
            group.shares[topic, partition] = Share(owner, epoch, position)
        return group

    def _save(self, name: str, before: Group, group: Group) -> None:
        db = self._connection()
        gone = before.members.keys() - group.members.keys()
        db.executemany('DELETE FROM member WHERE "group" = ? AND name = ?', [(name, member) for member in gone])
        db.executemany(
            "INSERT OR REPLACE INTO member VALUES (?, ?, ?, ?, ?, ?)",
            [
                (name, member, now.life, json.dumps(sorted(now.topics)), now.session, now.expires)
                for member, now in group.members.items()
                if now != before.members.get(member)
            ],
        )
        db.executemany(
            "INSERT OR REPLACE INTO share VALUES (?, ?, ?, ?, ?, ?)",
            [
                (name, *place, now.owner, now.epoch, now.position)
                for place, now in group.shares.items()
                if now != before.shares.get(place)
            ],
        )

    def _explained(self, error: sqlite3.Error) -> Unavailable | ConfigurationError:
        code = _code(error)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Unavailable(f"local: {self.path} has been locked by another process for {self._busy:g} s")
        wrong = Unavailable if self._opened else ConfigurationError
        if code == sqlite3.SQLITE_READONLY:
            return wrong(
                f"local: {self.path} is read-only for this user, and the log is written to: make it writable, its folder "
                f"and the files {self.path.name}-wal and {self.path.name}-shm too"
            )
        if self.path.is_dir():
            return wrong(f"local: {self.path} is a folder; name a file in it")
        if code == sqlite3.SQLITE_CANTOPEN:
            return wrong(f"local: {self.path} cannot be opened: this user may not read and write it, or its folder")
        if code == sqlite3.SQLITE_NOTADB:
            return wrong(f"local: {self.path} is no SQLite file; give the log its own file")
        return Unavailable(f"local: {self.path} cannot be used: {error}")

    async def close(self, *, abort: bool = False) -> None:
        if self._stopped.is_set():
            return
        if abort:
            self._stopped.set()
            if self._db is not None:
                self._db.interrupt()
        # Behind whatever is under way; after an abort that ends at once.
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    def _close(self) -> None:
        self._stopped.set()
        self._forget()

    def _forget(self) -> None:
        self._ids.clear()
        if self._db is not None:
            self._db.close()
            self._db = None


def _identity(path: Path) -> tuple[int, int] | None:
    """What stays the same for as long as this is the same file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 where it did not come from there."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


class _Changed(Exception):
    """The group is not as it was, so it must be written."""
