"""A database of each kind, and Alembic with our plugin in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.runtime import plugins

from outbox_migrations import alembic_plugin
from tests.migrations.project import disposing, mysql_url

# the names that pytest --on knows
POSTGRES = pytest.param("postgres", id="postgresql")
MARIA = pytest.param("maria", id="mariadb")

PLUGIN = "alembic.autogenerate.outbox"


@pytest.fixture(scope="session", autouse=True)
def plugin() -> None:
    """An editable install made before the entry point was there does not have it."""
    if PLUGIN not in plugins._all_plugins:
        plugins.Plugin.setup_plugin_from_module(alembic_plugin, PLUGIN)


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[sa.Engine]:
    with disposing(sa.create_engine(f"sqlite:///{tmp_path}/app.db")) as engine:
        yield engine


@pytest.fixture
def postgres(postgresql_url: str) -> Iterator[sa.Engine]:
    with disposing(sa.create_engine(postgresql_url.replace("postgresql:", "postgresql+psycopg:"))) as engine:
        yield engine


@pytest.fixture
def maria(mariadb_url: str) -> Iterator[sa.Engine]:
    with disposing(sa.create_engine(mysql_url(mariadb_url))) as engine:
        yield engine


@pytest.fixture(params=["sqlite", POSTGRES, MARIA])
def engine(request: pytest.FixtureRequest) -> sa.Engine:
    found: sa.Engine = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=[POSTGRES, MARIA])
def server(request: pytest.FixtureRequest) -> sa.Engine:
    found: sa.Engine = request.getfixturevalue(request.param)
    return found
