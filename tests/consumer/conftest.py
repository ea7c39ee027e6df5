"""The billing service on each kind of database, with a broker in memory."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.transports import memory
from tests.consumer.billing import Billing
from tests.services.fixtures import INSTALL_TIMEOUT

DATABASES = [
    "sqlite",
    pytest.param("postgresql", marks=pytest.mark.timeout(INSTALL_TIMEOUT)),
]
MARIADB = pytest.param("mariadb", marks=pytest.mark.timeout(INSTALL_TIMEOUT))

ON_EACH = pytest.mark.parametrize("database_url", [*DATABASES, MARIADB], indirect=True)
"""For tests of what databases do in their own way: transactions, locks, types. Others run on the usual two."""


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param != "sqlite":
        url: str = request.getfixturevalue(f"{request.param}_url")
        return url
    return f"sqlite:///{tmp_path / 'billing.db'}"


@pytest.fixture
def broker() -> Iterator[str]:
    """The URL of a broker in this process that no other test has."""
    name = f"consumer-{uuid.uuid4().hex}"
    yield f"memory://{name}"
    memory.forget(name)


@pytest.fixture
def billing(database_url: str, broker: str) -> Iterator[Billing]:
    service = Billing(database_url, broker)
    yield service
    service.close()


@pytest.fixture
def sqlite_billing(tmp_path: Path, broker: str) -> Iterator[Billing]:
    """On SQLite, for what does not depend on the database."""
    service = Billing(f"sqlite:///{tmp_path / 'billing.db'}", broker)
    yield service
    service.close()


@pytest.fixture
def postgresql_billing(postgresql_url: str, broker: str) -> Iterator[Billing]:
    """On PostgreSQL, for what SQLite does not have."""
    service = Billing(postgresql_url, broker)
    yield service
    service.close()
