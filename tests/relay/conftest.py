"""Each test of the relay has a database of its own; most run over SQLite and over PostgreSQL, some over MariaDB too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.relay import _relay
from tests.relay.database import Database
from tests.services import MariadbServer, PostgresqlServer

ON_EACH = pytest.mark.parametrize("database", ["sqlite", "postgresql", "mariadb"], indirect=True)
"""For tests of what databases do in their own way: transactions, locks, types. Others run on the usual two."""


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries are looked for more often, so that a test of them takes no quarter of a second for each."""
    monkeypatch.setattr(_relay, "DUE", 0.02)


@pytest.fixture(scope="session")
def template(postgresql: PostgresqlServer) -> Iterator[str]:
    """A database with the tables, to be copied: that takes a tenth of the time."""
    url = postgresql.create_database()
    made = Database(url).create()
    made.close()
    yield url
    postgresql.drop_database(url)


@pytest.fixture
def on_postgresql(postgresql: PostgresqlServer, template: str) -> Iterator[Database]:
    found = Database(postgresql.create_database(template=template))
    yield found
    found.close()
    postgresql.drop_database(found.url)


@pytest.fixture(scope="session")
def mariadb_template(mariadb: MariadbServer) -> Iterator[str]:
    url = mariadb.create_database()
    made = Database(url).create()
    made.close()
    yield url
    mariadb.drop_database(url)


@pytest.fixture
def on_mariadb(mariadb: MariadbServer, mariadb_template: str) -> Iterator[Database]:
    found = Database(mariadb.create_database(template=mariadb_template))
    yield found
    found.close()
    mariadb.drop_database(found.url)


@pytest.fixture
def on_sqlite(tmp_path: Path) -> Iterator[Database]:
    found = Database(f"sqlite:///{tmp_path / 'outbox.db'}").create()
    yield found
    found.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    found: Database = request.getfixturevalue(f"on_{request.param}")
    return found
