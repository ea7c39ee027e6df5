"""What each use of an outbox does to its tables, all of it, through the engine of a role."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
import uuid
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Consumer, DeadLetters, Drop, Outbox, Relay, Retry
from outbox._outgoing import Outgoing
from outbox.backoff import Backoff
from outbox.cleanup import Cleanup
from outbox.observe.cleanup import RECORD
from outbox.observe.status import status
from outbox.observe.trace import trace
from outbox.relay import Limits
from outbox.transport import Outcome
from tests.relay.scripted import Scripted

QUICK = Limits(poll=0.01, attempts=2, backoff=Backoff(first=0.01, factor=1.0, most=0.01))
ITS = ("sent", "dead_letter", "inbox", "audit", "relay")  # what cleanup removes
WITHIN = 40.0  # seconds, on a loaded machine


class Uses:
    """``owner``: a role that may do everything; ``outbox``: whose tables it owns."""

    def __init__(self, outbox: Outbox, owner: sa.Engine) -> None:
        self.outbox, self.owner, self.within = outbox, owner, WITHIN

    def all(self) -> dict[str, Callable[[sa.Engine], None]]:
        return {
            name: getattr(self, name) for name in ("add", "cancel", "claim", "relay", "cleanup", "consume", "operate")
        }

    def count(self, name: str, *where: Any) -> int:
        table = getattr(self.outbox.tables, name)
        with self.owner.connect() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(table).where(*where)) or 0

    def empty(self) -> None:
        with self.owner.begin() as connection:
            for name in (*ITS, "message", "scheduled", "parked", "attempt"):
                connection.execute(sa.delete(getattr(self.outbox.tables, name)))

    # ------------------------------------------------------------ an application

    def add(self, engine: sa.Engine) -> None:
        with Session(engine) as session, session.begin():
            self.outbox.add(session, "orders", {"n": 1}, key=1)
            self.outbox.add(session, "orders", {"n": 1}, deliver_at=dt.timedelta(days=1))
        with Session(engine) as session, session.begin():  # by arrays
            self.outbox.add_all(session, [{"topic": "orders", "payload": {"n": n}} for n in range(20)])
        assert (self.count("message"), self.count("scheduled")) == (21, 1)

    def cancel(self, engine: sa.Engine) -> None:
        with Session(self.owner) as session, session.begin():
            id = self.outbox.add(session, "orders", {}, deliver_at=dt.timedelta(days=1)).id
        with Session(engine) as session, session.begin():
            assert self.outbox.cancel(session, id)
        assert self.count("scheduled") == 0

    def claim(self, engine: sa.Engine) -> None:
        inbox = self.outbox.tables.inbox
        dead = uuid.uuid4()
        with self.owner.begin() as connection:
            connection.execute(inbox.insert(), {"consumer": "c", "message_id": dead, "outcome": "dead", "cycle": 1})
        with Session(engine) as session, session.begin():
            id = uuid.uuid4()
            assert [self.outbox.claim(session, "c", id) for _ in range(2)] == [True, False]
            assert self.outbox.claim(session, "c", dead, cycle=1)

    # ------------------------------------------------------------ the relay

    def relay(self, engine: sa.Engine) -> None:
        with Session(self.owner) as session, session.begin():
            for key in ("fine", "late", "bad", "bad", "refused"):
                self.outbox.add(session, "orders", {}, key=key)
            self.outbox.add(session, "orders", {}, key="due", deliver_at=dt.timedelta(seconds=-1))
        relay, silent = self.outbox.tables.relay, dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
        with self.owner.begin() as connection:
            connection.execute(
                relay.insert(), {"owner": uuid.uuid4().hex, "host": "h", "version": "0", "heartbeat_at": silent}
            )

        def script(row: Outgoing, tries: int) -> Outcome | None:
            if row.key == "refused":
                return Outcome.reject("never")
            if row.key == "bad" or (row.key == "late" and not tries):
                return Outcome.retry("not now")
            return None

        sent = 0
        until = time.monotonic() + self.within
        while self.count("message") or self.count("parked") or self.count("scheduled"):
            assert time.monotonic() < until
            sent += Relay(self.outbox, database=engine, transport=Scripted(script), limits=QUICK).drain().sent
        assert (sent, self.count("dead_letter")) == (3, 3)
        assert self.count("relay") == 0

    def cleanup(self, engine: sa.Engine) -> None:
        tables, old = self.outbox.tables, dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
        self._letter("billing")
        with self.owner.begin() as connection:
            connection.execute(tables.dead_letter.update().values(state="discarded", closed_at=old))
            connection.execute(tables.inbox.update().values(processed_at=old))
            for name, row in {
                "sent": {"position": 1, "id": uuid.uuid4(), "topic": "orders", "sent_at": old},
                "audit": {"action": "discard", "who": "w", "target": "t", "count": 1, "at": old},
                "relay": {"owner": "gone", "host": "h", "version": "0", "heartbeat_at": old},
            }.items():
                connection.execute(getattr(tables, name).insert(), row)
            connection.execute(tables.checkpoint.delete().where(tables.checkpoint.c.name == RECORD))
        removed = Cleanup(self.outbox, database=engine).run().removed
        assert removed == dict.fromkeys(ITS, 1)
        assert Cleanup(self.outbox, database=engine).run().removed == {}

    # ------------------------------------------------------------ a consumer

    def consume(self, engine: sa.Engine) -> None:
        broker = f"memory://{uuid.uuid4().hex}"
        with Session(self.owner) as session, session.begin():
            for key in ("fine", "again", "dead"):
                self.outbox.add(session, "orders", {"key": key}, key=key)
        Relay(self.outbox, database=self.owner, transport=broker).drain()
        billing = Consumer("billing", self.outbox, database=engine, transport=broker, retries=3)
        tries: dict[str, int] = {}

        @billing.on("orders")
        def handle(payload: Any, session: Session) -> None:
            key = payload["key"]
            tries[key] = tries.get(key, 0) + 1
            if key == "again" and tries[key] == 1:
                raise Retry(after=0.05)
            if key == "dead" and tries[key] == 1:
                raise Drop("no")
            self.outbox.add(session, "charged", {}, key=key)
            self.outbox.add(session, "reminder", {}, key=key, deliver_at=dt.timedelta(days=1))

        asyncio.run(self._consumed(billing))
        assert (self.count("message"), self.count("scheduled"), self.count("attempt")) == (3, 3, 0)

    async def _consumed(self, billing: Consumer) -> None:
        inbox = self.outbox.tables.inbox
        async with billing:
            await self._until(lambda: self.count("inbox") == 3)
            assert self.count("inbox", inbox.c.outcome == "dead") == 1
            await asyncio.to_thread(self._replay)
            await self._until(lambda: self.count("inbox", inbox.c.outcome == "done") == 3)

    def _replay(self) -> None:
        with DeadLetters(self.outbox, database=self.owner) as letters:
            letters.replay(consumer="billing")

    async def _until(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + self.within
        while not await asyncio.to_thread(condition):
            assert time.monotonic() < until
            await asyncio.sleep(0.02)

    # ------------------------------------------------------------ an operator

    def operate(self, engine: sa.Engine) -> None:
        for consumer in ("", "billing"):
            self._letter(consumer)
            self._letter(consumer)
        with engine.begin() as connection:
            assert status(connection, self.outbox.tables).dead_letters == 4
        with DeadLetters(self.outbox, database=engine) as letters:
            assert len(letters.groups()) == 2
            found = letters.find()
            for letter in {letter.consumer: letter for letter in found}.values():
                letters.plan(letter.id)
                letters.replay(letter.id)
            for letter in letters.find():
                letters.discard(letter.id, why="old")
        with engine.begin() as connection:
            trace(connection, self.outbox.tables, id=found[0].message_id)
        assert (self.count("message"), self.count("attempt"), self.count("audit")) == (1, 1, 4)

    def _letter(self, consumer: str) -> None:
        tables = self.outbox.tables
        id = uuid.uuid4()
        letter = {
            "id": uuid.uuid4(),
            "consumer": consumer,
            "message_id": id,
            "cycle": 0,
            "topic": "orders",
            "bucket": 3,
            "key": "k",
            "payload": b"{}",
            "reason": "rejected",
            "fingerprint": consumer or "relay",
            "attempts": 1,
            "state": "open",
        }
        with self.owner.begin() as connection:
            connection.execute(tables.dead_letter.insert(), letter)
            if consumer:
                row = {"consumer": consumer, "message_id": id, "outcome": "dead", "cycle": 0}
                connection.execute(tables.inbox.insert(), row)
