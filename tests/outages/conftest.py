"""Databases on a server, and the cutter before each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.outages.cutter import Cutter, cutting
from tests.relay.conftest import mariadb_template, on_mariadb, on_postgresql, template
from tests.relay.database import Database

__all__ = ["mariadb_template", "on_mariadb", "on_postgresql", "template"]

SERVERS = ["postgresql", "mariadb"]


@pytest.fixture(params=SERVERS)
def database(request: pytest.FixtureRequest) -> Database:
    found: Database = request.getfixturevalue(f"on_{request.param}")
    return found


@pytest.fixture
def cutter(database: Database) -> Iterator[Cutter]:
    with cutting(database.url) as found:
        yield found
