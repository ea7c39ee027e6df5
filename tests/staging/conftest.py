"""The shop in each kind of database: what holds in one must hold in all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.services import MariadbServer, PostgresqlServer
from tests.services.fixtures import INSTALL_TIMEOUT
from tests.services.waiting import wait_until
from tests.staging.shop import TABLES, Base, Shop

SERVERS = [
    pytest.param("postgresql", marks=pytest.mark.timeout(INSTALL_TIMEOUT)),
    pytest.param("mariadb", marks=pytest.mark.timeout(INSTALL_TIMEOUT)),
]
DATABASES = ["sqlite", "sqlite with BEGIN", *SERVERS]


class Lent:
    """A server's database that is lent to one test after the other, and emptied in between: to create one takes longer
    than most of these tests. Another one where a test left more in it than rows."""

    def __init__(self, server: PostgresqlServer | MariadbServer, tables: Sequence[sa.Table] = TABLES) -> None:
        self.server = server
        self.tables = tables
        self.engine: sa.Engine | None = None

    def lend(self) -> Iterator[str]:
        if self.engine is None:
            self.engine = server_engine(self.server.create_database(), isolation_level="AUTOCOMMIT")
            for table in self.tables:
                table.create(self.engine)
        yield self.url
        try:
            with self.engine.connect() as connection:
                as_new = _empty(connection, self.tables)
        except sa.exc.OperationalError:  # waited for a transaction that was left prepared
            as_new = False
        if not as_new:
            self.drop()

    @property
    def url(self) -> str:
        assert self.engine is not None
        return self.engine.url.set(drivername=self.engine.dialect.name).render_as_string(hide_password=False)

    def drop(self) -> None:
        if self.engine is not None:
            self.engine.dispose()
            self.server.drop_database(self.url)
            self.engine = None


@pytest.fixture(scope="session")
def postgresql_lent(postgresql: PostgresqlServer) -> Iterator[Lent]:
    lent = Lent(postgresql)
    yield lent
    lent.drop()


@pytest.fixture
def postgresql_shop_url(postgresql_lent: Lent) -> Iterator[str]:
    yield from postgresql_lent.lend()


@pytest.fixture
def postgresql_shop(postgresql_shop_url: str) -> Iterator[Shop]:
    """The shop in PostgreSQL, for what only that has."""
    engine = postgresql_engine(postgresql_shop_url)
    yield Shop(engine)
    engine.dispose()


@pytest.fixture(scope="session")
def mariadb_lent(mariadb: MariadbServer) -> Iterator[Lent]:
    lent = Lent(mariadb)
    yield lent
    lent.drop()


@pytest.fixture
def mariadb_shop_url(mariadb_lent: Lent) -> Iterator[str]:
    yield from mariadb_lent.lend()


@pytest.fixture
def mariadb_shop(mariadb_shop_url: str) -> Iterator[Shop]:
    """The shop in MariaDB, for what only that has."""
    engine = mariadb_engine(mariadb_shop_url)
    yield Shop(engine)
    engine.dispose()


@pytest.fixture(params=SERVERS)
def server_shop(request: pytest.FixtureRequest) -> Shop:
    """The shop in each database server, for what SQLite does not have."""
    shop: Shop = request.getfixturevalue(f"{request.param}_shop")
    return shop


@pytest.fixture(params=DATABASES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    """An engine for an empty shop."""
    if request.param in ("postgresql", "mariadb"):
        yield request.getfixturevalue(f"{request.param}_shop").engine
        return
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    if request.param == "sqlite with BEGIN":
        send_begin(engine)
    Base.metadata.create_all(engine, tables=TABLES)
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
        Base.metadata.create_all(engine, tables=TABLES)
    yield Shop(engines[0]), Shop(engines[1])
    for engine in engines:
        engine.dispose()


def postgresql_engine(url: str | sa.URL, **options: Any) -> sa.Engine:
    return sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), **options)


def mariadb_engine(url: str | sa.URL, **options: Any) -> sa.Engine:
    return sa.create_engine(sa.make_url(url).set(drivername="mysql+pymysql"), **options)


def server_engine(url: str | sa.URL, **options: Any) -> sa.Engine:
    backend = sa.make_url(url).get_backend_name()
    return (postgresql_engine if backend == "postgresql" else mariadb_engine)(url, **options)


def send_begin(engine: sa.Engine, begin: str = "BEGIN") -> None:
    """The recipe of SQLAlchemy's documentation for savepoints on SQLite: the driver sends no BEGIN, we do."""

    @sa.event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def send(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)


# ---------------------------------------------------------------- a database that is lent again

POSTGRESQL = {
    "others": "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
    "end": "SELECT pg_terminate_backend({})",
    "patience": "SET lock_timeout = '3s'",
    # a test's own tables, in any schema
    "more": "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE relkind = 'r'"
    " AND nspname <> 'information_schema' AND nspname NOT LIKE 'pg_%%'",
    "empty": "TRUNCATE {} RESTART IDENTITY",
}
MARIADB = {
    "others": "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()",
    "end": "KILL {}",
    "patience": "SET lock_wait_timeout = 3, innodb_lock_wait_timeout = 3",
    "more": "SELECT count(*) FROM information_schema.tables WHERE table_schema = database()",
    "empty": "TRUNCATE {}",
}


def _empty(connection: sa.Connection, tables: Sequence[sa.Table]) -> bool:
    """Make the database as it was when it was new; False where that takes more than removing rows."""
    sql = POSTGRESQL if connection.dialect.name == "postgresql" else MARIADB

    def nobody_else() -> bool:
        others = connection.exec_driver_sql(sql["others"]).scalars().all()
        for id in others:
            with suppress(sa.exc.DBAPIError):  # gone by itself
                connection.exec_driver_sql(sql["end"].format(id))
        return not others

    assert wait_until(nobody_else, 10)
    connection.exec_driver_sql(sql["patience"])
    names = [table.name for table in tables]
    found = set(sa.inspect(connection).get_table_names())
    if found != set(names) or connection.exec_driver_sql(sql["more"]).scalar() != len(names):
        return False
    used = [table.name for table in tables if _is_used(connection, table)]
    for statement in [", ".join(used)] if sql is POSTGRESQL and used else used:
        connection.exec_driver_sql(sql["empty"].format(statement))
    return True


def _is_used(connection: sa.Connection, table: sa.Table) -> bool:
    """Also by a row that is gone: the next one has to get the first position."""
    return table.name in ("shop_order", "outbox_message") or bool(connection.execute(sa.select(table).limit(1)).first())
