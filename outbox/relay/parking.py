"""A failed message parks its key: it and its successors wait in the table ``parked``, in order, and other keys flow.

Every function here is one transaction, begun by locking the lease rows it acts under (`Leases.fence`): a relay that was
paused and comes back after another took over changes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from outbox import encoding, wire
from outbox._message import Outgoing
from outbox.dead_letters.record import Failure, write_relay
from outbox.errors import DecodingError
from outbox.tables import BODY, Tables, clock

ParkedKey = tuple[str, str]
"""(topic, key)"""

Fence = Callable[[sa.Connection, Sequence[int]], None]

AT_ONCE = 500  # rows of one statement


@dataclass(frozen=True, slots=True)
class Due:
    """The head of a parked key, whose time has come, with how often it was tried."""

    row: Outgoing
    attempts: int


def load_keys(connection: sa.Connection, tables: Tables, buckets: Sequence[int]) -> set[ParkedKey]:
    """The parked keys of these buckets. To be asked after their leases have committed."""
    parked = tables.parked
    rows = connection.execute(
        sa.select(parked.c.topic, parked.c.key)
        .where(parked.c.bucket.in_(buckets), parked.c.key.is_not(None))
        .distinct()
    )
    return {(topic, key) for topic, key in rows}


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
    fence(connection, sorted({row.bucket for row in rows}))
    if head is not None:
        values = {"role": "head", "attempts": 1, "last_error": error}
        times = {"next_attempt_at": clock(delay), "first_failed_at": clock(), "last_failed_at": clock()}
        _move(connection, tables, [head], values | times)
    for at in range(0, len(behind), AT_ONCE):
        _move(connection, tables, behind[at : at + AT_ONCE], {"role": "behind", "attempts": 0})


def _move(connection: sa.Connection, tables: Tables, rows: Sequence[Outgoing], values: dict[str, object]) -> None:
    message, parked = tables.message, tables.parked
    positions = [row.position for row in rows]
    literals = [value if isinstance(value, sa.ColumnElement) else sa.literal(value) for value in values.values()]
    body = [message.c[name] for name in BODY]
    # copied inside the database: a payload need not cross the network again
    connection.execute(
        parked.insert().from_select(
            ["position", *BODY, *values],
            sa.select(message.c.position, *body, *literals).where(message.c.position.in_(positions)),
        )
    )
    connection.execute(sa.delete(message).where(message.c.position.in_(positions)))


def due(connection: sa.Connection, tables: Tables, buckets: Sequence[int], limit: int) -> list[Due]:
    """Heads whose time has come, those that wait longest first."""
    parked = tables.parked
    rows = connection.execute(
        sa.select(parked)
        .where(parked.c.role == "head", parked.c.next_attempt_at <= clock(), parked.c.bucket.in_(buckets))
        .order_by(parked.c.next_attempt_at)
        .limit(limit)
    )
    return [Due(_outgoing(row), row.attempts) for row in rows]


def next_of_key(connection: sa.Connection, tables: Tables, key: ParkedKey, limit: int) -> list[Outgoing]:
    """What is parked of a key, in order, from its head on."""
    parked = tables.parked
    rows = connection.execute(
        sa.select(parked)
        .where(parked.c.topic == key[0], parked.c.key == key[1])
        .order_by(parked.c.position)
        .limit(limit)
    )
    return [_outgoing(row) for row in rows]


def sent(connection: sa.Connection, tables: Tables, fence: Fence, rows: Sequence[Outgoing]) -> bool:
    """Parked messages of one key were acknowledged: remove them; the next one becomes the head, due now. Returns whether
    the key is still parked."""
    fence(connection, [rows[0].bucket])
    parked = tables.parked
    connection.execute(sa.delete(parked).where(parked.c.position.in_([row.position for row in rows])))
    return _promote(connection, tables, rows[0])


def failed_again(
    connection: sa.Connection, tables: Tables, fence: Fence, row: Outgoing, error: str, delay: float
) -> None:
    """A head failed once more: an attempt is spent, the next is in ``delay`` seconds."""
    fence(connection, [row.bucket])
    parked = tables.parked
    connection.execute(
        sa.update(parked)
        .where(parked.c.position == row.position)
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
    fence(connection, [row.bucket])
    message, parked = tables.message, tables.parked
    story = connection.execute(
        sa.select(parked.c.created_at, parked.c.first_failed_at, parked.c.attempts).where(
            parked.c.position == row.position
        )
    ).one_or_none()
    if story is None:
        created = connection.scalar(sa.select(message.c.created_at).where(message.c.position == row.position))
        first, attempts = None, 0
    else:
        created, first, attempts = story
    write_relay(
        connection,
        tables,
        row,
        message_id=uuid.UUID(row.id),
        cycle=wire.cycle(_headers(row)),
        created_at=created,
        first_failed_at=first,
        attempts=attempts + 1,
        failure=failure,
    )
    connection.execute(sa.delete(message).where(message.c.position == row.position))
    connection.execute(sa.delete(parked).where(parked.c.position == row.position))
    return _promote(connection, tables, row)


def _promote(connection: sa.Connection, tables: Tables, row: Outgoing) -> bool:
    if row.key is None:
        return False
    parked = tables.parked
    of_key = sa.and_(parked.c.topic == row.topic, parked.c.key == row.key)
    first = connection.execute(
        sa.select(parked.c.position, parked.c.role).where(of_key).order_by(parked.c.position).limit(1)
    ).one_or_none()
    if first is None:
        return False
    if first.role != "head":
        connection.execute(
            sa.update(parked).where(parked.c.position == first.position).values(role="head", next_attempt_at=clock())
        )
    return True


def _headers(row: Outgoing) -> dict[str, str]:
    try:
        return encoding.load_headers(row.headers)
    except DecodingError:
        return {}  # a row written by hand: the dead letter keeps the text as it is


def _outgoing(row: sa.Row[tuple[object, ...]]) -> Outgoing:
    found = row._mapping
    return Outgoing(
        position=found["position"],
        id=str(found["id"]),
        topic=found["topic"],
        key=found["key"],
        type=found["type"],
        payload=found["payload"],
        content_type=found["content_type"],
        headers=found["headers"],
        bucket=found["bucket"],
    )
