"""The ways in which a session's own transaction ends."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from outbox import TransactionError
from tests.staging.shop import Order, Shop, outbox, place, tell


def test_a_message_is_committed_with_its_order(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        place(session, "a")
    assert shop.holds("a")


def test_messages_keep_the_order_in_which_they_were_added(shop: Shop) -> None:
    names = [f"{number:02}" for number in range(25)]
    with Session(shop.engine) as session, session.begin():
        for name in names:
            place(session, name)
            if name == "12":
                session.flush()
    assert shop.holds(*names)


def test_a_session_that_is_committed_again_and_again_sends_each_message_once(shop: Shop) -> None:
    with Session(shop.engine) as session:
        for name in "abc":
            place(session, name)
            session.commit()
        session.commit()
    assert shop.holds("a", "b", "c")


def test_a_rollback_takes_the_message_back(shop: Shop) -> None:
    with Session(shop.engine) as session:
        place(session, "a")
        session.flush()
        session.rollback()
        place(session, "b")
        session.commit()
    assert shop.holds("b")


def test_an_exception_in_a_begin_block_takes_the_message_back(shop: Shop) -> None:
    with suppress(ZeroDivisionError), Session(shop.engine) as session, session.begin():
        place(session, "a")
        session.flush()
        raise ZeroDivisionError
    assert shop.holds()


def test_closing_a_session_without_commit_sends_nothing(shop: Shop) -> None:
    with Session(shop.engine) as session:
        place(session, "a")
        session.flush()
    assert shop.holds()


def test_a_closed_session_that_is_used_again_has_no_ghost_of_its_past(shop: Shop) -> None:
    session = Session(shop.engine)
    place(session, "a")
    session.close()
    place(session, "b")
    session.flush()
    session.close()
    place(session, "c")
    session.commit()
    session.close()
    assert shop.holds("c")


def test_a_reset_or_invalidated_session_has_no_ghost_of_its_past(shop: Shop) -> None:
    session = Session(shop.engine)
    place(session, "a")
    session.flush()
    session.reset()
    place(session, "b")
    session.flush()
    session.invalidate()
    place(session, "c")
    session.commit()
    session.close()
    assert shop.holds("c")


def test_a_message_alone_is_a_transaction(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        tell(session, "a")
    assert shop.messages() == ["a"]


def test_a_message_beside_a_query_is_committed(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        session.scalars(sa.select(Order)).all()
        tell(session, "a")
    assert shop.messages() == ["a"]


def test_a_message_is_committed_with_a_bulk_update(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        place(session, "a")
    with Session(shop.engine) as session, session.begin():
        session.execute(sa.update(Order).values(name="b"))
        tell(session, "b")
    assert (shop.orders(), shop.messages()) == (["b"], ["a", "b"])


def test_a_message_is_committed_with_a_core_insert(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        tell(session, "a")
        session.execute(sa.insert(Order).values(name="a"))
    with Session(shop.engine) as session, session.begin():
        session.execute(sa.insert(Order).values(name="b"))
        tell(session, "b")
    assert shop.holds("a", "b")


@pytest.mark.parametrize("way", ["rows of an insert", "returned rows", "bulk_save_objects", "bulk_insert_mappings"])
def test_messages_are_committed_with_a_bulk_insert_of_each_kind_and_go_with_its_rollback(shop: Shop, way: str) -> None:
    with Session(shop.engine) as session:
        for names in ("ab", "cd", "ef"):
            for name in names:
                tell(session, name)
            rows = [{"name": name} for name in names]
            if way == "rows of an insert":
                session.execute(sa.insert(Order), rows)
            elif way == "returned rows" and shop.engine.dialect.insert_returning:
                assert len(session.scalars(sa.insert(Order).returning(Order.id), rows).all()) == 2
            elif way == "bulk_save_objects":
                session.bulk_save_objects([Order(**row) for row in rows])
            else:
                session.bulk_insert_mappings(Order, rows)
            if names == "cd":
                session.rollback()
            else:
                session.commit()
    assert shop.holds(*"abef")


def test_a_failed_flush_takes_the_message_back(shop: Shop) -> None:
    with Session(shop.engine) as session:
        place(session, "a")
        session.commit()
        place(session, "a")
        with pytest.raises(sa.exc.IntegrityError):
            session.flush()
        with pytest.raises(TransactionError, match="not active"):
            tell(session, "b")
        session.rollback()
        place(session, "c")
        session.commit()
    assert shop.holds("a", "c")


def test_a_commit_whose_insert_failed_fails_again_and_never_commits_the_data_alone(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        outbox.tables.message.drop(connection)
    with Session(shop.engine) as session:
        place(session, "a")
        for _ in range(2):
            with pytest.raises(sa.exc.DBAPIError):
                session.commit()
        session.rollback()
        session.commit()
    with shop.engine.begin() as connection:
        outbox.tables.message.create(connection)
    assert shop.holds()


def test_an_insert_that_failed_is_made_up_for_by_the_next_commit(shop: Shop) -> None:
    failures = [1]

    @sa.event.listens_for(shop.engine, "before_cursor_execute")
    def fail_once(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if "INTO outbox_message" in statement and failures:
            failures.pop()
            raise RuntimeError("once")

    with Session(shop.engine) as session:
        place(session, "a")
        place(session, "b")
        with pytest.raises(RuntimeError, match="once"):
            session.commit()
        session.commit()
    assert shop.holds("a", "b")


def test_messages_for_two_tables_are_each_inserted_once_though_the_second_insert_fails_at_first(shop: Shop) -> None:
    failures = [1]

    @sa.event.listens_for(shop.engine, "before_cursor_execute")
    def fail_once(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if "INTO outbox_scheduled" in statement and failures:
            failures.pop()
            raise RuntimeError("once")

    with Session(shop.engine) as session:
        place(session, "a")
        later = outbox.add(session, "orders", b"later", deliver_at=timedelta(days=1))
        with pytest.raises(RuntimeError, match="once"):
            session.commit()
        assert outbox.staged(session) == [later]
        session.commit()
    assert shop.holds("a")


def test_a_scoped_session_takes_messages(shop: Shop) -> None:
    session = scoped_session(sessionmaker(shop.engine))
    place(session, "a")
    session.commit()
    place(session, "b")
    session.remove()
    place(session, "c")
    session.commit()
    session.remove()
    assert shop.holds("a", "c")


def test_a_session_without_autobegin_takes_messages_between_begin_and_commit(shop: Shop) -> None:
    with Session(shop.engine, autobegin=False) as session:
        with pytest.raises(TransactionError, match=r"session\.begin\(\)"):
            tell(session, "a")
        with session.begin():
            place(session, "b")
    assert shop.holds("b")


def test_a_session_that_is_closed_for_good_refuses_messages(shop: Shop) -> None:
    session = Session(shop.engine, close_resets_only=False)
    place(session, "a")
    session.commit()
    session.close()
    with pytest.raises(TransactionError, match="closed"):
        tell(session, "b")
    assert shop.holds("a")
