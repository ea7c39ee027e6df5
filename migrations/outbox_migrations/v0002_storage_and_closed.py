"""Version 2: how PostgreSQL keeps the tables that rows only pass through (the reasons are in `outbox.storage`), and an index
by which cleanup finds the dead letters that are closed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import sqlalchemy as sa

from outbox.dialects import UtcDateTime
from outbox_migrations._operations import Operation, add_index, drop_index, reset_storage, set_storage
from outbox_migrations._step import Place, Step

# Frozen, as everything in a step: what `outbox.storage` said when this was released.
_QUEUE: Final[dict[str, int | float]] = {
    "autovacuum_vacuum_threshold": 1000,
    "autovacuum_vacuum_scale_factor": 0,
    "autovacuum_vacuum_insert_threshold": -1,
    "autovacuum_vacuum_cost_delay": 0,
}
_WAITING: Final[dict[str, int | float]] = {"autovacuum_vacuum_threshold": 1000, "autovacuum_vacuum_scale_factor": 0.01}
_LOG: Final[dict[str, int | float]] = {
    "autovacuum_vacuum_threshold": 10_000,
    "autovacuum_vacuum_scale_factor": 0.01,
    "autovacuum_vacuum_insert_threshold": 10_000,
    "autovacuum_vacuum_insert_scale_factor": 0.05,
}
_STORAGE: Final[dict[str, dict[str, int | float]]] = {
    "message": {**_QUEUE, **{f"toast.{name}": value for name, value in _QUEUE.items()}},
    **{
        name: {**_WAITING, **{f"toast.{setting}": value for setting, value in _WAITING.items()}}
        for name in ("scheduled", "parked", "attempt")
    },
    "inbox": _LOG,
    "sent": _LOG,
}


def _upgrade(place: Place) -> Iterator[Operation]:
    yield add_index(_closed_at(place))  # first: of a script, all else is one transaction then
    if place.dialect == "postgresql":
        for name, settings in _STORAGE.items():
            yield set_storage(_table(place, name), settings)


def _downgrade(place: Place) -> Iterator[Operation]:
    if place.dialect == "postgresql":
        for name, settings in _STORAGE.items():
            yield reset_storage(_table(place, name), settings)
    yield drop_index(_closed_at(place))


def _table(place: Place, name: str, *columns: sa.Column[object]) -> sa.Table:
    return sa.Table(place.prefix + name, sa.MetaData(), *columns, schema=place.schema)


def _closed_at(place: Place) -> sa.Index:
    table = _table(place, "dead_letter", sa.Column("closed_at", UtcDateTime()))
    return sa.Index(f"{place.prefix}dead_letter_closed_at_idx", table.c.closed_at)


STEP: Final = Step("0002_storage_and_closed", _upgrade, _downgrade)
