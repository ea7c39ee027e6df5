"""What a step is, and where it runs: a database, or the SQL script that Alembic writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from outbox.tables import Tables


@dataclass(frozen=True)
class Place:
    """Where steps run. ``execute`` takes one statement without parameters beside it, since a script has none; a step
    never reads."""

    tables: Tables
    dialect: str
    execute: Callable[[sa.Executable], Any]

    def record(self, version: int) -> None:
        """Note the version that the tables now have."""
        checkpoint = self.tables.checkpoint
        row = checkpoint.c.name == "schema_version"
        self.execute(sa.delete(checkpoint).where(row))
        self.execute(sa.insert(checkpoint).values(name="schema_version", value=str(version)))


@dataclass(frozen=True)
class Step:
    """From one version to the next, and back."""

    name: str
    upgrade: Callable[[Place], None]
    downgrade: Callable[[Place], None]
