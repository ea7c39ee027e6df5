"""A failed message parks its key: it and its successors wait in the table ``parked``, in order, and other keys flow.

Every function that writes is one transaction, begun by locking the lease rows it acts under (`Leases.fence`): a relay that
was paused and comes back after another took over changes nothing. Rows are named by position and id: after a fail-over
that lost commits, a position can be another message.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from outbox import encoding, wire
from outbox._message import message_id
from outbox._outgoing import Outgoing
from outbox.dead_letters.record import Failure, write_relay
from outbox.dialects import clock, delete_listed
from outbox.errors import DecodingError
from outbox.tables import BODY, Tables

ParkedKey = tuple[int, str, str]
"""(bucket, topic, key). The bucket follows from the key; it is named because it says whose the key is."""

Fence = Callable[[sa.Connection, Collection[int]], None]

AT_ONCE = 300  # rows or keys of one statement: up to three parameters each, and SQLite's oldest builds take 999


@dataclass(frozen=True, slots=True)
class Due:
    """The head of a parked key, whose time has come, with how often it was tried."""

    row: Outgoing
    attempts: int


def key_of(row: Outgoing) -> ParkedKey | None:
    return None if row.key is None else (row.bucket, row.topic, row.key)


def load_keys(connection: sa.Connection, tables: Tables, buckets: Sequence[int]) -> set[ParkedKey]:
    """The parked keys of these buckets. To be asked after their leases have committed."""
    parked = tables.parked
    rows = connection.execute(
        sa.select(parked.c.bucket, parked.c.topic, parked.c.key)
        .where(parked.c.bucket.in_(buckets), parked.c.key.is_not(None))
        .distinct()
    )
    return {(bucket, topic, key) for bucket, topic, key in rows}


def park(
    connection: sa.Connection,
    tables: Tables,
    fence: Fence,
    head: Outgoing | None,
    behind: Sequence[Outgoing],
    error: str = "",
    delay: float = 0.0,
) -> None:
    """Move messages from ``message`` to ``parked``: ``head`` as the one that failed (its first attempt is spent, the next
    is in ``delay`` seconds), the others behind it."""
    rows = [*([head] if head else []), *behind]
    fence(connection, {row.bucket for row in rows})
    if head is not None:
        values = {"role": "head", "attempts": 1, "last_error": error}
        times = {"next_attempt_at": clock(delay), "first_failed_at": clock(), "last_failed_at": clock()}
        _move(connection, tables, [head], values | times)
    for at in range(0, len(behind), AT_ONCE):
        _move(connection, tables, behind[at : at + AT_ONCE], {"role": "behind", "attempts": 0})
    # What is behind nothing would never be looked at again: where the head has gone meanwhile, the first of them is due.
    keys = sorted({key for row in behind if (key := key_of(row)) is not None})
    for at in range(0, len(keys), AT_ONCE):
        _promote_where_headless(connection, tables, keys[at : at + AT_ONCE])


def _move(connection: sa.Connection, tables: Tables, rows: Sequence[Outgoing], values: dict[str, object]) -> None:
    message, parked = tables.message, tables.parked
    these = _these(connection, message, rows)
    literals = [value if isinstance(value, sa.ColumnElement) else sa.literal(value) for value in values.values()]
    body = [message.c[name] for name in BODY]
    # copied inside the database: a payload need not cross the network again
    connection.execute(
        parked.insert().from_select(
            ["position", *BODY, *values],
            sa.select(message.c.position, *body, *literals).where(these),
        )
    )
    _delete(connection, message, rows)


def _delete(connection: sa.Connection, table: sa.Table, rows: Sequence[Outgoing]) -> None:
    connection.execute(delete_listed(table, connection.dialect.name, _listed(connection, rows)))


def _listed(connection: sa.Connection, rows: Sequence[Outgoing]) -> dict[str, list[Any]]:
    positions: dict[str, list[Any]] = {"position": [row.position for row in rows]}
    if connection.dialect.name == "sqlite":
        return positions  # a file does not fail over, and a row written by hand may have any text for an id
    return positions | {"id": [uuid.UUID(row.id) for row in rows]}


def _these(connection: sa.Connection, table: sa.Table, rows: Sequence[Outgoing]) -> sa.ColumnElement[bool]:
    return sa.and_(*(table.c[name].in_(values) for name, values in _listed(connection, rows).items()))


def due(
    connection: sa.Connection, tables: Tables, buckets: Sequence[int], without_topics: Sequence[str], limit: int
) -> list[Due]:
    """Heads whose time has come, those that wait longest first."""
    parked = tables.parked
    conditions = [parked.c.role == "head", parked.c.next_attempt_at <= clock(), parked.c.bucket.in_(buckets)]
    if without_topics:
        conditions.append(parked.c.topic.not_in(without_topics))
    query = _columns(tables, parked.c.attempts).where(*conditions).order_by(parked.c.next_attempt_at).limit(limit)
    return [Due(_outgoing(row), row.attempts) for row in connection.execute(query)]


def next_of_key(connection: sa.Connection, tables: Tables, key: ParkedKey, limit: int) -> list[Outgoing]:
    """What is parked of a key, in order, from its head on."""
    query = _columns(tables).where(_of_key(tables, key)).order_by(tables.parked.c.position).limit(limit)
    return [_outgoing(row) for row in connection.execute(query)]


def sent(connection: sa.Connection, tables: Tables, fence: Fence, rows: Sequence[Outgoing]) -> bool:
    """Parked messages of one key were acknowledged: remove them; the next one becomes the head, due now. Returns whether
    the key is still parked."""
    fence(connection, {rows[0].bucket})
    _delete(connection, tables.parked, rows)
    return _promote(connection, tables, key_of(rows[0]))


def failed_again(
    connection: sa.Connection, tables: Tables, fence: Fence, row: Outgoing, error: str, delay: float
) -> None:
    """A head failed once more: an attempt is spent, the next is in ``delay`` seconds."""
    fence(connection, {row.bucket})
    parked = tables.parked
    connection.execute(
        sa.update(parked)
        .where(_these(connection, parked, [row]))
        .values(
            role="head",
            attempts=parked.c.attempts + 1,
            last_error=error,
            last_failed_at=clock(),
            first_failed_at=sa.func.coalesce(parked.c.first_failed_at, clock()),
            next_attempt_at=clock(delay),
        )
    )


def dead(connection: sa.Connection, tables: Tables, fence: Fence, row: Outgoing, failure: Failure) -> bool:
    """A message is given up, wherever it is: it becomes a dead letter, once, and its key goes on. Returns whether the key
    is still parked."""
    fence(connection, {row.bucket})
    message, parked = tables.message, tables.parked
    first, attempts = None, 0
    found = connection.execute(sa.select(parked.c.attempts).where(_these(connection, parked, [row]))).one_or_none()
    if found is None:
        created = _time(connection, message.c.created_at, _these(connection, message, [row]))
    else:
        attempts = found.attempts
        created = _time(connection, parked.c.created_at, _these(connection, parked, [row]))
        first = _time(connection, parked.c.first_failed_at, _these(connection, parked, [row]))
    write_relay(
        connection,
        tables,
        row,
        message_id=message_id(row.id),
        cycle=wire.cycle(_headers(row)),
        created_at=created,
        first_failed_at=first,
        attempts=attempts + 1,
        failure=failure,
    )
    _delete(connection, message, [row])
    _delete(connection, parked, [row])
    return _promote(connection, tables, key_of(row))


def _time(connection: sa.Connection, column: sa.ColumnElement[Any], where: sa.ColumnElement[bool]) -> Any:
    try:
        return connection.scalar(sa.select(column).where(where))
    except (ValueError, TypeError):
        return None  # text that is no time, in a row written by hand to SQLite


def _of_key(tables: Tables, key: ParkedKey) -> sa.ColumnElement[bool]:
    parked = tables.parked
    return sa.and_(parked.c.topic == key[1], parked.c.key == key[2], parked.c.bucket == key[0])


def _promote(connection: sa.Connection, tables: Tables, key: ParkedKey | None) -> bool:
    """Where a key has no head (any more), the first of what is parked of it becomes one. Returns whether any is."""
    if key is None:
        return False
    parked = tables.parked
    first = connection.execute(
        sa.select(parked.c.position, parked.c.role)
        .where(_of_key(tables, key))
        .order_by(sa.case((parked.c.role == "head", 0), else_=1), parked.c.position)
        .limit(1)
    ).one_or_none()
    if first is None:
        return False
    if first.role != "head":
        connection.execute(
            sa.update(parked).where(parked.c.position == first.position).values(role="head", next_attempt_at=clock())
        )
    return True


def _promote_where_headless(connection: sa.Connection, tables: Tables, keys: Sequence[ParkedKey]) -> None:
    parked = tables.parked
    group = (parked.c.bucket, parked.c.topic, parked.c.key)
    # not (bucket, topic, key) IN (…), for which SQLite reads the whole table
    firsts = connection.scalars(
        sa.select(sa.func.min(parked.c.position))
        .where(sa.or_(*(_of_key(tables, key) for key in keys)))
        .group_by(*group)
        .having(sa.func.sum(sa.case((parked.c.role == "head", 1), else_=0)) == 0)
    ).all()
    if firsts:
        connection.execute(
            sa.update(parked).where(parked.c.position.in_(firsts)).values(role="head", next_attempt_at=clock())
        )


def _headers(row: Outgoing) -> dict[str, str]:
    try:
        return encoding.load_headers(row.headers)
    except DecodingError:
        return {}  # a row written by hand: the dead letter keeps the text as it is


def _columns(tables: Tables, *more: sa.ColumnElement[Any]) -> sa.Select[Any]:
    parked = tables.parked
    # the id as the driver gives it: a row with one that is no UUID must not hold up the others
    id = sa.type_coerce(parked.c.id, sa.types.NullType()).label("id")
    names = [name for name in Outgoing.__struct_fields__ if name != "id"]
    return sa.select(id, *(parked.c[name] for name in names), *more)


def _outgoing(row: sa.Row[Any]) -> Outgoing:
    found = row._mapping
    id = str(found["id"])
    if len(id) == 32 and id.isalnum():
        id = f"{id[:8]}-{id[8:12]}-{id[12:16]}-{id[16:20]}-{id[20:]}"
    return Outgoing(**{name: found[name] for name in Outgoing.__struct_fields__ if name != "id"}, id=id)
