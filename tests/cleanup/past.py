"""Rows from long ago."""

from __future__ import annotations

import uuid
from typing import Any

import sqlalchemy as sa

from outbox._message import new_id
from outbox.cleanup import Cleanup, Retention
from outbox.dialects import clock
from tests.relay.database import Database, row

DAY = 86400.0
KEEP = Retention(inbox=30 * DAY, dead_letter=20 * DAY, audit=300 * DAY, sent=DAY)


def cleanup(database: Database, retention: Retention = KEEP, rows: int = 1000) -> Cleanup:
    return Cleanup(database.outbox, database=database.engine, retention=retention, rows=rows)


def handled(
    database: Database, days: float, *ids: uuid.UUID, consumer: str = "billing", **columns: Any
) -> list[uuid.UUID]:
    """Inbox rows of that age; without ids, of a message of its own."""
    found = list(ids) or [new_id()]
    rows = [{"consumer": consumer, "message_id": id, "outcome": "done", **columns} for id in found]
    with database.engine.begin() as connection:
        connection.execute(sa.insert(database.tables.inbox).values(processed_at=clock(-days * DAY)), rows)
    return found


def buried(
    database: Database, id: uuid.UUID, state: str = "open", days: float = 0, consumer: str = "billing", cycle: int = 0
) -> uuid.UUID:
    """A dead letter that was closed so many days ago, unless it is open."""
    letter = new_id()
    values: dict[str, Any] = {
        "id": letter,
        "consumer": consumer,
        "message_id": id,
        "cycle": cycle,
        "topic": "orders",
        "payload": b"\x00\xff",
        "reason": "rejected",
        "fingerprint": "F3A9C012",
        "attempts": 1,
        "state": state,
        "dead_at": clock(-400 * DAY),
        "closed_at": None if state == "open" else clock(-days * DAY),
    }
    database.execute(sa.insert(database.tables.dead_letter).values(**values))
    return letter


def tried(database: Database, id: uuid.UUID, state: str = "waiting", consumer: str = "billing") -> None:
    values = {"consumer": consumer, "message_id": id, "topic": "orders", "state": state}
    database.execute(sa.insert(database.tables.attempt).values(**values))


def unsent(database: Database, id: uuid.UUID, days: float) -> None:
    made = row("k") | {"id": id}
    database.execute(sa.insert(database.tables.message).values(**made, created_at=clock(-days * DAY)))


def audited(database: Database, days: float) -> None:
    values = {"action": "replay", "who": "ada", "target": "{}", "count": 1}
    database.execute(sa.insert(database.tables.audit).values(**values, at=clock(-days * DAY)))


def ids(database: Database, table: str, column: str = "message_id") -> set[uuid.UUID]:
    return {getattr(one, column) for one in database.rows(table)}
