"""The statements of `Outbox.cancel` and `Outbox.claim`, for SQLAlchemy's connections and raw ones."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import sqlalchemy as sa

from outbox._message import message_id
from outbox.dialects import clock, insert_if_absent, was_absent
from outbox.errors import ConfigurationError
from outbox.tables import CONSUMER_LENGTH, Tables


class Statement(NamedTuple):
    """One statement: of which table, what it is in a dialect, its parameters. Made once for all calls, so that a raw
    connection's is compiled once."""

    table: sa.Table
    on: Callable[[str], sa.Executable]
    parameters: dict[str, Any]
    if_absent: bool = False

    def touched(self, result: Any, dialect: str) -> int:
        """How many rows it touched, from SQLAlchemy's result or a driver's cursor."""
        found: int = was_absent(result, dialect) if self.if_absent else result.rowcount
        return found


def cancel(tables: Tables, id: uuid.UUID) -> Statement:
    """DELETE FROM outbox_scheduled WHERE id = :message_id (primary key)"""
    if not isinstance(id, uuid.UUID):
        raise TypeError(f"cancel takes the message's id, a UUID, not {id.__class__.__name__}")
    table = tables.scheduled
    return Statement(table, lambda dialect: _delete(table), {"message_id": id})


def claim(tables: Tables, consumer: str, id: uuid.UUID | str, cycle: int) -> Statement:
    """INSERT INTO outbox_inbox … ON CONFLICT DO NOTHING; of a replay, UPDATE … WHERE outcome = 'dead' AND cycle = :n (both
    by the primary key). One row: it is ours; none: it is done already."""
    if not isinstance(consumer, str) or not 0 < len(consumer) <= CONSUMER_LENGTH or "\x00" in consumer:
        raise ConfigurationError(f"consumer {consumer!r}: a name of 1 to {CONSUMER_LENGTH} characters")
    parameters: dict[str, Any] = {"consumer": consumer, "message_id": message_id(id)}
    if not isinstance(cycle, int) or cycle < 0:
        raise TypeError(f"claim: cycle={cycle!r}; it is the number in the header outbox-cycle, 0 without one")
    table = tables.inbox
    if cycle:
        parameters = {"claimed_" + name: value for name, value in parameters.items()} | {"claimed_cycle": cycle}
        return Statement(table, lambda dialect: _claim_replay(table), parameters)
    return Statement(table, lambda dialect: _claim(table, dialect), parameters | {"outcome": "done"}, if_absent=True)


@lru_cache(maxsize=64)
def _delete(table: sa.Table) -> sa.Delete:
    return sa.delete(table).where(table.c.id == sa.bindparam("message_id"))


@lru_cache(maxsize=64)
def _claim(table: sa.Table, dialect: str) -> sa.Insert:
    return insert_if_absent(table, dialect)


@lru_cache(maxsize=64)
def _claim_replay(table: sa.Table) -> sa.Update:
    return (
        sa.update(table)
        .where(
            # not named as the columns are: those names are an UPDATE's own
            table.c.consumer == sa.bindparam("claimed_consumer"),
            table.c.message_id == sa.bindparam("claimed_message_id"),
            table.c.outcome == "dead",
            table.c.cycle == sa.bindparam("claimed_cycle"),
        )
        .values(outcome="done", processed_at=clock())
    )
