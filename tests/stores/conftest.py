"""The databases of the relay's tests."""

from __future__ import annotations

from tests.relay.conftest import database, on_postgresql, on_sqlite, template

__all__ = ["database", "on_postgresql", "on_sqlite", "template"]
