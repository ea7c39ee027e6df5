"""Sessions that reach several databases: a message goes where the data went, or nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox import TransactionError
from tests.staging.conftest import SERVERS, Lent, server_engine
from tests.staging.shop import TABLES, Order, Shop, outbox, place, tell

Shops = tuple[Shop, Shop]


class StockBase(DeclarativeBase):
    pass


class Stock(StockBase):
    """An entity that lives in another database than orders."""

    __tablename__ = "stock"

    id: Mapped[int] = mapped_column(primary_key=True)


STOCKED = [*TABLES, StockBase.metadata.tables[Stock.__tablename__]]


@pytest.fixture(scope="module")
def pairs() -> Iterator[dict[str, tuple[Lent, Lent]]]:
    """Two databases of each server, lent to one test after the other."""
    pairs: dict[str, tuple[Lent, Lent]] = {}
    yield pairs
    for pair in pairs.values():
        for lent in pair:
            lent.drop()


@contextmanager
def a_pair(request: pytest.FixtureRequest, pairs: dict[str, tuple[Lent, Lent]], server: str) -> Iterator[Shops]:
    if server not in pairs:
        found = request.getfixturevalue(server)
        pairs[server] = Lent(found, STOCKED), Lent(found, STOCKED)
    with ExitStack() as stack:
        urls = [stack.enter_context(contextmanager(lent.lend)()) for lent in pairs[server]]
        first, second = (server_engine(url) for url in urls)
        stack.callback(second.dispose)
        stack.callback(first.dispose)
        yield Shop(first), Shop(second)


@pytest.fixture(params=["sqlite", *SERVERS])
def two_shops(request: pytest.FixtureRequest, pairs: dict[str, tuple[Lent, Lent]], two_shops: Shops) -> Iterator[Shops]:
    """Two databases of each kind."""
    if request.param == "sqlite":
        for shop in two_shops:
            StockBase.metadata.create_all(shop.engine)
        yield two_shops
        return
    with a_pair(request, pairs, request.param) as shops:
        yield shops


# ---------------------------------------------------------------- a leader, and a follower that is read


def routing(shops: Shops) -> type[Session]:
    """The recipe of SQLAlchemy's documentation. The follower's data are its own here, so that a stray row is seen."""
    leader, follower = (shop.engine for shop in shops)

    class RoutingSession(Session):
        def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> sa.Engine:
            writes = self._flushing or isinstance(clause, (sa.Update, sa.Delete))
            return leader if writes else follower

    return RoutingSession


def test_the_message_follows_the_order_to_the_leader(two_shops: Shops) -> None:
    leader, follower = two_shops
    with routing(two_shops)() as session, session.begin():
        place(session, "a")
    assert leader.holds("a")
    assert follower.holds()


def test_the_message_goes_to_the_leader_though_the_follower_was_read_before(two_shops: Shops) -> None:
    leader, follower = two_shops
    with routing(two_shops)() as session, session.begin():
        session.scalars(sa.select(Order)).all()
        place(session, "a")
        session.flush()
        session.scalars(sa.select(Order)).all()
        place(session, "b")
    assert leader.holds("a", "b")
    assert follower.holds()


def test_a_message_alone_goes_to_the_leader(two_shops: Shops) -> None:
    leader, follower = two_shops
    with routing(two_shops)() as session, session.begin():
        tell(session, "a")
    with routing(two_shops)() as session, session.begin():
        session.scalars(sa.select(Order)).all()
        tell(session, "b")
    assert (leader.messages(), follower.messages()) == (["a", "b"], [])


def test_the_message_goes_to_the_leader_that_text_was_written_to(two_shops: Shops) -> None:
    leader, follower = two_shops
    with routing(two_shops)() as session, session.begin():
        session.scalars(sa.select(Order)).all()
        connection = session.connection(bind_arguments={"bind": leader.engine})
        connection.exec_driver_sql("INSERT INTO shop_order (name) VALUES ('a')")
        tell(session, "a")
    assert leader.holds("a")
    assert follower.holds()


def test_a_commit_through_the_leaders_connection_takes_the_message_along(two_shops: Shops) -> None:
    leader, follower = two_shops
    with routing(two_shops)() as session:
        session.scalars(sa.select(Order)).all()
        connection = session.connection(bind_arguments={"bind": leader.engine})
        connection.execute(sa.insert(Order).values(name="a"))
        tell(session, "a")
        connection.commit()
    assert leader.holds("a")
    assert follower.holds()


def test_a_rolled_back_savepoint_of_a_routing_session_takes_its_own_message_and_no_other(two_shops: Shops) -> None:
    leader, follower = two_shops
    with routing(two_shops)() as session, session.begin():
        session.scalars(sa.select(Order)).all()
        place(session, "a")
        savepoint = session.begin_nested()
        place(session, "b")
        session.flush()
        savepoint.rollback()
    assert leader.holds("a")
    assert follower.holds()


def test_an_inbox_row_goes_to_the_leader_that_its_effect_goes_to(two_shops: Shops) -> None:
    leader, follower = two_shops
    for _ in range(2):
        with routing(two_shops)() as session, session.begin():
            session.scalars(sa.select(Order)).all()
            if outbox.claim(session, "billing", "once"):
                place(session, "a")
    assert leader.holds("a")
    assert follower.holds()
    count = sa.select(sa.func.count()).select_from(outbox.tables.inbox)
    for shop, rows in ((leader, 1), (follower, 0)):
        with shop.engine.connect() as connection:
            assert connection.scalar(count) == rows


# ---------------------------------------------------------------- a database for each kind of entity


def test_a_message_goes_where_the_only_data_went(two_shops: Shops) -> None:
    first, second = two_shops
    with Session(binds={Order: first.engine, Stock: second.engine}) as session, session.begin():
        session.scalars(sa.select(Stock)).all()
        place(session, "a")
    assert first.holds("a")
    assert second.holds()


def test_bind_arguments_say_which_of_two_written_databases_it_is(two_shops: Shops) -> None:
    first, second = two_shops
    with Session(binds={Order: first.engine, Stock: second.engine}) as session, session.begin():
        session.add_all([Order(name="a"), Stock(id=1)])
        outbox.add(session, "orders", b"a", bind_arguments={"mapper": Order})
        session.flush()
        outbox.add(session, "orders", b"b", bind_arguments={"mapper": Order})
        outbox.add(session, "stock", b"stock", bind_arguments={"bind": second.engine})
    assert (first.messages(), second.messages()) == (["a", "b"], ["stock"])


def test_without_bind_arguments_two_written_databases_are_refused(two_shops: Shops) -> None:
    first, second = two_shops
    with Session(binds={Order: first.engine, Stock: second.engine}) as session:
        session.add_all([Order(name="a"), Stock(id=1)])
        tell(session, "a")
        with pytest.raises(TransactionError, match=r"pass bind_arguments=\{'mapper': YourEntity\}"):
            session.commit()
        session.rollback()
    assert first.holds()
    assert second.holds()


def test_a_session_that_cannot_tell_the_database_of_a_message_alone_refuses(two_shops: Shops) -> None:
    first, second = two_shops
    with Session(binds={Order: first.engine, Stock: second.engine}) as session:
        tell(session, "a")
        with pytest.raises(TransactionError, match="cannot tell which database"):
            session.commit()
    with Session(binds={Order: first.engine}) as session:
        transaction = session.begin()
        session.begin_nested()
        tell(session, "a")
        with pytest.raises(TransactionError, match="were not inserted"):
            transaction.commit()
    assert first.holds()
    assert second.holds()


def test_a_message_beside_a_query_goes_to_the_only_database_there_is(two_shops: Shops) -> None:
    first, second = two_shops
    with Session(binds={Order: first.engine, Stock: second.engine}) as session, session.begin():
        session.scalars(sa.select(Order)).all()
        tell(session, "a")
    assert (first.messages(), second.messages()) == (["a"], [])


def test_a_database_that_was_only_read_is_refused(two_shops: Shops) -> None:
    first, second = two_shops
    with Session(second.engine, binds={Order: first.engine}) as session:
        session.connection()
        session.add(Order(name="a"))
        outbox.add(session, "orders", b"a", bind_arguments={"bind": second.engine})
        with pytest.raises(TransactionError, match="has not written to"):
            session.commit()
        session.rollback()
    assert first.holds()
    assert second.holds()


def test_a_database_that_the_transaction_does_not_hold_is_refused_unless_nothing_was_written(two_shops: Shops) -> None:
    first, second = two_shops
    with Session(first.engine) as session:
        place(session, "a")
        outbox.add(session, "orders", b"b", bind_arguments={"bind": second.engine})
        with pytest.raises(TransactionError, match="has not written to"):
            session.commit()
        session.rollback()
        outbox.add(session, "orders", b"c", bind_arguments={"bind": second.engine})
        session.commit()
    assert (first.messages(), second.messages()) == ([], ["c"])
    assert first.orders() == []


def test_no_error_shows_a_password(two_shops: Shops) -> None:
    elsewhere = sa.create_engine("postgresql+psycopg://app:secret@127.0.0.1:1/none")
    with Session(two_shops[0].engine) as session:
        place(session, "a")
        outbox.add(session, "orders", b"b", bind_arguments={"bind": elsewhere})
        with pytest.raises(TransactionError) as refusal:
            session.commit()
    assert "127.0.0.1" in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_bind_arguments_that_lead_nowhere_are_refused_with_their_first_use(two_shops: Shops) -> None:
    with Session(binds={Order: two_shops[0].engine}) as session, pytest.raises(TransactionError, match="no database"):
        outbox.add(session, "orders", b"a", bind_arguments={"mapper": Stock})


def test_the_message_that_waited_for_its_database_keeps_its_place(two_shops: Shops) -> None:
    first, second = two_shops
    with Session(binds={Order: first.engine, Stock: second.engine}) as session, session.begin():
        session.scalars(sa.select(Order)).all()
        session.scalars(sa.select(Stock)).all()
        place(session, "a")  # neither is written to yet
        session.flush()
        place(session, "b")
    assert first.holds("a", "b")


# ---------------------------------------------------------------- two-phase commit


@pytest.fixture(params=SERVERS)
def twophase_shops(request: pytest.FixtureRequest, pairs: dict[str, tuple[Lent, Lent]]) -> Iterator[Shops]:
    with a_pair(request, pairs, request.param) as shops:
        yield shops


def test_a_message_is_prepared_and_committed_with_its_order(server_shop: Shop) -> None:
    with Session(server_shop.engine, twophase=True) as session:
        place(session, "a")
        session.prepare()
        with pytest.raises(TransactionError, match="prepared"):
            tell(session, "b")
        session.commit()
        place(session, "c")
        session.commit()
        place(session, "d")
        session.prepare()
        session.rollback()
    assert server_shop.holds("a", "c")


def test_a_rolled_back_savepoint_within_two_phases_takes_its_own_message_and_no_other(server_shop: Shop) -> None:
    with Session(server_shop.engine, twophase=True) as session, session.begin():
        place(session, "a")
        savepoint = session.begin_nested()
        place(session, "b")
        session.flush()
        savepoint.rollback()
    assert server_shop.holds("a")


def test_what_was_prepared_is_there_though_its_session_was_lost(server_shop: Shop) -> None:
    """And is committed, order and message, by whoever recovers it."""
    session = Session(server_shop.engine, twophase=True)
    place(session, "a")
    session.prepare()
    session.invalidate()
    assert server_shop.holds()
    with server_shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        (xid,) = connection.recover_twophase()
        connection.commit_prepared(xid, recover=True)
    assert server_shop.holds("a")


def test_two_phases_let_a_message_go_to_another_database_than_the_data(twophase_shops: Shops) -> None:
    first, second = twophase_shops
    with Session(first.engine, binds={Stock: second.engine}, twophase=True) as session, session.begin():
        session.add(Stock(id=1))
        tell(session, "stock")
    assert (first.messages(), second.messages()) == (["stock"], [])
    with Session(first.engine, binds={Stock: second.engine}, twophase=True) as session, session.begin():
        session.add(Stock(id=2))
        outbox.add(session, "stock", b"more", bind_arguments={"mapper": Stock})
    assert (first.messages(), second.messages()) == (["stock"], ["more"])
    with Session(first.engine, binds={Stock: second.engine}, twophase=True) as session:
        session.add(Stock(id=3))
        tell(session, "never")
        session.prepare()
        session.rollback()
    assert (first.messages(), second.messages()) == (["stock"], ["more"])


@pytest.mark.parametrize("prepare", [True, False])
def test_a_core_transaction_in_two_phases(server_shop: Shop, prepare: bool) -> None:
    with server_shop.engine.connect() as connection:
        transaction = connection.begin_twophase()
        session = Session(connection, join_transaction_mode="rollback_only")
        place(session, "a")
        session.flush()
        if prepare:
            transaction.prepare()
            with pytest.raises(TransactionError, match="prepared"):
                tell(connection, "b")
        transaction.commit()
        session.close()
    assert server_shop.holds("a")
