"""Callers with any isolation level: a transaction that the database refuses takes its messages with it, the one that the
application tries instead has its own, and a message never makes a transaction fail that would not have failed without it."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import staging
from tests.staging.conftest import SERVERS, server_engine
from tests.staging.shop import Order, Shop, outbox, place, tell

LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
every_level = pytest.mark.parametrize("level", LEVELS)

Opened = Callable[[], Session]


@contextmanager
def engine_wide(shop: Shop, level: str) -> Iterator[Opened]:
    engine = server_engine(shop.engine.url, isolation_level=level)
    yield lambda: Session(engine)
    engine.dispose()


@contextmanager
def by_an_engines_option(shop: Shop, level: str) -> Iterator[Opened]:
    engine = shop.engine.execution_options(isolation_level=level)
    yield lambda: Session(engine)


@contextmanager
def by_the_sessions_connection(shop: Shop, level: str) -> Iterator[Opened]:
    def open() -> Session:
        session = Session(shop.engine)
        session.connection(execution_options={"isolation_level": level})
        return session

    yield open


@contextmanager
def by_an_outside_connection(shop: Shop, level: str) -> Iterator[Opened]:
    with shop.engine.connect().execution_options(isolation_level=level) as connection:
        yield lambda: Session(connection)


@every_level
@pytest.mark.parametrize(
    "way", [engine_wide, by_an_engines_option, by_the_sessions_connection, by_an_outside_connection]
)
def test_what_holds_for_a_session_holds_with_each_level(server_shop: Shop, level: str, way: Any) -> None:
    with way(server_shop, level) as open:
        with open() as session:
            assert session.connection().get_isolation_level() == level
            place(session, "a")
            savepoint = session.begin_nested()
            place(session, "b")
            session.flush()
            savepoint.rollback()
            place(session, "c")
            session.commit()
        with open() as session:
            place(session, "d")
            session.flush()
            session.rollback()
        with open() as session:
            place(session, "e")
            tell(session.connection(), "f")
            session.add(Order(name="f"))
            session.commit()
    assert sorted(server_shop.orders()) == ["a", "c", "e", "f"]
    assert server_shop.holds("a", "c", "f", "e")  # on a connection a message is inserted at once


# ---------------------------------------------------------------- what the database refuses


def taken(session: Session) -> int:
    return session.scalar(sa.select(sa.func.count()).select_from(Order)) or 0


def test_of_two_that_saw_the_same_one_fails_with_its_message_and_the_next_try_succeeds(postgresql_shop: Shop) -> None:
    """Write skew: each names its order by how many it saw. PostgreSQL finds that out with the commit or before."""
    engine = postgresql_shop.engine.execution_options(isolation_level="SERIALIZABLE")
    with Session(engine) as first, Session(engine) as second:
        place(first, f"first saw {taken(first)}")
        place(second, f"second saw {taken(second)}")
        first.commit()
        with pytest.raises(sa.exc.OperationalError, match="could not serialize"):
            second.commit()
        second.rollback()
        place(second, f"second saw {taken(second)}")
        second.commit()
    assert postgresql_shop.holds("first saw 0", "second saw 1")


def test_a_message_whose_own_insert_is_refused_takes_the_order_along(postgresql_shop: Shop) -> None:
    """A refusal that PostgreSQL can utter only when our statement comes."""
    engine = postgresql_shop.engine.execution_options(isolation_level="SERIALIZABLE")
    refused: list[str] = []

    @sa.event.listens_for(postgresql_shop.engine, "handle_error")
    def note(context: Any) -> None:
        refused.append(context.statement or "")

    with Session(engine) as first, Session(engine) as second:
        place(first, f"first saw {taken(first)}")
        place(second, f"second saw {taken(second)}")
        second.flush()
        first.commit()
        with pytest.raises(sa.exc.OperationalError, match="could not serialize"):
            second.commit()
        second.rollback()
    assert "INTO outbox_message" in refused[0]
    assert postgresql_shop.holds("first saw 0")


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_an_update_of_what_has_changed_since_takes_the_message(postgresql_shop: Shop, level: str) -> None:
    with Session(postgresql_shop.engine) as session, session.begin():
        place(session, "a")
    with Session(postgresql_shop.engine.execution_options(isolation_level=level)) as session:
        order = session.scalars(sa.select(Order)).one()
        with Session(postgresql_shop.engine) as other, other.begin():
            other.execute(sa.update(Order).values(name="b"))
            tell(other, "b")
        order.name = "c"
        tell(session, "c")
        with pytest.raises(sa.exc.OperationalError, match="could not serialize"):
            session.commit()
        session.rollback()
        order.name = "d"
        tell(session, "d")
        session.commit()
    assert (postgresql_shop.orders(), postgresql_shop.messages()) == (["d"], ["a", "b", "d"])


@pytest.mark.parametrize("server", SERVERS)
@every_level
def test_each_order_that_was_committed_has_one_message_and_each_refused_try_none(
    request: pytest.FixtureRequest, server: str, level: str
) -> None:
    """Four threads whose orders depend on what they read, and which try again whatever was refused."""
    shop: Shop = request.getfixturevalue(f"{server}_shop")
    engine = server_engine(shop.engine.url, isolation_level=level, pool_size=4)
    refusals: list[str] = []
    errors: list[BaseException] = []
    together = threading.Barrier(4)

    def work(number: int) -> None:
        chance = random.Random(number)
        together.wait(30)
        for turn in range(6):
            while True:
                try:
                    with Session(engine) as session, session.begin():
                        outbox.add(session, "orders", f"{number}.{turn}".encode())
                        taken(session)
                        session.add(Order(name=f"{number}.{turn}"))
                        if chance.random() < 0.5:
                            session.flush()
                    break
                except sa.exc.OperationalError as error:
                    refusals.append(str(error.orig))

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    engine.dispose()
    assert errors == []
    names = {f"{number}.{turn}" for number in range(4) for turn in range(6)}
    assert sorted(shop.orders()) == sorted(shop.messages()) == sorted(names)
    if level == "SERIALIZABLE":
        assert refusals, "nothing was refused, so nothing was tried here"
    else:
        assert refusals == []


# ---------------------------------------------------------------- what a message adds

Step = Callable[[Session, bool], None]


def read(session: Session, told: bool) -> None:
    taken(session)


def write(session: Session, told: bool) -> None:
    session.execute(sa.insert(Order).values(name=uuid.uuid4().hex))


def message(session: Session, told: bool) -> None:
    if told:
        outbox.add(session, "orders", b"message")
        staging.insert_now(session)


def commit(session: Session, told: bool) -> None:
    session.commit()


def outcomes(engine: sa.Engine, turns: Sequence[int], programs: Sequence[Sequence[Step]], *, told: bool) -> list[bool]:
    """Which of two transactions are committed when their steps come in this order of turns."""
    sessions = [Session(engine), Session(engine)]
    alive = [True, True]
    at = [0, 0]
    for turn in turns:
        step, at[turn] = programs[turn][at[turn]], at[turn] + 1
        if alive[turn]:
            try:
                step(sessions[turn], told)
            except sa.exc.OperationalError:
                alive[turn] = False
                sessions[turn].rollback()
    for session in sessions:
        session.close()
    return alive


def test_with_a_message_the_same_transactions_are_refused_as_without(postgresql_shop: Shop) -> None:
    """Every interleaving of two serializable transactions, where both read and write, where one only reads or only
    writes, each with a message before its commit: the insert must be in no conflict that the data is not in."""
    engine = postgresql_shop.engine.execution_options(isolation_level="SERIALIZABLE")
    refused = 0
    for programs in (
        ([read, write, message, commit], [read, write, message, commit]),
        ([read, message, commit], [write, message, commit]),
        ([write, message, commit], [write, message, commit]),
    ):
        for first in combinations(range(len(programs[0]) + len(programs[1])), len(programs[0])):
            turns = [0 if turn in first else 1 for turn in range(len(programs[0]) + len(programs[1]))]
            without, with_messages = (outcomes(engine, turns, programs, told=told) for told in (False, True))
            assert with_messages == without, (turns, [step.__name__ for steps in programs for step in steps])
            refused += without.count(False)
    assert refused > 20
    assert len(postgresql_shop.messages()) > 50


@every_level
def test_the_insert_of_a_message_waits_for_no_other(server_shop: Shop, level: str) -> None:
    """Positions are taken without a lock that lasts: eight transactions that have inserted and not committed."""
    engine = server_engine(server_shop.engine.url, isolation_level=level, pool_size=9)
    sessions = [Session(engine) for _ in range(8)]
    for number, session in enumerate(sessions):
        if server_shop.engine.name == "mysql":
            session.execute(sa.text("SET innodb_lock_wait_timeout = 2"))
        else:
            session.execute(sa.text("SET LOCAL lock_timeout = '2s'"))
        place(session, str(number))
        staging.insert_now(session)
    for session in reversed(sessions):  # the order of their commits is another than that of their positions
        session.commit()
        session.close()
    engine.dispose()
    assert server_shop.holds(*"01234567")
