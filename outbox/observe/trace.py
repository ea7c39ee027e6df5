"""Where is message X? One message, or all of a key, through every table; `verdict` makes one sentence of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from outbox import encoding
from outbox.dialects import UtcDateTime, clock
from outbox.errors import DecodingError
from outbox.observe.verdict import of_key, of_message
from outbox.tables import Tables

LIMIT: Final = 200  # rows a table

_AT_ONCE: Final = 300  # ids of one statement

_SHOWN: Final = {
    "message": ("position", "id", "topic", "key", "type", "created_at"),
    "scheduled": ("id", "topic", "key", "type", "deliver_at"),
    "parked": ("position", "id", "topic", "key", "role", "attempts", "next_attempt_at", "last_error"),
    "sent": ("position", "id", "topic", "partition", "offset", "sent_at"),
    "inbox": ("consumer", "message_id", "outcome", "cycle", "processed_at"),
    "attempt": (
        "consumer", "message_id", "topic", "key", "state", "cycle", "attempts", "next_attempt_at", "last_error",
    ),
    "dead_letter": (
        "id", "consumer", "message_id", "cycle", "topic", "key", "reason", "exception_type", "attempts", "state", "dead_at",
        "closed_at",
    ),
}  # fmt: skip

_CLOSED_BY: Final = {"replayed": "replay", "discarded": "discard"}


@dataclass(frozen=True, slots=True)
class Sighting:
    """A row that speaks of the message. Payloads are never part of it. A line of the audit has its ``dead_letter``'s id."""

    table: str
    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trace:
    """``cut``: tables of which only the first `LIMIT` rows were read."""

    found: list[Sighting]
    verdict: str
    cut: tuple[str, ...] = ()


def trace(connection: sa.Connection, tables: Tables, *, id: uuid.UUID | None = None, key: str | None = None) -> Trace:
    """Every row about a message id (a dead letter's own id will do), or about a key, and what they come to."""
    now = connection.execute(sa.select(sa.type_coerce(clock(), UtcDateTime()))).scalar_one()
    if id is None:
        of, cut_of = _about_key(connection, tables, key or "")
        return Trace(of, of_key(of, key or "", now, cut_of), cut_of)
    subject = "This message"
    letter = tables.dead_letter
    of_letter = connection.scalar(sa.select(letter.c.message_id).where(letter.c.id == id))
    if of_letter is not None:
        subject += f" ({of_letter}, whose dead letter {id} is)"
        id = of_letter
    found: list[Sighting] = []
    cut: list[str] = []
    for name in _SHOWN:
        table: sa.Table = getattr(tables, name)
        rows, more = _rows(
            connection, table, name, (table.c.message_id if "message_id" in table.c else table.c.id) == id
        )
        found += rows
        cut += [table.name] if more else []
    found += _audit(connection, tables, found)
    return Trace(found, of_message(found, subject, now), tuple(cut))


def _about_key(connection: sa.Connection, tables: Tables, key: str) -> tuple[list[Sighting], tuple[str, ...]]:
    """Where a table has the key, by it; the inbox, which knows ids only, by the ids found so."""
    found: list[Sighting] = []
    cut = []
    for name in _SHOWN:
        table: sa.Table = getattr(tables, name)
        if "key" in table.c:
            rows, more = _rows(connection, table, name, table.c.key == key)
            found += rows
            cut += [table.name] if more else []
    inbox = tables.inbox
    ids = list({row.get("message_id", row.get("id")): None for row in (s.row for s in found)})
    for at in range(0, len(ids), _AT_ONCE):
        found += _rows(connection, inbox, "inbox", inbox.c.message_id.in_(ids[at : at + _AT_ONCE]), limit=None)[0]
    found += _audit(connection, tables, found)
    return found, tuple(cut)


def _rows(
    connection: sa.Connection, table: sa.Table, name: str, where: sa.ColumnElement[bool], limit: int | None = LIMIT
) -> tuple[list[Sighting], bool]:
    query = sa.select(*(table.c[c] for c in _SHOWN[name])).where(where).order_by(*table.primary_key.columns)
    rows = connection.execute(query.limit(None if limit is None else limit + 1)).all()
    more = limit is not None and len(rows) > limit
    return [Sighting(name, dict(row._mapping)) for row in rows[:limit]], more


# ---------------------------------------------------------------- who closed a dead letter


def _audit(connection: sa.Connection, tables: Tables, found: Iterable[Sighting]) -> list[Sighting]:
    """The line of the audit that closed each dead letter that is closed, where one fits.

    A line names what was asked for, not each letter. It is written at the end of the transaction that closes them, so the
    first one after that moment, of that action, whose conditions the letter meets.
    """
    audit = tables.audit
    lines = []
    for letter in [s.row for s in found if s.table == "dead_letter" and s.row["closed_at"] is not None]:
        query = (
            sa.select(audit.c.at, audit.c.action, audit.c.who, audit.c.why, audit.c.count, audit.c.target)
            .where(audit.c.action == _CLOSED_BY.get(letter["state"], ""), audit.c.at >= letter["closed_at"])
            .order_by(audit.c.at, audit.c.id)
            .limit(LIMIT)
        )
        fingerprint, type = _selected_by(connection, tables, letter["id"])
        for row in connection.execute(query):
            if _meets(row.target, letter | {"group": fingerprint, "type": type}):
                line = dict(row._mapping) | {"dead_letter": letter["id"]}
                del line["target"]
                lines.append(Sighting("audit", line))
                break
    return lines


def _selected_by(connection: sa.Connection, tables: Tables, id: uuid.UUID) -> tuple[str | None, str | None]:
    letter = tables.dead_letter
    row = connection.execute(sa.select(letter.c.fingerprint, letter.c.type).where(letter.c.id == id)).one()
    return row.fingerprint, row.type


def _meets(target: str, letter: dict[str, Any]) -> bool:
    try:
        asked = encoding.load_headers(target)
    except DecodingError:
        return False
    names = ("id", "message_id", "group", "consumer", "topic", "type", "key")
    return all(str(letter[name]) == asked[name].strip() for name in names if name in asked)
