"""Where each statement commits by itself a message could not belong to anything: it is refused."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import TransactionError
from tests.staging.conftest import server_engine
from tests.staging.shop import Shop, outbox, place, tell

refused = pytest.raises(TransactionError, match="autocommit mode")


def test_a_session_on_an_engine_with_the_autocommit_option_refuses_at_once(shop: Shop) -> None:
    engine = shop.engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(engine) as session, refused:
        tell(session, "a")
    with Session(engine) as session:
        session.connection()
        with refused:
            tell(session, "b")
    assert shop.holds()


def test_a_session_that_turns_to_autocommit_after_the_message_was_added_refuses_to_begin(shop: Shop) -> None:
    with Session(shop.engine) as session:
        place(session, "a")
        with refused:
            session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    assert shop.holds()


def test_a_session_bound_by_entity_to_an_autocommit_engine_refuses_with_its_first_statement(shop: Shop) -> None:
    engine = shop.engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(binds={sa.Table: engine, outbox.tables.message: engine}) as session:
        tell(session, "a")
        with refused:
            session.connection(bind_arguments={"bind": engine})
    assert shop.holds()


def test_a_connection_with_the_autocommit_option_refuses(shop: Shop) -> None:
    with shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        with refused:
            tell(connection, "a")
        with Session(connection) as session:
            session.connection()
            with refused:
                tell(session, "b")
    assert shop.holds()


def test_an_engine_created_for_autocommit_refuses(server_shop: Shop) -> None:
    _refuses(server_engine(server_shop.engine.url, isolation_level="AUTOCOMMIT"), server_shop)


def test_an_engine_whose_driver_is_told_to_autocommit_refuses(server_shop: Shop) -> None:
    engine = server_engine(server_shop.engine.url, connect_args={"autocommit": True})
    with Session(engine) as session:
        session.connection()
        with refused:
            tell(session, "a")
    with engine.connect() as connection, refused:
        tell(connection, "b")
    engine.dispose()
    assert server_shop.holds()


def test_an_engine_whose_driver_autocommits_until_begin_is_sent_takes_messages(mariadb_shop: Shop) -> None:
    engine = server_engine(mariadb_shop.engine.url, connect_args={"autocommit": True})

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("START TRANSACTION")

    with Session(engine) as session:
        place(session, "a")
        session.commit()
        place(session, "b")
        session.flush()
        session.rollback()
    engine.dispose()
    assert mariadb_shop.holds("a")


def test_a_sqlite_engine_created_for_autocommit_refuses(two_shops: tuple[Shop, Shop]) -> None:
    shop = two_shops[0]
    _refuses(sa.create_engine(shop.engine.url, isolation_level="AUTOCOMMIT"), shop)


def test_a_connection_of_an_autocommit_engine_with_another_level_takes_messages(server_shop: Shop) -> None:
    engine = server_engine(server_shop.engine.url, isolation_level="AUTOCOMMIT")
    with Session(engine) as session:
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        place(session, "a")
        session.commit()
    engine.dispose()
    assert server_shop.holds("a")


def test_a_claim_is_refused_too(shop: Shop) -> None:
    engine = shop.engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, refused:
        outbox.claim(connection, "billing", "id")
    with Session(engine) as session, refused:
        outbox.claim(session, "billing", "id")


def _refuses(engine: sa.Engine, shop: Shop) -> None:
    with Session(engine) as session, refused:
        tell(session, "a")
    with engine.connect() as connection, refused:
        tell(connection, "b")
    engine.dispose()
    assert shop.holds()
