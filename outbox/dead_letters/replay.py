"""Giving dead letters back, or closing them: in bounded batches, each one transaction with its line in the audit.

A consumer's dead letter goes to that consumer alone, through its ``attempt`` table; the relay's goes back into
``message``. The payload is copied inside the database. A crash between two batches leaves the first done and audited,
the second untouched.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from outbox import encoding, wire
from outbox._message import bucket_of
from outbox.dead_letters.letter import Filter
from outbox.dead_letters.record import RELAY
from outbox.dialects import clock, insert_if_absent
from outbox.errors import DecodingError
from outbox.tables import Tables

AT_ONCE: Final = 500  # rows of one transaction


@dataclass(frozen=True, slots=True)
class Batch:
    """What one transaction did. ``skipped``: ids that stay open because their headers cannot be read, so that a replay
    could not be told from the message's first life."""

    count: int
    skipped: tuple[uuid.UUID, ...] = ()
    more: bool = False


@dataclass(frozen=True, slots=True)
class Who:
    """For the audit."""

    who: str
    why: str | None


def replay(
    connection: sa.Connection,
    tables: Tables,
    wanted: Filter,
    who: Who,
    *,
    until: dt.datetime,
    limit: int = AT_ONCE,
    without: Sequence[uuid.UUID] = (),
) -> Batch:
    """Hand back up to ``limit`` dead letters, in the transaction of ``connection``.

    Within a key they come in their old order: by offset (the relay's: by position), else by age.
    """
    letter = tables.dead_letter
    rows = _take(connection, tables, wanted, until, limit, without)
    messages: list[dict[str, Any]] = []
    attempts: list[dict[str, Any]] = []
    skipped: list[uuid.UUID] = []
    for row in rows:
        if row.consumer != RELAY:
            attempts.append({"of": row.id, "sequence": _sequence(row)} | _inbox_key(row))
            continue
        try:
            headers = encoding.load_headers(row.headers)
        except DecodingError:
            skipped.append(row.id)
            continue
        headers[wire.CYCLE] = str(row.cycle + 1)
        bucket = bucket_of(row.key, row.message_id) if row.bucket is None else row.bucket
        messages.append({"of": row.id, "headers": encoding.dump_headers(headers), "bucket": bucket})
    if messages:
        _back_to_message(connection, tables, messages)
    if attempts:
        _back_to_consumer(connection, tables, attempts)
    done = [row["of"] for row in (*messages, *attempts)]
    if done:
        connection.execute(sa.update(letter).where(letter.c.id.in_(done)).values(state="replayed", closed_at=clock()))
        _audit(connection, tables, "replay", wanted, who, len(done))
    return Batch(len(done), tuple(skipped), more=len(rows) == limit)


def discard(
    connection: sa.Connection, tables: Tables, wanted: Filter, who: Who, *, until: dt.datetime, limit: int = AT_ONCE
) -> Batch:
    """Close up to ``limit`` dead letters without doing anything with them. Their inbox rows stay: a late redelivery is
    still skipped."""
    letter = tables.dead_letter
    rows = _take(connection, tables, wanted, until, limit, ())
    if rows:
        connection.execute(
            sa.update(letter)
            .where(letter.c.id.in_([row.id for row in rows]))
            .values(state="discarded", closed_at=clock())
        )
        _audit(connection, tables, "discard", wanted, who, len(rows))
    return Batch(len(rows), more=len(rows) == limit)


def _take(
    connection: sa.Connection,
    tables: Tables,
    wanted: Filter,
    until: dt.datetime,
    limit: int,
    without: Sequence[uuid.UUID],
) -> list[Any]:
    """Lock open dead letters. Of two operators at once the second waits, and then finds them closed."""
    letter = tables.dead_letter
    if connection.dialect.name == "sqlite":
        # FOR UPDATE means nothing there: a write takes the one lock, before anything is read
        connection.execute(sa.update(letter).where(sa.false()).values(state="open"))
    query = (
        sa.select(
            letter.c.id,
            letter.c.consumer,
            letter.c.message_id,
            letter.c.cycle,
            letter.c.offset,
            letter.c.bucket,
            letter.c.key,
            letter.c.headers,
            letter.c.created_at,
            letter.c.first_failed_at,
            letter.c.dead_at,
        )
        .where(*wanted.conditions(tables), letter.c.dead_at <= until)
        .order_by(*in_order(letter))
        .limit(limit)
        .with_for_update()
    )
    if without:
        query = query.where(letter.c.id.not_in(without))
    return list(connection.execute(query).all())


def in_order(letter: sa.Table) -> tuple[sa.ColumnElement[Any], ...]:
    """What is handed back first: by offset (the relay's: by position), else by age."""
    return letter.c.offset.is_(None), letter.c.offset, letter.c.created_at, letter.c.dead_at, letter.c.message_id


def _sequence(row: sa.Row[Any]) -> int:
    """What orders the replays of a key: the offset, else the age in microseconds."""
    if row.offset is not None:
        return int(row.offset)
    since: dt.datetime = row.created_at or row.first_failed_at or row.dead_at
    return int(since.timestamp() * 1_000_000)


def _inbox_key(row: sa.Row[Any]) -> dict[str, Any]:
    return {"the_consumer": row.consumer, "the_message": row.message_id, "next_cycle": row.cycle + 1}


def _back_to_message(connection: sa.Connection, tables: Tables, rows: list[dict[str, Any]]) -> None:
    letter, message = tables.dead_letter, tables.message
    connection.execute(
        message.insert().from_select(
            ["id", "bucket", "topic", "key", "type", "payload", "content_type", "headers"],
            sa.select(
                letter.c.message_id,
                sa.bindparam("bucket", type_=sa.SmallInteger()),
                letter.c.topic,
                letter.c.key,
                letter.c.type,
                letter.c.payload,
                letter.c.content_type,
                sa.bindparam("headers", type_=sa.Text()),
            ).where(letter.c.id == sa.bindparam("of")),
        ),
        rows,
    )


def _back_to_consumer(connection: sa.Connection, tables: Tables, rows: list[dict[str, Any]]) -> None:
    letter, attempt, inbox = tables.dead_letter, tables.attempt, tables.inbox
    dialect = connection.dialect.name
    the_one = (
        sa.bindparam("the_consumer", type_=sa.String()),
        sa.bindparam("the_message", type_=attempt.c.message_id.type),
        sa.bindparam("next_cycle", type_=sa.Integer()),
    )
    copied = ("consumer", "message_id", "topic", "partition", "offset", "key", "type", "payload", "content_type")
    # What a message that was redelivered late left behind; never another replay that is still under way.
    connection.execute(
        sa.delete(attempt).where(
            attempt.c.consumer == the_one[0], attempt.c.message_id == the_one[1], attempt.c.state != "replay"
        ),
        rows,
    )
    connection.execute(
        insert_if_absent(attempt, dialect).from_select(
            [*copied, "headers", "created_at", "cycle", "sequence", "attempts", "state", "next_attempt_at"],
            sa.select(
                *(letter.c[name] for name in copied),
                letter.c.headers,
                letter.c.created_at,
                letter.c.cycle + 1,
                sa.bindparam("sequence", type_=sa.BigInteger()),
                sa.literal(0),
                sa.literal("replay"),
                clock(),
            ).where(letter.c.id == sa.bindparam("of")),
        ),
        rows,
    )
    # From now on the inbox waits for this cycle and no other: claim(cycle=n) succeeds once.
    connection.execute(
        sa.update(inbox)
        .where(inbox.c.consumer == the_one[0], inbox.c.message_id == the_one[1], inbox.c.outcome == "dead")
        .values(cycle=the_one[2]),
        rows,
    )
    # where its row has outlived the inbox's retention
    absent = insert_if_absent(inbox, dialect).values(
        consumer=the_one[0], message_id=the_one[1], outcome="dead", cycle=the_one[2]
    )
    connection.execute(absent, rows)


def _audit(connection: sa.Connection, tables: Tables, action: str, wanted: Filter, who: Who, count: int) -> None:
    connection.execute(
        tables.audit.insert(),
        {"action": action, "who": who.who[:255], "why": who.why, "target": wanted.text(), "count": count},
    )
