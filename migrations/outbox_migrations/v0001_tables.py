"""Version 1: the tables.

Version 1 is the latest one, so its tables are those of `outbox.tables`. Whoever writes version 2 copies them here first,
as they are now: a revision that says ``to=1`` must go on making what it makes today (tests/migrations holds its SQL).
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from sqlalchemy.schema import CreateIndex, CreateTable, DropTable

from outbox._message import BUCKETS
from outbox_migrations._step import Place, Step

# The database makes this outbox's id: a script written once may be run on several.
_UUID: Final = {
    "postgresql": "gen_random_uuid()::text",
    "sqlite": (
        "lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2) || '-a' ||"
        " substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6)))"
    ),
    "mysql": "uuid()",
    "mariadb": "uuid()",
}


def _upgrade(place: Place) -> None:
    for table in place.tables.all:
        place.execute(CreateTable(table))
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            place.execute(CreateIndex(index))
    outbox_id: sa.TextClause = sa.text(_UUID[place.dialect])
    rows: list[dict[str, object]] = [
        {"name": "outbox_id", "value": outbox_id},
        {"name": "buckets", "value": str(BUCKETS)},
    ]
    place.execute(sa.insert(place.tables.checkpoint).values(rows))
    place.execute(sa.insert(place.tables.lease).values([{"bucket": bucket} for bucket in range(BUCKETS)]))


def _downgrade(place: Place) -> None:
    for table in reversed(place.tables.all):
        place.execute(DropTable(table))


STEP: Final = Step("0001_tables", _upgrade, _downgrade)
