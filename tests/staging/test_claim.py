"""The inbox row is claimed once, in the transaction of the effect."""

from __future__ import annotations

import threading
import uuid
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from outbox import ConfigurationError, EncodingError
from outbox.dialects import clock
from tests.services.waiting import wait_until
from tests.staging.shop import Shop, outbox, place, tell


def test_the_first_claim_of_a_message_is_true_and_later_ones_are_not(shop: Shop) -> None:
    id = uuid.uuid4()
    with Session(shop.engine) as session, session.begin():
        assert outbox.claim(session, "billing", id) is True
        assert outbox.claim(session, "billing", id) is False
        assert outbox.claim(session, "shipping", id) is True
    with Session(shop.engine) as session, session.begin():
        assert outbox.claim(session, "billing", str(id)) is False
    with shop.engine.begin() as connection:
        assert outbox.claim(connection, "billing", id) is False
    scoped = scoped_session(sessionmaker(shop.engine))
    assert outbox.claim(scoped, "billing", id) is False
    scoped.remove()


def test_a_claim_is_undone_with_its_effect(shop: Shop) -> None:
    with Session(shop.engine) as session:
        assert outbox.claim(session, "billing", "id")
        place(session, "a")
        session.rollback()
        assert outbox.claim(session, "billing", "id")
        place(session, "b")
        session.commit()
    assert shop.holds("b")


@pytest.mark.parametrize("id", ["42", "orders/7", "ü", "{" + str(uuid.UUID(int=1)), "x" * 10_000])
def test_ids_of_foreign_producers_are_claimed_by_their_text(shop: Shop, id: str) -> None:
    with Session(shop.engine) as session, session.begin():
        assert outbox.claim(session, "billing", id)
        assert not outbox.claim(session, "billing", id)
        assert outbox.claim(session, "billing", id + " another")


@pytest.mark.parametrize("cycle", [-1, 1.5, "1"])
def test_a_cycle_that_is_none_is_refused(shop: Shop, cycle: Any) -> None:
    """It would be answered with: done already."""
    with Session(shop.engine) as session, pytest.raises(TypeError, match="outbox-cycle"):
        outbox.claim(session, "billing", "id", cycle=cycle)


def test_a_replay_is_claimed_once(shop: Shop) -> None:
    id = uuid.uuid4()
    inbox = outbox.tables.inbox
    with shop.engine.begin() as connection:
        long_ago = clock(-3600)
        row = {"consumer": "billing", "message_id": id, "outcome": "dead", "cycle": 2, "processed_at": long_ago}
        connection.execute(sa.insert(inbox).values(row))
    with Session(shop.engine) as session, session.begin():
        assert not outbox.claim(session, "billing", id)
        assert not outbox.claim(session, "billing", id, cycle=1)
        assert outbox.claim(session, "billing", id, cycle=2)
        assert not outbox.claim(session, "billing", id, cycle=2)
        assert session.scalar(sa.select(inbox.c.outcome).where(inbox.c.processed_at > clock(-60))) == "done"


@pytest.mark.parametrize(
    ("consumer", "id", "error"),
    [
        ("", "id", ConfigurationError),
        ("x" * 129, "id", ConfigurationError),
        ("a\x00", "id", ConfigurationError),
        (None, "id", ConfigurationError),
        ("billing", None, TypeError),
        ("billing", 7, TypeError),
        ("billing", b"id", TypeError),
        ("billing", "\ud800", EncodingError),
        ("billing", "", EncodingError),
    ],
)
def test_what_is_no_consumer_or_id_is_refused(
    two_shops: tuple[Shop, Shop], consumer: Any, id: Any, error: type[Exception]
) -> None:
    with Session(two_shops[0].engine) as session, pytest.raises(error):
        outbox.claim(session, consumer, id)


def test_of_two_claims_at_once_the_second_waits_and_is_false(postgresql_shop: Shop) -> None:
    claims: list[bool] = []
    engine = postgresql_shop.engine
    waiting = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = :on")

    def second() -> None:
        with Session(engine) as session, session.begin():
            claims.append(outbox.claim(session, "billing", "id"))

    with Session(engine) as session, session.begin():
        assert outbox.claim(session, "billing", "id")
        thread = threading.Thread(target=second)
        thread.start()
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
            assert wait_until(lambda: other.scalar(waiting, {"on": "transactionid"}) == 1, 10)
        assert claims == []
        place(session, "a")
    thread.join(10)
    assert claims == [False]
    assert postgresql_shop.holds("a")


def test_of_two_claims_at_once_the_second_is_true_if_the_first_is_rolled_back(postgresql_shop: Shop) -> None:
    claims: list[bool] = []
    started = threading.Event()

    def second() -> None:
        with Session(postgresql_shop.engine) as session, session.begin():
            started.set()
            claims.append(outbox.claim(session, "billing", "id"))

    with Session(postgresql_shop.engine) as session:
        assert outbox.claim(session, "billing", "id")
        thread = threading.Thread(target=second)
        thread.start()
        started.wait(10)
        session.rollback()
    thread.join(10)
    assert claims == [True]


def test_of_many_claims_at_once_exactly_one_has_its_effect(shop: Shop) -> None:
    """On SQLite, which has one writer, a claim waits for the writer or fails; it is never true twice."""
    together = threading.Barrier(4)
    failures: list[Exception] = []

    def consume() -> None:
        together.wait(10)
        try:
            with Session(shop.engine) as session, session.begin():
                if outbox.claim(session, "billing", "id"):
                    tell(session, "effect")
        except sa.exc.OperationalError as error:
            failures.append(error)

    threads = [threading.Thread(target=consume) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert shop.messages() == ["effect"]
    assert all("locked" in str(error) for error in failures)
