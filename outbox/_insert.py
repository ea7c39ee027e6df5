"""How rows are written: one statement, in the order of the list, which becomes the order of their positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final

import sqlalchemy as sa

AT_ONCE: Final = 1000
"""More rows than this are several statements: what one carries is in memory here and at the server."""

# Whose arrays tests/staging/test_many.py knows to arrive as they were given. pg8000's do not: in them the text null is NULL.
_DRIVERS: Final = frozenset({("postgresql", "psycopg"), ("postgresql", "psycopg_async"), ("postgresql", "asyncpg")})
# Rows from which on arrays are cheaper: 7 with psycopg, 10 with asyncpg.
_FEW: Final = 10
# Bytes of payload and headers a row, on average. Above it the bytes cost more than the rows, and need not be copied. With
# AT_ONCE it also keeps every parameter far below the 1 GB that PostgreSQL takes.
_LARGE: Final = 4096

_TEXTS_AND_NUMBERS: Final = ("id", "bucket", "topic", "key", "type", "content_type", "headers", "deliver_at")


Rows = Sequence[dict[str, Any]]
"""Of one table, as `_building` makes them: all with the same columns."""


def insert(connection: sa.Connection, table: sa.Table, rows: Rows) -> None:
    """Insert rows of one table."""
    connection.execute(*statement(connection.dialect, table, rows))


def statement(dialect: sa.Dialect, table: sa.Table, rows: Rows) -> tuple[sa.Insert, Rows | dict[str, Any]]:
    """The insert of these rows, and its parameters: one set, or a list of them."""
    if len(rows) >= _FEW and _takes_arrays(dialect) and _size(rows) <= _LARGE * len(rows):
        return _from_arrays(table), _arrays(table, rows)
    # a list of parameters, not .values([...]): that costs 74 µs a message to compile
    return _one_by_one(table), rows


@lru_cache(maxsize=64)
def _one_by_one(table: sa.Table) -> sa.Insert:
    return table.insert().inline()  # nobody asks for the position: without RETURNING one message costs 60 µs less


# A list of parameters is as many executions of the statement, for the client and for the server. As one execution, with an
# array for each column, 100 messages cost half:
#
#     INSERT INTO outbox_message (id, …, payload)
#     SELECT given.id, …, substring(:payloads FROM given.start FOR given.length)
#     FROM unnest(:id::uuid[], …) WITH ORDINALITY AS given (id, …, start, length, n)
#     ORDER BY given.n
#
# ORDER BY makes the order a promise: defaults, so the identity too, are computed from the sorted rows. Payloads come as one
# value that is cut up, since as an array psycopg sends them escaped twice, which costs five times as much for 10 kB each.


@lru_cache(maxsize=64)
def _from_arrays(table: sa.Table) -> sa.Insert:
    names = _names(table)
    # Text without a length: a cast to varchar(255)[] would cut silently what the column refuses
    types: dict[str, Any] = {n: sa.Text() if isinstance(table.c[n].type, sa.String) else table.c[n].type for n in names}
    types |= {"start": sa.Integer(), "length": sa.Integer()}
    given = (
        sa.func.unnest(*(sa.bindparam(name, type_=sa.ARRAY(type_, dimensions=1)) for name, type_ in types.items()))
        .table_valued(*(sa.column(name, type_) for name, type_ in types.items()), with_ordinality="n")
        .render_derived(name="given")
    )
    payload = sa.func.substring(sa.bindparam("payloads", type_=sa.LargeBinary()), given.c.start, given.c.length)
    ordered = sa.select(*(given.c[name] for name in names), payload).order_by(given.c.n)
    return table.insert().from_select([*names, "payload"], ordered)


def _arrays(table: sa.Table, rows: Rows) -> dict[str, Any]:
    payloads = [row["payload"] for row in rows]
    lengths = [None if payload is None else len(payload) for payload in payloads]  # of NULL bytes the part is NULL
    return {
        **{name: [row[name] for row in rows] for name in _names(table)},
        "payloads": b"".join([payload for payload in payloads if payload]),
        "start": list(accumulate([length or 0 for length in lengths[:-1]], initial=1)),
        "length": lengths,
    }


def _names(table: sa.Table) -> list[str]:
    return [name for name in _TEXTS_AND_NUMBERS if name in table.c]


def _takes_arrays(dialect: sa.Dialect) -> bool:
    return (dialect.name, dialect.driver) in _DRIVERS


def _size(rows: Rows) -> int:
    return sum(len(row["payload"] or b"") + len(row["headers"] or "") for row in rows)
