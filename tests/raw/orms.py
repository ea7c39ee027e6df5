"""How each ORM that has no SQLAlchemy session, and two that have, places an order in the shop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, ClassVar

import django
import flask
import flask_sqlalchemy
import peewee
import pony.orm
import sqlalchemy as sa
import sqlmodel
from django.conf import settings
from django.db import connections, models, transaction

from outbox import Outbox
from tests.raw.shops import RawShop
from tests.staging.shop import outbox


class Orm:
    """One ORM at one database. ``where`` is what `Outbox.add` is given."""

    outbox: Outbox = outbox
    has_savepoints = True

    def __init__(self, shop: RawShop) -> None:
        self.shop = shop

    @property
    def where(self) -> Any:
        raise NotImplementedError

    def order(self, name: str) -> None:
        raise NotImplementedError

    def begin(self) -> AbstractContextManager[Any]:
        """A transaction, rolled back by an exception."""
        raise NotImplementedError

    def begin_nested(self) -> AbstractContextManager[Any]:
        return self.begin()

    def place(self, name: str) -> None:
        self.order(name)
        self.outbox.add(self.where, "orders", name.encode(), key=name)

    def close(self) -> None:
        pass


# ---------------------------------------------------------------- Django


settings.configure(DEFAULT_AUTO_FIELD="django.db.models.AutoField")
django.setup()


class DjangoOrder(models.Model):
    name = models.TextField(unique=True)

    class Meta:
        app_label = "shop"
        managed = False
        db_table = "shop_order"


class Django(Orm):
    """The shop in SQLite is its default database, that of a server another one."""

    databases: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}  # which has to be there

    def __init__(self, shop: RawShop) -> None:
        super().__init__(shop)
        url = shop.url
        if shop.engine.dialect.name == "sqlite":
            self.alias = "default"
            self.databases[self.alias] = {"ENGINE": "django.db.backends.sqlite3", "NAME": url.database}
        else:
            self.alias = shop.engine.dialect.name
            place = {"NAME": url.database, "USER": url.username, "HOST": url.host, "PORT": url.port}
            self.databases[self.alias] = {"ENGINE": f"django.db.backends.{self.alias}", **place}
        with suppress(AttributeError):
            del connections[self.alias]  # one that was made before it had settings
        connections.settings = connections.configure_settings(dict(self.databases))

    @property
    def where(self) -> Any:
        return connections[self.alias]

    def order(self, name: str) -> None:
        DjangoOrder.objects.using(self.alias).create(name=name)

    def begin(self) -> AbstractContextManager[Any]:
        return transaction.atomic(using=self.alias)

    def close(self) -> None:
        connections[self.alias].close()
        del connections[self.alias]


# ---------------------------------------------------------------- Peewee


class Peewee(Orm):
    def __init__(self, shop: RawShop) -> None:
        super().__init__(shop)
        url = shop.url
        if shop.engine.dialect.name == "sqlite":
            self.db = peewee.SqliteDatabase(url.database)
        else:
            kind = {"postgresql": peewee.PostgresqlDatabase, "mysql": peewee.MySQLDatabase}[shop.engine.dialect.name]
            self.db = kind(url.database, user=url.username, host=url.host, port=url.port)

        class Order(peewee.Model):
            name = peewee.TextField()

            class Meta:
                database = self.db
                table_name = "shop_order"

        self.Order = Order

    @property
    def where(self) -> Any:
        return self.db.connection()

    def order(self, name: str) -> None:
        self.Order.create(name=name)

    def begin(self) -> Any:
        return self.db.atomic()

    def close(self) -> None:
        self.db.close()


# ---------------------------------------------------------------- Pony


class Pony(Orm):
    has_savepoints = False

    def __init__(self, shop: RawShop) -> None:
        super().__init__(shop)
        self.db = db = pony.orm.Database()
        url = shop.url
        if shop.engine.dialect.name == "sqlite":
            db.bind(provider="sqlite", filename=url.database)
        else:
            db.bind(provider="postgres", dsn=shop.dsn)

        class Order(db.Entity):  # type: ignore[name-defined, misc]
            _table_ = "shop_order"
            name = pony.orm.Required(str)

        self.Order = Order
        db.generate_mapping()

    @property
    def where(self) -> Any:
        return self.db.get_connection()

    def order(self, name: str) -> None:
        self.Order(name=name)
        pony.orm.flush()  # it would write at the commit, after the message

    def begin(self) -> Any:
        return pony.orm.db_session()

    def close(self) -> None:
        self.db.disconnect()


# ---------------------------------------------------------------- SQLModel


class SqlmodelOrder(sqlmodel.SQLModel, table=True):
    __tablename__ = "shop_order"

    id: int | None = sqlmodel.Field(default=None, primary_key=True)
    name: str


class Sqlmodel(Orm):
    outbox = Outbox(sqlmodel.SQLModel.metadata)

    @property
    def where(self) -> Any:
        return self.session

    def order(self, name: str) -> None:
        self.session.add(SqlmodelOrder(name=name))

    @contextmanager
    def begin(self) -> Iterator[None]:
        with sqlmodel.Session(self.shop.engine) as self.session, self.session.begin():
            yield

    def begin_nested(self) -> AbstractContextManager[Any]:
        return self.session.begin_nested()


# ---------------------------------------------------------------- Flask-SQLAlchemy


class FlaskSqlalchemy(Orm):
    def __init__(self, shop: RawShop) -> None:
        super().__init__(shop)
        self.db = db = flask_sqlalchemy.SQLAlchemy()
        self.outbox = Outbox(db.metadata)
        self.app = flask.Flask("shop")
        self.app.config["SQLALCHEMY_DATABASE_URI"] = shop.engine.url
        db.init_app(self.app)

        class Order(db.Model):  # type: ignore[name-defined, misc]
            __tablename__ = "shop_order"
            id = sa.Column(sa.Integer, primary_key=True)
            name = sa.Column(sa.Text)

        self.Order = Order

    @property
    def where(self) -> Any:
        return self.db.session

    def order(self, name: str) -> None:
        self.db.session.add(self.Order(name=name))

    @contextmanager
    def begin(self) -> Iterator[None]:
        with self.app.app_context():
            yield
            self.db.session.commit()

    def begin_nested(self) -> AbstractContextManager[Any]:
        return self.db.session.begin_nested()  # type: ignore[no-any-return]

    def close(self) -> None:
        with self.app.app_context():
            self.db.engine.dispose()
