"""How PostgreSQL keeps our tables: the settings that ``create_all`` and the migrations put on them.

The tables that rows only pass through are near empty by themselves, if vacuum comes often enough: what was deleted lies
at the front of the index, where every read begins. PostgreSQL's defaults wait for a fifth of the table as it was at the
last count: after a backlog of ten million that is two million dead rows. So here the number is fixed (or a hundredth, where
a table may be large for long). A value that a DBA has set otherwise is not looked at again: no check asks for these.

Not set, on purpose: ``vacuum_truncate`` (a backlog's file shrinks again; vacuum gives its short lock up as soon as somebody
waits for it), ``fillfactor`` (rows of these tables are not updated in place), and analyze (every statement of the hot path
reads an index in its order, whatever the statistics say).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

Settings: TypeAlias = Mapping[str, int | float]

# Insert and delete only, and the rows live for moments. Not to be counted by inserts (-1): a vacuum that finds only rows that
# are about to be deleted has done nothing. Without pauses (cost_delay 0): while it sleeps, more rows die than it cleans.
_QUEUE: Final[Settings] = {
    "autovacuum_vacuum_threshold": 1000,
    "autovacuum_vacuum_scale_factor": 0,
    "autovacuum_vacuum_insert_threshold": -1,
    "autovacuum_vacuum_cost_delay": 0,
}

# Mostly empty, and large when something is wrong or far away: a vacuum reads the whole of every index, so not at every
# thousandth row of ten million.
_WAITING: Final[Settings] = {
    "autovacuum_vacuum_threshold": 1000,
    "autovacuum_vacuum_scale_factor": 0.01,
}

# Large, insert-mostly, removed by age. Counted by inserts too, so that what is to be frozen comes in small portions.
_LOG: Final[Settings] = {
    "autovacuum_vacuum_threshold": 10_000,
    "autovacuum_vacuum_scale_factor": 0.01,
    "autovacuum_vacuum_insert_threshold": 10_000,
    "autovacuum_vacuum_insert_scale_factor": 0.05,
}


def _with_toast(settings: Settings) -> Settings:
    """Payloads of more than 2 kB lie beside the table, in pieces of 2 kB that die with their row. Said again for them:
    whoever sets one ``toast.`` value later would otherwise unset all that they inherit."""
    return {**settings, **{f"toast.{name}": value for name, value in settings.items()}}


STORAGE: Final[Mapping[str, Settings]] = {
    "message": _with_toast(_QUEUE),
    "scheduled": _with_toast(_WAITING),
    "parked": _with_toast(_WAITING),
    "attempt": _with_toast(_WAITING),
    "inbox": _LOG,
    "sent": _LOG,
}
"""By the table's name without its prefix. Version 2 of the tables has them (migrations/outbox_migrations/v0002_…)."""


def listed(settings: Settings) -> str:
    """As in ``ALTER TABLE … SET (…)``."""
    return ", ".join(f"{name} = {value}" for name, value in settings.items())
