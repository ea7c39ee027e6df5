"""The usual fixture of an application's test suite: whatever a test does is rolled back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outbox.stores.engine import async_engine_for, sync_engine_for
from tests.consumer.billing import Base
from tests.services.fixtures import INSTALL_TIMEOUT
from tests.staging.conftest import send_begin

DATABASES = [
    "sqlite",
    pytest.param("postgresql", marks=pytest.mark.timeout(INSTALL_TIMEOUT)),
]
MARIADB = pytest.param("mariadb", marks=pytest.mark.timeout(INSTALL_TIMEOUT))

ON_EACH = pytest.mark.parametrize("url", [*DATABASES, MARIADB], indirect=True)
"""For tests of what databases do in their own way: transactions, locks, types. Others run on the usual two."""


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param != "sqlite":
        found: str = request.getfixturevalue(f"{request.param}_url")
    else:
        found = f"sqlite:///{tmp_path / 'test.db'}"
    engine = sync_engine_for(found, create=True)
    Base.metadata.create_all(engine)
    engine.dispose()
    return found


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    engine = sync_engine_for(url)
    if engine.dialect.name == "sqlite":
        send_begin(engine)  # what SQLAlchemy's documentation says such a fixture needs there
    yield engine
    engine.dispose()


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection:
        transaction = connection.begin()
        yield connection
        transaction.rollback()


@pytest.fixture
def session(connection: sa.Connection) -> Iterator[Session]:
    with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
        yield session


@pytest.fixture
async def async_session(url: str) -> AsyncIterator[AsyncSession]:
    engine = async_engine_for(url)
    if engine.dialect.name == "sqlite":
        send_begin(engine.sync_engine)
    async with engine.connect() as connection:
        transaction = await connection.begin()
        async with AsyncSession(bind=connection, join_transaction_mode="create_savepoint") as session:
            yield session
        await transaction.rollback()
    await engine.dispose()
