"""Dead letters on each kind of database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dead_letters.graveyard import Graveyard
from tests.services.fixtures import INSTALL_TIMEOUT

DATABASES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.timeout(INSTALL_TIMEOUT))]


@pytest.fixture(params=DATABASES)
def graveyard(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Graveyard]:
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql_url")
    else:
        url = f"sqlite:///{tmp_path / 'letters.db'}"
    found = Graveyard(url)
    yield found
    found.close()
