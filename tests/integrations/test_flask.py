"""`outbox_flask`: the outbox on ``db``, messages that commit with ``db.session``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from outbox import ConfigurationError, event
from outbox_flask import Outbox


@event("orders", type="order.placed", key="order_id")
@dataclass
class OrderPlaced:
    order_id: int


@dataclass
class Shop:
    """An app made by a factory, with a second database."""

    app: Flask
    db: SQLAlchemy
    outbox: Outbox
    Order: Any
    Visit: Any

    def messages(self) -> list[tuple[str, str | None]]:
        """Topic and key of what is committed."""
        table = self.outbox.tables.message
        with self.outbox.engine.connect() as connection:
            query = sa.select(table.c.topic, table.c.key).order_by(table.c.position)
            return [(topic, key) for topic, key in connection.execute(query)]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/shop.db"
    found: str = request.getfixturevalue("postgresql_url")
    return found.replace("postgresql:", "postgresql+psycopg:")


def make(url: str, tmp_path: Path, bind_key: str | None = None) -> Iterator[Shop]:
    db = SQLAlchemy()
    outbox = Outbox(db, bind_key=bind_key)

    class Order(db.Model):  # type: ignore[name-defined,misc]
        id = sa.Column(sa.Integer, primary_key=True)

    class Visit(db.Model):  # type: ignore[name-defined,misc]
        __bind_key__ = "visits"
        id = sa.Column(sa.Integer, primary_key=True)

    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_BINDS"] = {"visits": f"sqlite:///{tmp_path}/visits.db"}
    db.init_app(app)
    outbox.init_app(app)
    with app.app_context():
        db.create_all()
    yield Shop(app, db, outbox, Order, Visit)
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()


@pytest.fixture
def shop(url: str, tmp_path: Path) -> Iterator[Shop]:
    yield from make(url, tmp_path)


@pytest.fixture
def visits(url: str, tmp_path: Path) -> Iterator[Shop]:
    """The outbox is in the second database."""
    yield from make(url, tmp_path, bind_key="visits")


def test_a_message_commits_with_the_order_in_db_session(shop: Shop) -> None:
    with shop.app.app_context():
        order = shop.Order()
        shop.db.session.add(order)
        shop.db.session.flush()
        shop.outbox.add("orders", {"id": order.id}, key=order.id)
        shop.outbox.add(OrderPlaced(order.id))
        assert shop.messages() == []
        shop.db.session.commit()
    assert shop.messages() == [("orders", "1"), ("orders", "1")]


def test_a_request_that_fails_leaves_neither(shop: Shop) -> None:
    @shop.app.post("/orders")
    def place() -> str:
        shop.db.session.add(shop.Order())
        shop.outbox.add("orders", {})
        raise ZeroDivisionError

    assert shop.app.test_client().post("/orders").status_code == 500
    assert shop.messages() == []


def test_a_session_may_still_be_given(shop: Shop) -> None:
    with shop.app.app_context():
        shop.outbox.add(shop.db.session, "a", {})
        shop.outbox.add(shop.db.session, OrderPlaced(1))
        shop.outbox.add(shop.db.session(), topic="b", payload={})
        shop.outbox.add(where=shop.db.session, topic="c", payload={})
        with sa.orm.Session(shop.outbox.engine) as other, other.begin():
            shop.outbox.add(other, "other", {})
        assert shop.messages() == [("other", None)]
        shop.db.session.commit()
    assert [topic for topic, _ in shop.messages()] == ["other", "a", "orders", "b", "c"]


def test_what_was_forgotten_is_said_as_without_flask(shop: Shop) -> None:
    with shop.app.app_context():
        for arguments, words in (
            (("orders",), "the payload is missing"),
            ((OrderPlaced,), "this is the class itself"),
            ((object(),), "its class is not declared"),
            ((object(), "orders", {}), "object is no session or connection"),
        ):
            with pytest.raises(TypeError, match=words):
                shop.outbox.add(*arguments)


def test_a_message_never_commits_in_another_database_than_the_data(shop: Shop) -> None:
    """It goes where the data goes, and there are no outbox tables there."""
    with shop.app.app_context():
        shop.db.session.add(shop.Visit())
        shop.outbox.add("visits", {})
        with pytest.raises(sa.exc.OperationalError, match="no such table: outbox_message"):
            shop.db.session.commit()
        shop.db.session.rollback()
        assert shop.db.session.scalars(sa.select(shop.Visit)).all() == []
    assert shop.messages() == []


def test_an_outbox_with_a_bind_key_takes_messages_of_that_database(visits: Shop) -> None:
    with visits.app.app_context():
        assert "outbox_message" not in sa.inspect(visits.db.engine).get_table_names()
        visits.db.session.add(visits.Visit())
        visits.outbox.add("visits", {})
        visits.db.session.commit()
    assert visits.messages() == [("visits", None)]


def test_an_outbox_takes_a_db_and_nothing_else() -> None:
    with pytest.raises(ConfigurationError, match=r"takes the SQLAlchemy of your app \(db\), not a MetaData"):
        Outbox(sa.MetaData())  # type: ignore[arg-type]


def test_an_app_has_one_outbox_of_a_bind_key(shop: Shop) -> None:
    shop.outbox.init_app(shop.app)
    with pytest.raises(ConfigurationError, match="has another outbox already"):
        Outbox(shop.db, prefix="other_").init_app(shop.app)
    Outbox(shop.db, bind_key="visits").init_app(shop.app)


def test_an_outbox_without_an_app_says_what_is_missing() -> None:
    with pytest.raises(ConfigurationError, match=r"call outbox.init_app\(app\)"):
        _ = Outbox(SQLAlchemy()).engine


def test_a_bind_key_that_is_not_configured_is_named(shop: Shop) -> None:
    other = Outbox(shop.db, bind_key="nowhere")
    other.init_app(shop.app)
    with pytest.raises(ConfigurationError, match="bind key 'nowhere' is not in the app's SQLALCHEMY_BINDS"):
        _ = other.engine


def test_two_apps_of_one_factory_each_have_their_own_database(shop: Shop, tmp_path: Path) -> None:
    second = Flask("second")
    second.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/second.db"
    second.config["SQLALCHEMY_BINDS"] = {"visits": f"sqlite:///{tmp_path}/visits2.db"}
    shop.db.init_app(second)
    shop.outbox.init_app(second)
    with shop.app.app_context():
        assert shop.outbox.engine is shop.db.engine
    with second.app_context():
        assert shop.outbox.engine is shop.db.engine
        second_engines = list(shop.db.engines.values())
    assert shop.outbox.engine in second_engines
    for engine in second_engines:
        engine.dispose()
