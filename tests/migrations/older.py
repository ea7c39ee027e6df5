"""An outbox of version 1 with rows in flight, as an application of that version left it."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

import sqlalchemy as sa

from outbox._message import bucket_of
from outbox_migrations import migrate
from outbox_migrations.v0001_tables import _Builder

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


class Older:
    """The tables of version 1 in a database, made by its step, and what its library wrote into them."""

    def __init__(self, engine: sa.Engine, *, schema: str | None = None, prefix: str = "outbox_") -> None:
        self.engine = engine
        self.tables = _Builder(schema, prefix).tables()
        self.where: dict[str, Any] = {"schema": schema, "prefix": prefix}
        migrate(engine, to=1, **self.where)

    def add(self, key: str, **values: Any) -> uuid.UUID:
        """What `Outbox.add` of version 1 inserts: these columns, no others."""
        with self.engine.begin() as connection:
            row = self.message(key)
            connection.execute(self.tables["message"].insert().inline(), {**row, **values})
        return uuid.UUID(str(row["id"]))

    def message(self, key: str) -> dict[str, Any]:
        return {
            "id": uuid.uuid4(),
            "bucket": bucket_of(key, uuid.uuid4()),
            "topic": "orders",
            "key": key,
            "type": "order.placed",
            "payload": b"{}",
            "content_type": "application/json",
            "headers": '{"tenant": "acme"}',
        }

    def fill(self) -> dict[str, int]:
        """Rows in every table that may hold some while one migrates; returns how many."""
        for n in range(20):
            self.add(f"key-{n % 4}")
        row = self.message("later")
        rows: dict[str, list[dict[str, Any]]] = {
            "scheduled": [{**row, "deliver_at": dt.datetime(2099, 1, 1, tzinfo=dt.UTC)}, self.due()],
            "parked": [
                {**self.message("stuck"), "position": 10_000, "role": "head", "attempts": 1, "next_attempt_at": NOW}
            ],
            "dead_letter": [self.letter("open", None), self.letter("discarded", NOW)],
            "audit": [{"action": "discard", "who": "me", "target": "x", "count": 1}],
            "inbox": [{"consumer": "billing", "message_id": uuid.uuid4(), "outcome": "done"} for _ in range(5)],
            "attempt": [
                {
                    "consumer": "billing",
                    "message_id": uuid.uuid4(),
                    "topic": "orders",
                    "state": "waiting",
                    "attempts": 2,
                }
            ],
            "relay": [{"owner": "old-relay", "host": "h", "version": "0", "heartbeat_at": NOW}],
        }
        with self.engine.begin() as connection:
            for name, values in rows.items():
                connection.execute(self.tables[name].insert(), values)
        return self.counts()

    def due(self) -> dict[str, Any]:
        return {**self.message("due"), "deliver_at": NOW}

    def letter(self, state: str, closed_at: dt.datetime | None) -> dict[str, Any]:
        return {
            **{name: value for name, value in self.message("dead").items() if name != "id"},
            "id": uuid.uuid4(),
            "consumer": "billing",
            "message_id": uuid.uuid4(),
            "cycle": 0,
            "reason": "rejected",
            "fingerprint": "f",
            "attempts": 3,
            "state": state,
            "closed_at": closed_at,
        }

    def counts(self) -> dict[str, int]:
        with self.engine.connect() as connection:
            return {
                name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
                for name, table in self.tables.items()
            }

    def version(self) -> str:
        checkpoint = self.tables["checkpoint"]
        with self.engine.connect() as connection:
            return str(connection.scalar(sa.select(checkpoint.c.value).where(checkpoint.c.name == "schema_version")))
