"""An order and its message commit together, whatever ORM writes the order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from outbox import TransactionError
from tests.raw import orms
from tests.raw.conftest import emptied
from tests.raw.shops import SYNC
from tests.services.fixtures import INSTALL_TIMEOUT

pytestmark = pytest.mark.timeout(INSTALL_TIMEOUT)

CASES = [
    (orms.Django, "sqlite"),
    (orms.Django, "postgresql"),
    (orms.Peewee, "sqlite"),
    (orms.Peewee, "postgresql"),
    (orms.Peewee, "mariadb"),
    (orms.Pony, "sqlite"),
    (orms.Pony, "postgresql"),
    (orms.Sqlmodel, "sqlite"),
    (orms.Sqlmodel, "postgresql"),
    (orms.FlaskSqlalchemy, "sqlite"),
    (orms.FlaskSqlalchemy, "postgresql"),
]
if "mysqlclient" in SYNC:
    CASES.append((orms.Django, "mariadb"))
NESTING = [case for case in CASES if case[0].has_savepoints]
RAW = [case for case in CASES if case[0] in (orms.Django, orms.Peewee)]


def each(cases: list[tuple[type[orms.Orm], str]]) -> pytest.MarkDecorator:
    names = [f"{kind.__name__}-{database}" for kind, database in cases]
    return pytest.mark.parametrize("orm", cases, ids=names, indirect=True)


class Wrong(Exception):
    pass


@pytest.fixture
def orm(request: pytest.FixtureRequest) -> Iterator[orms.Orm]:
    kind, database = request.param
    for shop in emptied(database, request):
        orm = kind(shop)
        yield orm
        orm.close()


@each(CASES)
def test_an_order_and_its_message_commit_together(orm: orms.Orm) -> None:
    with orm.begin():
        orm.place("a")
        assert orm.shop.engine.dialect.name == "sqlite" or orm.shop.holds()
    with orm.begin():
        orm.place("b")
    assert orm.shop.holds("a", "b")


@each(CASES)
def test_a_rollback_takes_both(orm: orms.Orm) -> None:
    def fail() -> None:
        with orm.begin():
            orm.place("a")
            raise Wrong

    with pytest.raises(Wrong):
        fail()
    with orm.begin():
        orm.place("b")
    assert orm.shop.holds("b")


@each(NESTING)
def test_a_nested_block_that_is_rolled_back_takes_exactly_its_own(orm: orms.Orm) -> None:
    def fail() -> None:
        with orm.begin_nested():
            orm.place("b")
            raise Wrong

    with orm.begin():
        orm.place("a")
        with pytest.raises(Wrong):
            fail()
        orm.place("c")
        with orm.begin_nested():
            orm.place("d")
    assert orm.shop.holds("a", "c", "d")


@each(RAW)
def test_a_message_outside_a_transaction_is_refused(orm: orms.Orm) -> None:
    if isinstance(orm, orms.Peewee):
        orm.db.connect()
    with pytest.raises(TransactionError, match="autocommit mode and in no transaction"):
        orm.outbox.add(orm.where, "orders", b"a")
    assert orm.shop.holds()
