"""The databases of the relay's tests, and a cleanup that does not rest between its batches."""

from __future__ import annotations

import time
from typing import Any

import pytest

from outbox.cleanup import _cleanup
from tests.relay.conftest import database, mariadb_template, on_mariadb, on_postgresql, on_sqlite, template


class _Hurried:
    monotonic = staticmethod(time.monotonic)

    @staticmethod
    def sleep(seconds: float) -> Any:
        """No time passes."""


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cleanup, "time", _Hurried)


__all__ = ["database", "mariadb_template", "on_mariadb", "on_postgresql", "on_sqlite", "template"]
