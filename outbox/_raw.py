"""Rows and statements of ours through a driver's own connection, without SQLAlchemy's.

SQLAlchemy compiles what is sent, for the driver's dialect, and converts the parameters: so names are quoted and values
are written as everywhere else. All that is left for sync and async apart are the two functions that execute it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects import registry

from outbox import _insert
from outbox._drivers import ASYNCPG, PSYCOPG, TORTOISE, Driver, driver_of
from outbox._refusals import advised
from outbox._rows import Built, Row
from outbox._statements import Statement
from outbox.staging import inserted

Work: TypeAlias = Sequence[Built] | Statement
"""Rows to be inserted, or one of our other statements."""


def execute(driver: Driver, connection: Any, work: Work) -> int:
    """Execute it at once in the connection's open transaction; returns how many rows the last statement touched. Raises
    `TransactionError`, and the driver's errors as they are."""
    driver.refuse_unfit(connection)
    count = 0
    for call in _calls(driver, work):
        with advised(), closing(_cursor(driver, connection)) as cursor:
            (cursor.executemany if call.many else cursor.execute)(call.sql, call.parameters)
            if _is_not_answered(driver, cursor, call):
                with connection.pipeline():
                    pass
            count = _count(driver, cursor, work)
        _tell(call)
    return count


async def aexecute(driver: Driver, connection: Any, work: Work) -> int:
    """`execute`, where the driver is async. Raises `TypeError`, too, for a wrapper of a driver that we do not know."""
    if driver is TORTOISE:
        async with connection.acquire_connection() as wrapped:
            inner = driver_of(wrapped)
            if inner is None:
                raise TypeError(f"Tortoise's {type(wrapped).__name__} is of a driver that pyoutbox does not know")
            return await aexecute(inner, wrapped, work)
    driver.refuse_unfit(connection)
    count = 0
    for call in _calls(driver, work):
        with advised():
            if driver is not ASYNCPG:
                async with _cursor(driver, connection) as cursor:
                    await (cursor.executemany if call.many else cursor.execute)(call.sql, call.parameters)
                    if _is_not_answered(driver, cursor, call):
                        async with connection.pipeline():
                            pass
                    count = _count(driver, cursor, work)
            elif call.many:
                await connection.executemany(call.sql, call.parameters)
            else:  # returns the command's tag: INSERT 0 1
                count = int((await connection.execute(call.sql, *call.parameters)).rpartition(" ")[2])
        _tell(call)
    return count


def _cursor(driver: Driver, connection: Any) -> Any:
    if driver in PSYCOPG:  # a usual one: the connection's own cursor_factory may want other placeholders
        psycopg: Any = sys.modules["psycopg"]
        return psycopg.AsyncCursor(connection) if driver.is_async else psycopg.Cursor(connection)
    return connection.cursor()


def _is_not_answered(driver: Driver, cursor: Any, call: _Call) -> bool:
    """Whether we ask how many rows it touched and psycopg, in a pipeline, does not know yet. At the end of an inner block
    of the pipeline it does."""
    return not call.rows and cursor.rowcount < 0 and driver in PSYCOPG


def _count(driver: Driver, cursor: Any, work: Work) -> int:
    found: int = work.touched(cursor, driver.database) if isinstance(work, Statement) else cursor.rowcount
    return found


def _tell(call: _Call) -> None:
    if call.rows:
        for callback in inserted:
            callback(call.rows)


# ---------------------------------------------------------------- what is sent


class _Call(NamedTuple):
    """One call of a driver: the SQL, its parameters (``many``: a list of them), and the rows that it inserts."""

    sql: str
    parameters: Any
    many: bool
    rows: list[Row]


def _calls(driver: Driver, work: Work) -> Iterator[_Call]:
    if isinstance(work, Statement):
        compiled = _compiled(driver, work.on(driver.database), tuple(work.parameters))
        yield _Call(compiled.sql, compiled.bind(work.parameters), False, [])
        return
    for table in dict.fromkeys(table for table, _, _ in work):
        rows = [Row(built) for built in work if built[0] is table]
        for start in range(0, len(rows), _insert.AT_ONCE):
            batch = rows[start : start + _insert.AT_ONCE]
            statement, given = _insert.statement(_dialect(driver), table, [row.parameters for row in batch])
            many = not isinstance(given, dict) and len(given) > 1
            each = [given] if isinstance(given, dict) else given
            compiled = _compiled(driver, statement, tuple(each[0]))
            parameters = [compiled.bind(one) for one in each]
            yield _Call(compiled.sql, parameters if many else parameters[0], many, batch)


@lru_cache(maxsize=32)
def _dialect(driver: Driver) -> sa.Dialect:
    """SQLAlchemy's dialect, without its driver: that is not imported for it."""
    kind: Callable[..., sa.Dialect] = registry.load(driver.dialect)
    return kind() if driver.paramstyle is None else kind(paramstyle=driver.paramstyle)


class _Compiled:
    """A statement as text for one driver, and how its parameters are given to it."""

    __slots__ = ("_convert", "_fixed", "_order", "sql")

    def __init__(self, driver: Driver, statement: Any, names: tuple[str, ...]) -> None:
        dialect = _dialect(driver)
        compiled = statement.compile(dialect=dialect, column_keys=list(names))
        self.sql = str(compiled)
        self._order: list[str] | None = compiled.positiontup if compiled.positional else None
        self._fixed: dict[str, Any] = {name: value for name, value in compiled.params.items() if name not in names}
        self._convert: dict[str, Callable[[Any], Any]] = {}
        for bound, name in compiled.bind_names.items():
            if driver.text_uuids and isinstance(bound.type, sa.Uuid):
                self._convert[name] = str
            elif convert := bound.type.dialect_impl(dialect).bind_processor(dialect):
                self._convert[name] = convert

    def bind(self, given: dict[str, Any]) -> Any:
        values = self._fixed | given
        for name, convert in self._convert.items():
            values[name] = convert(values[name])
        return values if self._order is None else tuple([values[name] for name in self._order])


@lru_cache(maxsize=256)
def _compiled(driver: Driver, statement: sa.Executable, names: tuple[str, ...]) -> _Compiled:
    return _Compiled(driver, statement, names)
