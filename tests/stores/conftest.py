"""The databases of the relay's tests."""

from __future__ import annotations

from tests.relay.conftest import database, mariadb_template, on_mariadb, on_postgresql, on_sqlite, template

__all__ = ["database", "mariadb_template", "on_mariadb", "on_postgresql", "on_sqlite", "template"]
