"""Why rows are inserted last: a position taken before the entity's row lock inverts the order of the entity's messages.

Eight threads increment one counter, with a query between the message and the increment, as applications do: the query
autoflushes. Each message carries a ticket; the true order of tickets is that of the row lock, the value of the counter.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox import Outbox
from tests.staging.conftest import postgresql_engine

THREADS = 8
TRANSACTIONS = 25  # of each thread, in one round
ROUNDS = 12


class Base(DeclarativeBase):
    pass


class MappedMessage(Base):
    """Mapped before the entity, as an outbox in a base module is; so a flush inserts it first."""

    __tablename__ = "mapped_message"

    position: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(), primary_key=True)
    ticket: Mapped[str]


class Counter(Base):
    __tablename__ = "counter"

    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int]


outbox = Outbox(Base.metadata)

Add = Callable[[Session, str], object]


@pytest.fixture
def engine(postgresql_url: str) -> Iterator[sa.Engine]:
    engine = postgresql_engine(postgresql_url, pool_size=THREADS + 1)
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(Counter(id=1, n=0))
    yield engine
    engine.dispose()


def true_order(engine: sa.Engine, add: Add) -> dict[str, int]:
    """What the counter was in the transaction of each ticket, after a round."""
    lock_order: dict[str, int] = {}
    errors: list[BaseException] = []

    def work() -> None:
        for _ in range(TRANSACTIONS):
            ticket = uuid.uuid4().hex
            with Session(engine) as session, session.begin():
                counter = session.get_one(Counter, 1)
                add(session, ticket)
                session.scalar(sa.select(sa.func.count()).select_from(Counter))  # autoflushes what is mapped
                counter.n = Counter.n + 1  # an SQL expression
                session.flush()
                lock_order[ticket] = session.scalars(sa.select(Counter.n)).one()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(lock_order) == THREADS * TRANSACTIONS
    return lock_order


def inversions(engine: sa.Engine, by_position: sa.Select[Any], lock_order: dict[str, int]) -> int:
    with Session(engine) as session:
        seen = [lock_order[ticket] for ticket in session.scalars(by_position) if ticket in lock_order]
    assert len(seen) == len(lock_order)
    return sum(earlier > later for earlier, later in pairwise(seen))


@pytest.mark.timeout(600)
def test_messages_of_one_entity_have_the_order_of_its_row_lock(engine: sa.Engine) -> None:
    # First see that this can tell: mapped rows come out of order here, after a round or a few.
    mapped = sa.select(MappedMessage.ticket).order_by(MappedMessage.position)
    rounds = 0
    inverted = False
    while not inverted and rounds < ROUNDS:
        rounds += 1
        order = true_order(engine, lambda session, ticket: session.add(MappedMessage(ticket=ticket)))
        inverted = inversions(engine, mapped, order) > 0
    assert inverted, "session.add inverted nothing, so this test would not see outbox.add do it"

    message = outbox.tables.message
    tickets = sa.select(message.c.type).order_by(message.c.position)
    for _ in range(max(rounds, 3)):
        order = true_order(engine, lambda session, ticket: outbox.add(session, "counter", b"", key=1, type=ticket))
        assert inversions(engine, tickets, order) == 0
