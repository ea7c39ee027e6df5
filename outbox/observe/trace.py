"""Where is message X? One message, or all of a key, through every table, ending in one sentence."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from outbox.tables import Tables

LIMIT = 200  # rows a table

_SHOWN = {
    "message": ("position", "id", "topic", "key", "type", "created_at"),
    "scheduled": ("id", "topic", "key", "type", "deliver_at"),
    "parked": ("position", "id", "topic", "key", "role", "attempts", "next_attempt_at", "last_error"),
    "sent": ("position", "id", "topic", "partition", "offset", "sent_at"),
    "inbox": ("consumer", "message_id", "outcome", "cycle", "processed_at"),
    "attempt": ("consumer", "message_id", "topic", "key", "state", "attempts", "next_attempt_at", "last_error"),
    "dead_letter": (
        "id", "consumer", "message_id", "cycle", "topic", "key", "reason", "exception_type", "attempts", "state", "dead_at",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sighting:
    """A row that speaks of the message. Payloads are never part of it."""

    table: str
    row: dict[str, Any]


def trace(
    connection: sa.Connection, tables: Tables, *, id: uuid.UUID | None = None, key: str | None = None
) -> tuple[list[Sighting], str]:
    """Every row about a message id, or about a key, and what they come to."""
    found: list[Sighting] = []
    for name, columns in _SHOWN.items():
        table: sa.Table = getattr(tables, name)
        if id is not None:
            where = (table.c.message_id if "message_id" in table.c else table.c.id) == id
        elif "key" in table.c:
            where = table.c.key == key
        else:
            continue  # the inbox knows ids only
        rows = connection.execute(sa.select(*(table.c[c] for c in columns)).where(where).limit(LIMIT))
        found += [Sighting(name, dict(row._mapping)) for row in rows]
    return found, verdict(found, "This message" if id is not None else f"Key {key!r}")


def verdict(found: list[Sighting], subject: str) -> str:
    """One sentence about where it is. The first table that holds it decides; what consumers did is added."""
    where = {sighting.table: sighting.row for sighting in reversed(found)}
    if "parked" in where:
        row = where["parked"]
        if row["role"] == "head":
            text = f"{subject} failed {row['attempts']} times ({row['last_error']}) and is tried again at "
            text += str(row["next_attempt_at"])
        else:
            text = f"{subject} waits behind an earlier message of its key that failed"
    elif "message" in where:
        text = f"{subject} is committed and waits for the relay"
    elif "scheduled" in where:
        text = f"{subject} is scheduled for {where['scheduled']['deliver_at']}"
    elif "dead_letter" in where and where["dead_letter"]["consumer"] == "" and where["dead_letter"]["state"] == "open":
        text = f"{subject} could not be sent and is a dead letter ({where['dead_letter']['reason']})"
    elif "sent" in where:
        row = where["sent"]
        text = f"{subject} was sent to {row['topic']} at {row['sent_at']}"
    elif not found:
        return (
            f"{subject} is in none of these tables: it was never committed here, or it was sent and this outbox keeps no "
            "history of that."
        )
    else:
        text = f"{subject} has left this outbox"
    done = sorted({s.row["consumer"] for s in found if s.table == "inbox" and s.row["outcome"] == "done"})
    dead = sorted(
        {
            s.row["consumer"]
            for s in found
            if s.table == "dead_letter" and s.row["consumer"] and s.row["state"] == "open"
        }
    )
    waiting = sorted({s.row["consumer"] for s in found if s.table == "attempt"} - set(done))
    if done:
        text += f"; its effect happened in {', '.join(done)}"
    if dead:
        text += f"; it is an open dead letter of {', '.join(dead)}"
    if waiting:
        text += f"; {', '.join(waiting)} will try it again"
    return text + "."
