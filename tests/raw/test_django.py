"""Django's connection: its own cursor, its own notes of the transaction, its own errors."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator

import django.db.utils
import pytest
import sqlalchemy as sa
from django.db import connection, migrations, transaction
from django.db.migrations.state import ProjectState
from django.test.utils import CaptureQueriesContext
from sqlalchemy.orm import Session

from outbox import Outbox, TransactionError
from outbox.observe.schema import check_schema
from tests.raw.conftest import emptied
from tests.raw.orms import Django, DjangoOrder
from tests.raw.shops import SYNC
from tests.raw.test_connections import rows
from tests.services.fixtures import INSTALL_TIMEOUT
from tests.staging.shop import outbox
from tests.staging.test_many import odd

pytestmark = pytest.mark.timeout(INSTALL_TIMEOUT)


@pytest.fixture(params=["sqlite", "postgresql", *(["mariadb"] if "mysqlclient" in SYNC else [])])
def shop(request: pytest.FixtureRequest) -> Iterator[Django]:
    for shop in emptied(request.param, request):
        orm = Django(shop)
        yield orm
        orm.close()


@pytest.fixture
def default(request: pytest.FixtureRequest) -> Iterator[Django]:
    """The default database, which is SQLite's."""
    for shop in emptied("sqlite", request):
        orm = Django(shop)
        yield orm
        orm.close()


@pytest.fixture
def other(request: pytest.FixtureRequest) -> Iterator[Django]:
    """Another database beside it."""
    for shop in emptied("postgresql", request):
        orm = Django(shop)
        yield orm
        orm.close()


def test_the_default_connection_is_a_proxy_and_is_taken(default: Django) -> None:
    with transaction.atomic():
        DjangoOrder.objects.create(name="a")
        outbox.add(connection, "orders", b"a")
    assert default.shop.holds("a")


def test_outside_an_atomic_block_the_error_names_the_database(shop: Django) -> None:
    with pytest.raises(TransactionError, match=rf"transaction.atomic\(using='{shop.alias}'\)"):
        outbox.add(shop.where, "orders", b"a")


def test_an_atomic_block_of_another_database_does_not_count(default: Django, other: Django) -> None:
    with other.begin(), pytest.raises(TransactionError, match=r"transaction.atomic\(using='default'\)"):
        outbox.add(connection, "orders", b"a")


def test_a_block_that_can_only_be_rolled_back_takes_no_message(shop: Django) -> None:
    def fail() -> None:
        with transaction.atomic(using=shop.alias, savepoint=False):
            raise ValueError

    with shop.begin():
        shop.place("a")
        with pytest.raises(ValueError):
            fail()
        with pytest.raises(TransactionError, match="has failed and can only be rolled back"):
            outbox.add(shop.where, "orders", b"b")
    assert shop.shop.holds()


def test_a_connection_that_was_closed_within_the_block_takes_no_message(shop: Django) -> None:
    with shop.begin():
        shop.place("a")
        shop.where.close()
        with pytest.raises(TransactionError, match="closed or lost"):
            outbox.add(shop.where, "orders", b"b")
    assert shop.shop.holds()


def test_who_manages_transactions_himself_is_not_refused(shop: Django) -> None:
    transaction.set_autocommit(False, using=shop.alias)
    shop.place("a")
    transaction.rollback(using=shop.alias)
    shop.place("b")
    transaction.commit(using=shop.alias)
    transaction.set_autocommit(True, using=shop.alias)
    assert shop.shop.holds("b")


def test_a_row_lock_comes_before_the_message(shop: Django) -> None:
    with shop.begin():
        shop.order("entity")
    with shop.begin():
        DjangoOrder.objects.using(shop.alias).select_for_update().get(name="entity")
        outbox.add(shop.where, "orders", b"entity", key="entity")
    assert shop.shop.holds("entity")


def test_django_sees_the_statement_and_its_errors_are_django_s(shop: Django) -> None:
    with shop.begin(), CaptureQueriesContext(shop.where) as queries:
        outbox.add(shop.where, "orders", b"a")
    assert ["INSERT INTO outbox_message" in query["sql"] for query in queries] == [True]
    outbox.tables.message.drop(shop.shop.engine)
    try:
        with pytest.raises(django.db.utils.DatabaseError, match="outbox_message"), shop.begin():
            outbox.add(shop.where, "orders", b"a")
    finally:
        outbox.tables.message.create(shop.shop.engine)


def test_rows_are_those_that_a_session_writes(shop: Django) -> None:
    due = dt.datetime(2040, 1, 2, 3, 4, 5, 678901, dt.UTC)
    messages = [odd(number, id=uuid.uuid4()) for number in range(40)]
    messages += [odd(number, id=uuid.uuid4(), deliver_at=due) for number in range(12)]
    with Session(shop.shop.engine) as session:
        outbox.add_all(session, messages)
        session.commit()
    tables = (outbox.tables.message, outbox.tables.scheduled)
    expected = [rows(shop.shop, table) for table in tables]
    with shop.shop.engine.begin() as engine_connection:
        for table in tables:
            engine_connection.execute(sa.delete(table))
    with shop.begin():
        outbox.add_all(shop.where, messages)
    assert [rows(shop.shop, table) for table in tables] == expected


def test_parameters_may_be_bound_by_the_server(other: Django) -> None:
    other.where.settings_dict["OPTIONS"]["server_side_binding"] = True
    with other.begin():
        other.place("a")
        outbox.add_all(other.where, [odd(number) for number in range(20)])
        assert outbox.claim(other.where, "billing", "id")
    assert other.shop.orders() == ["a"]
    assert len(rows(other.shop, outbox.tables.message)) == 21


def test_claims_and_cancellations(shop: Django) -> None:
    id = uuid.uuid4()
    inbox = outbox.tables.inbox
    with shop.shop.engine.begin() as engine_connection:
        dead = {"consumer": "mailer", "message_id": id, "outcome": "dead", "cycle": 2}
        engine_connection.execute(inbox.insert(), dead)
    # as with DEBUG = True: SQLite's clock has % in its words
    with CaptureQueriesContext(shop.where), shop.begin():
        message = outbox.add(shop.where, "orders", b"a", deliver_at=dt.timedelta(hours=1))
        assert outbox.claim(shop.where, "billing", id)
        assert not outbox.claim(shop.where, "billing", id)
        assert not outbox.claim(shop.where, "mailer", id, cycle=1)
        assert outbox.claim(shop.where, "mailer", id, cycle=2)
        assert outbox.cancel(shop.where, message.id)
    with shop.shop.engine.connect() as engine_connection:
        times = engine_connection.scalars(sa.select(inbox.c.processed_at)).all()
    assert [abs(dt.datetime.now(dt.UTC) - time) < dt.timedelta(minutes=5) for time in times] == [True, True]


def test_the_tables_may_be_made_in_a_migration_of_django_s(shop: Django) -> None:
    theirs = Outbox(prefix="django_outbox_")
    words = shop.where.vendor
    if words == "mysql" and shop.where.mysql_is_mariadb:
        words = "mariadb"
    operation = migrations.RunSQL(theirs.ddl(words), reverse_sql="")
    try:
        with shop.where.schema_editor() as editor:
            operation.database_forwards("shop", editor, ProjectState(), ProjectState())
        with shop.shop.engine.begin() as engine_connection:
            check_schema(engine_connection, theirs.tables)
        with shop.begin():
            theirs.add(shop.where, "orders", b"a")
        assert len(rows(shop.shop, theirs.tables.message)) == 1
    finally:
        theirs.metadata.drop_all(shop.shop.engine)
