"""Dead letters as they are read: one, groups of them, and how they are selected."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal

import sqlalchemy as sa

from outbox import encoding
from outbox.dead_letters.record import State
from outbox.errors import ConfigurationError, DecodingError
from outbox.tables import Tables

STATES: Final = ("open", "replayed", "discarded")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One message that was given up, with the bytes it had. ``consumer`` is '' for the relay; then ``offset`` is the
    message's old position. ``cycle`` counts replays: 0 is the message's first life."""

    id: uuid.UUID
    consumer: str
    message_id: uuid.UUID
    cycle: int
    topic: str
    partition: int | None
    offset: int | None
    bucket: int | None
    key: str | None
    raw_key: bytes | None = field(repr=False)
    type: str | None
    payload: bytes | None = field(repr=False)
    content_type: str | None
    headers: Mapping[str, str] = field(repr=False)
    created_at: dt.datetime | None
    reason: str
    exception_type: str | None
    exception_message: str | None = field(repr=False)
    stack: str | None = field(repr=False)
    fingerprint: str
    attempts: int
    first_failed_at: dt.datetime | None
    dead_at: dt.datetime
    app_version: str | None
    state: State
    closed_at: dt.datetime | None
    edited_from: uuid.UUID | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Open dead letters of one cause. ``example`` is the message of one of their exceptions."""

    fingerprint: str
    consumer: str
    type: str | None
    topics: tuple[str, ...]
    reason: str
    exception_type: str | None
    example: str | None = field(repr=False)
    count: int
    first_dead_at: dt.datetime
    last_dead_at: dt.datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which dead letters: all conditions together, None for any. ``group`` is a fingerprint; ``consumer=""`` the relay."""

    id: uuid.UUID | None = None
    message_id: uuid.UUID | None = None
    group: str | None = None
    consumer: str | None = None
    topic: str | None = None
    type: str | None = None
    key: str | None = None
    state: State | Literal["any"] = "open"

    def conditions(self, tables: Tables) -> list[sa.ColumnElement[bool]]:
        """Raises `ConfigurationError` for a state that does not exist."""
        if self.state != "any" and self.state not in STATES:
            raise ConfigurationError(f"state {self.state!r}: {', '.join(STATES)} and any are possible")
        letter = tables.dead_letter
        found = []
        for name in ("id", "message_id", "consumer", "topic", "type", "key"):
            value = getattr(self, name)
            if value is not None:
                found.append(letter.c[name] == value)
        if self.group is not None:
            found.append(letter.c.fingerprint == self.group.strip().upper())
        if self.state != "any":
            found.append(letter.c.state == self.state)
        return found

    @property
    def narrow(self) -> bool:
        """Whether anything but the state is asked for."""
        return any(value is not None for name, value in self._items() if name != "state")

    def text(self) -> str:
        """As the audit keeps it: a JSON object of what was asked for."""
        return encoding.dump_headers({name: str(value) for name, value in self._items() if value is not None})

    def _items(self) -> list[tuple[str, Any]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]


def find(connection: sa.Connection, tables: Tables, wanted: Filter, limit: int) -> list[DeadLetter]:
    """Up to ``limit`` dead letters (rows), those that died first first."""
    letter = tables.dead_letter
    query = sa.select(letter).where(*wanted.conditions(tables)).order_by(letter.c.dead_at, letter.c.id).limit(limit)
    return [_letter(row._mapping) for row in connection.execute(query)]


def count(connection: sa.Connection, tables: Tables, wanted: Filter) -> int:
    """How many dead letters (rows) meet the conditions."""
    query = sa.select(sa.func.count()).select_from(tables.dead_letter).where(*wanted.conditions(tables))
    return connection.scalar(query) or 0


def fingerprints(connection: sa.Connection, tables: Tables, prefix: str, wanted: Filter) -> dict[str, int]:
    """The groups whose fingerprint begins like this, with how many dead letters they have."""
    letter = tables.dead_letter
    query = (
        sa.select(letter.c.fingerprint, sa.func.count())
        .where(*wanted.conditions(tables), letter.c.fingerprint.startswith(prefix.strip().upper(), autoescape=True))
        .group_by(letter.c.fingerprint)
        .order_by(letter.c.fingerprint)
    )
    return {fingerprint: number for fingerprint, number in connection.execute(query)}  # noqa: C416


def groups(connection: sa.Connection, tables: Tables, wanted: Filter) -> list[Group]:
    """Open dead letters by cause, the largest group first."""
    letter = tables.dead_letter
    same = (letter.c.fingerprint, letter.c.consumer, letter.c.type, letter.c.exception_type)
    # by topic too, and put together below: no aggregate of text works on every database
    query = (
        sa.select(
            *same,
            letter.c.topic,
            sa.func.min(letter.c.reason).label("reason"),
            sa.func.min(letter.c.exception_message).label("example"),
            sa.func.count().label("count"),
            sa.func.min(letter.c.dead_at).label("first_dead_at"),
            sa.func.max(letter.c.dead_at).label("last_dead_at"),
        )
        .where(*wanted.conditions(tables))
        .group_by(*same, letter.c.topic)
        .order_by(letter.c.topic)
    )
    by_cause: dict[tuple[Any, ...], list[sa.Row[Any]]] = {}
    for row in connection.execute(query):
        by_cause.setdefault(tuple(row[:4]), []).append(row)
    found = [
        Group(
            fingerprint=rows[0].fingerprint,
            consumer=rows[0].consumer,
            type=rows[0].type,
            topics=tuple(row.topic for row in rows),
            reason=rows[0].reason,
            exception_type=rows[0].exception_type,
            example=rows[0].example,
            count=sum(row._mapping["count"] for row in rows),
            first_dead_at=min(row.first_dead_at for row in rows),
            last_dead_at=max(row.last_dead_at for row in rows),
        )
        for rows in by_cause.values()
    ]
    return sorted(found, key=lambda group: (-group.count, group.fingerprint))


def _letter(row: sa.RowMapping) -> DeadLetter:
    return DeadLetter(**{**row, "headers": _headers(row["headers"])})


def _headers(text: str | None) -> Mapping[str, str]:
    try:
        return encoding.load_headers(text)
    except DecodingError:
        return {}  # a message written by hand; perhaps that is why it is here
