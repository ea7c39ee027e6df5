"""The shop in each kind of database: what holds in one must hold in all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.services import PostgresqlServer
from tests.services.fixtures import INSTALL_TIMEOUT
from tests.staging.shop import Base, Shop

DATABASES = [
    "sqlite",
    "sqlite with BEGIN",
    pytest.param("postgresql", marks=pytest.mark.timeout(INSTALL_TIMEOUT)),
]


@pytest.fixture(scope="session")
def empty_shop(postgresql: PostgresqlServer) -> Iterator[str]:
    """A PostgreSQL database with the tables, to be copied: that costs a third of creating them."""
    url = postgresql.create_database()
    engine = postgresql_engine(url)
    Base.metadata.create_all(engine)
    engine.dispose()
    yield url
    postgresql.drop_database(url)


@pytest.fixture
def postgresql_shop_url(postgresql: PostgresqlServer, empty_shop: str) -> Iterator[str]:
    url = postgresql.create_database(empty_shop)
    yield url
    postgresql.drop_database(url)


@pytest.fixture
def postgresql_shop(postgresql_shop_url: str) -> Iterator[Shop]:
    """The shop in PostgreSQL, for what SQLite does not have."""
    engine = postgresql_engine(postgresql_shop_url)
    yield Shop(engine)
    engine.dispose()


@pytest.fixture(params=DATABASES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    """An engine for an empty shop."""
    if request.param == "postgresql":
        yield request.getfixturevalue("postgresql_shop").engine
        return
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    if request.param == "sqlite with BEGIN":
        send_begin(engine)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def shop(engine: sa.Engine) -> Shop:
    return Shop(engine)


@pytest.fixture
def two_shops(tmp_path: Path) -> Iterator[tuple[Shop, Shop]]:
    """Two databases with the same tables."""
    engines = [sa.create_engine(f"sqlite:///{tmp_path / name}.db") for name in ("first", "second")]
    for engine in engines:
        Base.metadata.create_all(engine)
    yield Shop(engines[0]), Shop(engines[1])
    for engine in engines:
        engine.dispose()


def postgresql_engine(url: str | sa.URL, **options: Any) -> sa.Engine:
    return sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), **options)


def send_begin(engine: sa.Engine) -> None:
    """The recipe of SQLAlchemy's documentation for savepoints on SQLite: the driver sends no BEGIN, we do."""

    @sa.event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")
