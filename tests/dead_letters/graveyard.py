"""A database in which tests bury messages."""

from __future__ import annotations

import uuid
from typing import Any

import sqlalchemy as sa

from outbox import Outbox
from outbox._message import bucket_of, new_id
from outbox._outgoing import Outgoing
from outbox.dead_letters import DeadLetters
from outbox.dead_letters.record import Failure, record, write, write_relay
from outbox.stores.engine import sync_engine_for


class Graveyard:
    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = sync_engine_for(url, create=True)
        self.outbox = Outbox()
        self.tables = self.outbox.tables
        self.outbox.metadata.create_all(self.engine)
        self.letters = DeadLetters(self.outbox, database=self.engine)

    def close(self) -> None:
        self.letters.close()
        self.engine.dispose()

    def bury(self, failure: Failure | None = None, **changes: Any) -> uuid.UUID:
        """A dead letter of a consumer, with its inbox row, as the consumer writes them; returns the dead letter's id."""
        row = record(
            failure or Failure("retries-exhausted", "ValueError", "no"),
            **{
                "consumer": "billing",
                "message_id": new_id(),
                "cycle": 0,
                "topic": "orders",
                "key": "7",
                "type": "order.placed",
                "payload": b'{"order_id": 7}',
                "content_type": "application/json",
                "headers": None,
                "attempts": 3,
                **changes,
            },
        )
        with self.engine.begin() as connection:
            assert write(connection, self.tables, row)
            connection.execute(
                self.tables.inbox.insert(),
                {
                    "consumer": row["consumer"],
                    "message_id": row["message_id"],
                    "outcome": "dead",
                    "cycle": row["cycle"],
                },
            )
        id: uuid.UUID = row["id"]
        return id

    def bury_unsent(
        self, position: int, headers: str | None = None, key: str | None = "7", cycle: int = 0
    ) -> uuid.UUID:
        """A dead letter of the relay; returns the message's id."""
        id = new_id()
        message = Outgoing(
            position, str(id), "orders", key, "order.placed", b"\x00bytes", "text/plain", headers, bucket_of(key, id)
        )
        with self.engine.begin() as connection:
            write_relay(
                connection,
                self.tables,
                message,
                message_id=id,
                cycle=cycle,
                created_at=None,
                first_failed_at=None,
                attempts=1,
                failure=Failure("rejected", exception_message="too large"),
            )
        return id

    def rows(self, name: str) -> list[dict[str, Any]]:
        table = getattr(self.tables, name)
        with self.engine.connect() as connection:
            query = sa.select(table).order_by(*table.primary_key.columns)
            return [dict(row._mapping) for row in connection.execute(query)]
