"""Databases with outbox tables for the command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from outbox import Outbox
from outbox_migrations import migrate


@dataclass
class Shop:
    """A database with our tables in it. ``url`` is what the command line gets."""

    url: str
    engine: sa.Engine
    outbox: Outbox

    def execute(self, statement: str | sa.Executable) -> None:
        with self.engine.begin() as connection:
            connection.execute(sa.text(statement) if isinstance(statement, str) else statement)


def _shop(url: str) -> Iterator[Shop]:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        migrate(connection)
    yield Shop(url, engine, Outbox())
    engine.dispose()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Shop]:
    yield from _shop(f"sqlite:///{tmp_path}/shop.db")


@pytest.fixture
def postgres(postgresql_url: str) -> Iterator[Shop]:
    yield from _shop(postgresql_url)


@pytest.fixture(params=["sqlite", "postgres"])
def shop(request: pytest.FixtureRequest) -> Shop:
    found: Shop = request.getfixturevalue(request.param)
    return found
