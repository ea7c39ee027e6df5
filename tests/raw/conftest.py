"""The shop in each kind of database: made once, emptied after each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from tests.raw.shops import ASYNC, SYNC, RawShop
from tests.services import DatabaseServer
from tests.services.fixtures import INSTALL_TIMEOUT
from tests.staging.shop import Base, Order, outbox

ENGINES = {"postgresql": "postgresql+psycopg", "mariadb": "mysql+pymysql", "sqlite": "sqlite"}
USED = (Order.__table__, outbox.tables.message, outbox.tables.scheduled, outbox.tables.inbox)


@pytest.fixture(scope="session")
def postgresql_database(postgresql: DatabaseServer) -> Iterator[RawShop]:
    yield from _database("postgresql", postgresql)


@pytest.fixture(scope="session")
def mariadb_database(mariadb: DatabaseServer) -> Iterator[RawShop]:
    yield from _database("mariadb", mariadb)


@pytest.fixture(scope="session")
def sqlite_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawShop]:
    with _shop("sqlite", f"sqlite:///{tmp_path_factory.mktemp('raw') / 'shop.db'}") as shop:
        yield shop


def _database(kind: str, server: DatabaseServer) -> Iterator[RawShop]:
    url = server.create_database()
    with _shop(kind, url) as shop:
        yield shop
    server.drop_database(url)


@contextmanager
def _shop(kind: str, url: str) -> Iterator[RawShop]:
    # asked before use: another test of this process may have killed the server in between
    engine = sa.create_engine(sa.make_url(url).set(drivername=ENGINES[kind]), pool_pre_ping=True)
    Base.metadata.create_all(engine)
    yield RawShop(engine, url)
    engine.dispose()


def emptied(kind: str, request: pytest.FixtureRequest) -> Iterator[RawShop]:
    """An empty shop in a database of this kind."""
    shop: RawShop = request.getfixturevalue(f"{kind}_database")
    yield shop
    with shop.engine.begin() as connection:
        for table in USED:
            connection.execute(sa.delete(table))


@pytest.fixture
def postgresql_shop(request: pytest.FixtureRequest) -> Iterator[RawShop]:
    yield from emptied("postgresql", request)


@pytest.fixture
def mariadb_shop(request: pytest.FixtureRequest) -> Iterator[RawShop]:
    yield from emptied("mariadb", request)


@pytest.fixture
def sqlite_shop(request: pytest.FixtureRequest) -> Iterator[RawShop]:
    yield from emptied("sqlite", request)


def _of(drivers: dict[str, tuple[str, Any]]) -> list[Any]:
    return [
        pytest.param(name, marks=() if kind == "sqlite" else pytest.mark.timeout(INSTALL_TIMEOUT))
        for name, (kind, _) in drivers.items()
    ]


@pytest.fixture(params=_of(SYNC))
def driver(request: pytest.FixtureRequest) -> str:
    """Each sync driver."""
    name: str = request.param
    return name


@pytest.fixture
def shop(driver: str, request: pytest.FixtureRequest) -> Iterator[RawShop]:
    """An empty shop in the database of this driver."""
    yield from emptied(SYNC[driver][0], request)


@pytest.fixture
def connect(driver: str, shop: RawShop) -> Iterator[Callable[[], Any]]:
    """Connects to it; closed after the test."""
    made: list[Any] = []

    def connect() -> Any:
        made.append(SYNC[driver][1](shop))
        return made[-1]

    yield connect
    for connection in made:
        if getattr(connection, "open", True):  # PyMySQL, mysqlclient
            connection.close()


@pytest.fixture
def connection(connect: Callable[[], Any]) -> Any:
    return connect()


@pytest.fixture(params=_of(ASYNC))
def async_driver(request: pytest.FixtureRequest) -> str:
    """Each async driver."""
    name: str = request.param
    return name


@pytest.fixture
def async_shop(async_driver: str, request: pytest.FixtureRequest) -> Iterator[RawShop]:
    """An empty shop in the database of this driver."""
    yield from emptied(ASYNC[async_driver][0], request)


@pytest.fixture
async def async_connection(async_driver: str, async_shop: RawShop) -> AsyncIterator[Any]:
    connection = await ASYNC[async_driver][1](async_shop)
    yield connection
    closed = connection.close()
    if closed is not None:
        await closed
