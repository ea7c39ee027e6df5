"""Dead letters on each kind of database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dead_letters.graveyard import Graveyard
from tests.services.fixtures import INSTALL_TIMEOUT

DATABASES = [
    "sqlite",
    pytest.param("postgresql", marks=pytest.mark.timeout(INSTALL_TIMEOUT)),
]
MARIADB = pytest.param("mariadb", marks=pytest.mark.timeout(INSTALL_TIMEOUT))

ON_EACH = pytest.mark.parametrize("graveyard", [*DATABASES, MARIADB], indirect=True)
"""For tests of what databases do in their own way: transactions, locks, types. Others run on the usual two."""


@pytest.fixture(params=DATABASES)
def graveyard(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Graveyard]:
    if request.param != "sqlite":
        url = request.getfixturevalue(f"{request.param}_url")
    else:
        url = f"sqlite:///{tmp_path / 'letters.db'}"
    found = Graveyard(url)
    yield found
    found.close()
