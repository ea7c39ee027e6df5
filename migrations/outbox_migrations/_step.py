"""What a step is: from one version of the tables to the next, as a list of operations, and back.

What was released is never changed, only added to. A step never reads, since a script cannot; every operation may be run
again, since a step may be cut off half-way (MySQL commits each statement). And a step adds: what version n - 1 reads and
writes stays as it is in version n, so that its processes go on while those of version n are rolled out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from outbox_migrations._operations import Operation


@dataclass(frozen=True)
class Place:
    """Where a step is to run. ``dialect`` is the database's name, as SQLAlchemy calls it."""

    dialect: str
    schema: str | None
    prefix: str


@dataclass(frozen=True)
class Step:
    """From one version to the next, and back."""

    name: str
    upgrade: Callable[[Place], Iterator[Operation]]
    downgrade: Callable[[Place], Iterator[Operation]]
