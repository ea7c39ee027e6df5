"""What goes past SQLAlchemy cannot be covered. It is not silent, though, and nothing else is called an error."""

from __future__ import annotations

import logging
from contextlib import suppress

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.staging.shop import Order, Shop, outbox, place, tell


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "outbox")
    return caplog


def said(errors: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in errors.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("text", ["COMMIT", "commit;", "END", " END TRANSACTION"])
def test_raw_commit_text_under_a_session_that_is_then_closed(
    shop: Shop, errors: pytest.LogCaptureFixture, text: str
) -> None:
    if shop.engine.dialect.name == "mysql" and "END" in text:
        return  # does not know it
    with Session(shop.engine) as session:
        place(session, "a")
        session.flush()
        message = outbox.staged(session)[0]
        session.execute(sa.text(text))
    (error,) = said(errors)
    assert "1 staged messages were not inserted" in error
    assert str(message.id) in error
    assert (shop.orders(), shop.messages()) == (["a"], [])


def test_raw_commit_text_and_later_statements_before_the_session_is_closed(
    shop: Shop, errors: pytest.LogCaptureFixture
) -> None:
    with Session(shop.engine) as session:
        place(session, "a")
        session.flush()
        session.execute(sa.text("COMMIT"))
        if shop.engine.dialect.name == "postgresql":
            session.add(Order(name="b"))
            session.flush()
    assert len(said(errors)) == 1


def test_raw_commit_text_before_a_commit_of_the_session_is_made_up_for(
    shop: Shop, errors: pytest.LogCaptureFixture
) -> None:
    with Session(shop.engine) as session:
        place(session, "a")
        session.flush()
        session.execute(sa.text("COMMIT"))
        session.commit()
    assert said(errors) == []
    assert shop.holds("a")


def test_a_commit_on_the_dbapi_connection(shop: Shop, errors: pytest.LogCaptureFixture) -> None:
    with Session(shop.engine) as session:
        place(session, "a")
        session.flush()
        session.connection().connection.commit()
    (error,) = said(errors)
    assert "DBAPI" in error


@pytest.mark.parametrize("text", ["CREATE TABLE extra (a int)", " create table shop_order (a int)", "BEGIN"])
def test_what_mariadb_commits_with_another_statement_and_a_rollback(
    mariadb_shop: Shop, errors: pytest.LogCaptureFixture, text: str
) -> None:
    """DDL commits what came before, also where it fails."""
    with Session(mariadb_shop.engine) as session:
        place(session, "a")
        session.flush()
        with suppress(sa.exc.OperationalError):
            session.execute(sa.text(text))
        session.rollback()
    (error,) = said(errors)
    assert "MySQL, which commits before DDL (docs/guide.md, MySQL and MariaDB)" in error
    assert (mariadb_shop.orders(), mariadb_shop.messages()) == (["a"], [])


def test_what_mariadb_commits_with_ddl_of_sqlalchemy_and_a_rollback(
    mariadb_shop: Shop, errors: pytest.LogCaptureFixture
) -> None:
    with Session(mariadb_shop.engine) as session:
        place(session, "a")
        session.flush()
        sa.Table("extra", sa.MetaData(), sa.Column("a", sa.Integer)).create(session.connection())
        session.rollback()
    assert len(said(errors)) == 1


def test_ddl_on_mariadb_before_the_commit_is_made_up_for(mariadb_shop: Shop, errors: pytest.LogCaptureFixture) -> None:
    with Session(mariadb_shop.engine) as session:
        place(session, "a")
        session.flush()
        session.execute(sa.text("CREATE TABLE extra (a int)"))
        place(session, "b")
        session.commit()
    assert said(errors) == []
    assert mariadb_shop.holds("a", "b")


def test_a_temporary_table_on_mariadb_commits_nothing(mariadb_shop: Shop, errors: pytest.LogCaptureFixture) -> None:
    with Session(mariadb_shop.engine) as session:
        place(session, "a")
        session.flush()
        session.execute(sa.text("CREATE TEMPORARY TABLE extra (a int)"))
        session.execute(sa.text("DROP TEMPORARY TABLE extra"))
        session.rollback()
    assert said(errors) == []
    assert mariadb_shop.holds()


def test_what_sqlite_commits_with_a_savepoint_is_called_so(shop: Shop, errors: pytest.LogCaptureFixture) -> None:
    """The order is committed, though its session is rolled back; the message is not."""
    with Session(shop.engine) as session:
        with session.begin_nested():
            session.add(Order(name="a"))
        tell(session, "b")
        session.rollback()
    if not shop.releases_commit:
        assert said(errors) == []
        return
    (error,) = said(errors)
    assert "SQLite, with its first savepoint (docs/guide.md, SQLite)" in error
    assert (shop.orders(), shop.messages()) == (["a"], [])


def test_raw_commit_text_before_anything_was_flushed_is_no_error(shop: Shop, errors: pytest.LogCaptureFixture) -> None:
    with Session(shop.engine) as session:
        session.scalars(sa.select(Order)).all()
        if shop.engine.dialect.name == "sqlite" and not shop.engine.dispatch.begin:
            session.execute(sa.text("BEGIN"))  # which sqlite3 has not sent yet
        place(session, "a")
        session.connection().exec_driver_sql("COMMIT")
    assert said(errors) == []
    assert shop.holds()


def test_the_session_committed_with_its_database_still_unknown(
    two_shops: tuple[Shop, Shop], errors: pytest.LogCaptureFixture
) -> None:
    first, second = two_shops
    with Session(binds={Order: first.engine}) as session, session.begin():
        session.begin_nested()  # left open: then no event comes before the root's commit
        for shop, name in ((first, "a"), (second, "b")):
            connection = session.connection(bind_arguments={"bind": shop.engine})
            connection.execute(sa.insert(Order).values(name=name))
        tell(session, "c")
    (error,) = said(errors)
    assert "before it could tell through which of its connections" in error


def test_no_error_shows_what_is_in_a_message(shop: Shop, errors: pytest.LogCaptureFixture) -> None:
    with Session(shop.engine) as session:
        session.execute(sa.insert(Order).values(name="a"))
        outbox.add(session, "orders", b"secret payload", headers={"authorization": "secret header"}, key="secret key")
        session.execute(sa.text("COMMIT"))
    assert len(said(errors)) == 1
    assert "secret" not in errors.text


class TestTheseAreNoErrors:
    def test_close(self, shop: Shop, errors: pytest.LogCaptureFixture) -> None:
        with Session(shop.engine) as session:
            tell(session, "a")
        with Session(shop.engine) as session:
            session.scalars(sa.select(Order)).all()
            tell(session, "a")
        with Session(shop.engine) as session:
            session.connection()
            place(session, "a")
        with Session(shop.engine) as session:
            place(session, "a")
            session.flush()
        assert said(errors) == []

    def test_rollback(self, shop: Shop, errors: pytest.LogCaptureFixture) -> None:
        with Session(shop.engine) as session:
            place(session, "a")
            session.flush()
            session.rollback()
            place(session, "a")
            session.rollback()
        assert said(errors) == []

    def test_a_failed_flush(self, shop: Shop, errors: pytest.LogCaptureFixture) -> None:
        with Session(shop.engine) as session:
            place(session, "a")
            session.commit()
            place(session, "a")
            with pytest.raises(sa.exc.IntegrityError):
                session.commit()
            session.rollback()
        assert said(errors) == []

    def test_savepoints(self, shop: Shop, errors: pytest.LogCaptureFixture) -> None:
        with Session(shop.engine) as session:
            with session.begin_nested():
                place(session, "a")
            session.begin_nested()
            place(session, "b")
            session.flush()
            session.rollback()
        assert said(errors) == []

    def test_an_outside_transaction_that_is_rolled_back(self, shop: Shop, errors: pytest.LogCaptureFixture) -> None:
        with shop.engine.connect() as connection:
            connection.begin()
            with Session(connection) as session:
                place(session, "a")
                session.flush()
            connection.rollback()
        assert said(errors) == []

    def test_invalidation(self, shop: Shop, errors: pytest.LogCaptureFixture) -> None:
        session = Session(shop.engine)
        place(session, "a")
        session.flush()
        session.invalidate()
        session = Session(shop.engine)
        place(session, "a")
        session.flush()
        session.connection().invalidate()
        session.close()
        assert said(errors) == []

    def test_commit(self, shop: Shop, errors: pytest.LogCaptureFixture) -> None:
        with Session(shop.engine) as session:
            place(session, "a")
            session.commit()
        assert said(errors) == []
        assert shop.holds("a")
