"""Random transactions on a few entities, run by several threads of a process of its own: `tests.staging.test_order_at_random`
starts some and reads what they committed.

A program is what an application might do, in any order: lock entities, add messages before and after, flush, query, open
savepoints and release them or not, pause, commit or not. Each entity counts its locks, so a message's place among those of
its entity is known from what was read under the lock.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox import staging
from outbox._rows import Row
from tests.staging.conftest import send_begin
from tests.staging.shop import outbox

ENTITIES = 5
ATTEMPTS = 60  # of one program: deadlocks, serialization failures, SQLite's one writer


class Base(DeclarativeBase):
    pass


class Entity(Base):
    __tablename__ = "entity"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    n: Mapped[int]


Step = tuple[Any, ...]
Place = tuple[int, int, int, str]
"""An entity, the number of its lock, the place among the messages of that transaction, the message's payload."""


# ---------------------------------------------------------------- programs


def program(chance: random.Random) -> list[Step]:
    """The steps of one transaction; the last one ends it."""
    entities = chance.sample(range(ENTITIES), chance.choice([1, 1, 2, 3]))
    if chance.random() < 0.9:
        entities.sort()  # the others are for deadlocks
    steps: list[Step] = []
    for entity in entities:
        steps += _entity(chance, entity, chance.random() < 0.3)
    end = chance.choices(["commit", "rollback", "connection", "core"], [6, 1, 1, 2])[0]
    return [*steps, (end,)]


def _entity(chance: random.Random, entity: int, in_savepoint: bool) -> list[Step]:
    lock = ("lock", entity, chance.choice(["update", "for update", "mapped"]))
    adds: list[Step] = [("add", entity)] * chance.choice([1, 1, 2])
    steps: list[Step] = []
    # A message may come before its lock, if both are in one savepoint or none: rolled back, they go together.
    for step in [*adds, lock] if chance.random() < 0.5 else [lock, *adds]:
        between: list[Step | None] = [None, ("flush",), ("query",), ("pause", chance.random() * 0.004)]
        steps += [one for one in (chance.choice(between), step) if one]
    if not in_savepoint:
        return steps
    return [("savepoint", chance.choice(["session", "connection"]), chance.random() < 0.6, steps)]


# ---------------------------------------------------------------- running them


@dataclass
class Attempt:
    """One run of a program in a transaction."""

    session: Session
    at_once: bool  # not as the library does it: insert where the application adds
    core: bool
    added: list[tuple[int, str]] = field(default_factory=list)
    locks: dict[int, int] = field(default_factory=dict)

    def run(self, steps: list[Step]) -> None:
        for name, *arguments in steps:
            getattr(self, f"_{name}")(*arguments)

    def places(self) -> list[Place]:
        return [(entity, self.locks[entity], place, text) for place, (entity, text) in enumerate(self.added)]

    def _add(self, entity: int) -> None:
        text = uuid.uuid4().hex
        self.added.append((entity, text))
        if self.core and entity not in self.locks:
            return  # on a connection it is inserted at once: after the lock
        self._write(entity, text)

    def _write(self, entity: int, text: str) -> None:
        where = self.session.connection() if self.core or self.at_once else self.session
        outbox.add(where, "entities", text.encode(), key=entity)

    def _lock(self, entity: int, how: str) -> None:
        session = self.session
        if how == "mapped":
            session.get_one(Entity, entity).n = Entity.n + 1  # an SQL expression
            session.flush()
        else:
            if how == "for update":
                session.execute(sa.select(Entity.n).where(Entity.id == entity).with_for_update())
            session.execute(sa.update(Entity).where(Entity.id == entity).values(n=Entity.n + 1))
        n = session.scalar(sa.select(Entity.n).where(Entity.id == entity))
        assert n is not None
        self.locks[entity] = n
        if self.core:
            for other, text in self.added:
                if other == entity:
                    self._write(entity, text)

    def _flush(self) -> None:
        self.session.flush()

    def _query(self) -> None:
        self.session.scalars(sa.select(Entity).where(Entity.id < 2)).all()

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def _savepoint(self, of: str, keep: bool, steps: list[Step]) -> None:
        added, locks = list(self.added), dict(self.locks)
        savepoint = (self.session if of == "session" else self.session.connection()).begin_nested()
        self.run(steps)
        if keep:
            savepoint.commit()
        else:
            self.session.flush()
            savepoint.rollback()
            self.session.expire_all()
            self.added, self.locks = added, locks

    def _commit(self) -> None:
        self.session.commit()

    def _rollback(self) -> None:
        self.session.rollback()
        self.added.clear()

    def _connection(self) -> None:
        self.session.flush()
        self.session.connection().commit()

    def _core(self) -> None:
        time.sleep(0.003)  # its positions were taken early
        self.session.commit()


@dataclass
class Writer:
    """Threads that run programs until they are through, and what came of them."""

    engine: sa.Engine
    seed: str
    programs: int
    at_once: bool
    committed: list[Place] = field(default_factory=list)
    failed: int = 0
    errors: list[BaseException] = field(default_factory=list)

    def work(self, thread: int) -> None:
        chance = random.Random(f"{self.seed}/{thread}")
        try:
            for _ in range(self.programs):
                self.run(program(chance), chance)
        except BaseException as error:
            self.errors.append(error)

    def run(self, steps: list[Step], chance: random.Random) -> None:
        for _ in range(ATTEMPTS):
            try:
                self.committed += self.once(steps)
                return
            except sa.exc.OperationalError:  # also by the session's end, where a deadlock took its savepoints
                self.failed += 1
            time.sleep(chance.random() * 0.02)  # or the same two meet again

    def once(self, steps: list[Step]) -> list[Place]:
        with Session(self.engine) as session:
            attempt = Attempt(session, self.at_once, core=steps[-1][0] == "core")
            if self.engine.dialect.name == "sqlite" and not self.engine.dispatch.begin:
                # it would commit with the first savepoint: docs/guide.md, SQLite
                session.execute(sa.update(Entity).where(sa.false()).values(n=0))
            attempt.run(steps)
            return attempt.places()


def now_and_then_late(rows: list[Row]) -> None:
    """Between the insert and the commit: others commit meanwhile, with higher positions."""
    if random.random() < 0.2:
        time.sleep(random.random() * 0.015)


def writing_engine(url: str, level: str) -> sa.Engine:
    if not url.startswith("sqlite"):
        return sa.create_engine(url, isolation_level=level, pool_size=20)
    engine = sa.create_engine(url, connect_args={"timeout": 20})
    if level:
        send_begin(engine, level)
    return engine


def main(url: str, level: str, seed: str, threads: int, programs: int, at_once: bool) -> None:
    engine = writing_engine(url, level)
    staging.inserted.append(now_and_then_late)
    writer = Writer(engine, seed, programs, at_once)
    running = [threading.Thread(target=writer.work, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    engine.dispose()
    for error in writer.errors:
        raise error
    json.dump({"committed": writer.committed, "failed": writer.failed}, sys.stdout)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
