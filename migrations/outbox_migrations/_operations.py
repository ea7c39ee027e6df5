"""What steps consist of. Each operation knows its statement, what it locks, and how to see that it is done already.

Who waits for whom while it runs, is said by `Operation.locks`: `outbox migrate --dry-run` and docs/migrations.md print it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import CreateIndex, CreateTable, DropTable, ExecutableDDLElement

from outbox.storage import Settings, listed

LOCK_TIMEOUT: Final = 0.5
"""Seconds that a statement waits for its lock, and so the longest time that writers queue behind it. Then it gives way to
them and tries again."""

Done = Callable[[sa.Connection], bool]

# What conflicts with a lock that an operation takes on PostgreSQL: whoever holds one of these makes it wait.
_CONFLICTS: Final = {
    "SHARE UPDATE EXCLUSIVE": ("ShareUpdateExclusiveLock", "ShareLock", "ShareRowExclusiveLock", "ExclusiveLock"),
    "SHARE": ("RowExclusiveLock", "ShareUpdateExclusiveLock", "ShareRowExclusiveLock", "ExclusiveLock"),
    "ACCESS EXCLUSIVE": (
        *("AccessShareLock", "RowShareLock", "RowExclusiveLock", "ShareUpdateExclusiveLock", "ShareLock"),
        *("ShareRowExclusiveLock", "ExclusiveLock"),
    ),
    "ROW EXCLUSIVE": ("ShareLock", "ShareRowExclusiveLock", "ExclusiveLock"),
}


@dataclass(frozen=True)
class Operation:
    """One statement. ``mode``: the lock that it takes on ``table`` on PostgreSQL. ``done``: whether the database has it
    already. ``index``: what it builds, so that it can be built beside writers, outside a transaction."""

    what: str
    table: sa.Table
    statement: sa.Executable
    done: Done
    mode: str = "ROW EXCLUSIVE"
    new: bool = False
    index: sa.Index | None = None

    @property
    def conflicts(self) -> tuple[str, ...]:
        """The locks of others that it waits for, as pg_locks calls them."""
        return (*_CONFLICTS[self.mode], "AccessExclusiveLock")

    @property
    def beside(self) -> sa.Executable | None:
        """The statement that builds the index while others write, outside a transaction (PostgreSQL)."""
        return None if self.index is None else AddIndex(self.index, concurrently=True)

    def locks(self, dialect: str, *, fresh: bool, alone: bool = False) -> str:
        """Who waits for whom. ``fresh``: no outbox tables were there before; ``alone``: in a transaction of its own."""
        if self.new or fresh:
            return "nothing: the table is new"
        if dialect == "sqlite":
            return "the database's one write lock, until the commit"
        if dialect != "postgresql":
            return _mysql_locks(self)
        on = self.table.fullname
        if self.index is not None and alone:
            return (
                f"SHARE UPDATE EXCLUSIVE on {on}, outside a transaction: reads and writes go on; it waits for the "
                "transactions that are open, and nobody waits for it"
            )
        return f"{self.mode} on {on}: {_SAID[self.mode]}"


_WITHIN: Final = f"it waits for its lock {LOCK_TIMEOUT} s at a time"
_SAID: Final = {
    "SHARE UPDATE EXCLUSIVE": f"reads and writes go on; it waits for VACUUM and for other changes of the table, {_WITHIN}",
    "SHARE": f"reads go on, writes to this table wait while it is built; {_WITHIN}",
    "ACCESS EXCLUSIVE": f"reads and writes wait; {_WITHIN}",
    "ROW EXCLUSIVE": "reads and writes go on",
}


def _mysql_locks(operation: Operation) -> str:
    if operation.mode == "ROW EXCLUSIVE":
        return "its rows: reads and writes go on"
    on = operation.table.fullname
    if operation.index is not None:
        return (
            f"LOCK=NONE on {on}: reads and writes go on; at its beginning and end a metadata lock for a moment, for "
            "which it waits 1 s at a time"
        )
    return f"a metadata lock on {on}: reads and writes wait; it waits for it 1 s at a time"


# ---------------------------------------------------------------- the operations


def create_table(table: sa.Table) -> Operation:
    return Operation(f"create table {table.fullname}", table, CreateTable(table), _is_table(table), new=True)


def create_index(index: sa.Index) -> Operation:
    """An index of a table that the same step creates."""
    table = _table_of(index)
    what = f"create index {index.name} on {table.fullname}"
    return Operation(what, table, CreateIndex(index), _is_index(index), "SHARE", new=True)


def add_index(index: sa.Index) -> Operation:
    """An index of a table that is in use."""
    table = _table_of(index)
    what = f"create index {index.name} on {table.fullname}"
    return Operation(what, table, AddIndex(index), _is_index(index), "SHARE", index=index)


def drop_index(index: sa.Index) -> Operation:
    done = _is_index(index)
    table = _table_of(index)
    return Operation(
        f"drop index {index.name} of {table.fullname}",
        table,
        sa.schema.DropIndex(index),
        _not(done),
        "ACCESS EXCLUSIVE",
    )


def drop_table(table: sa.Table) -> Operation:
    what = f"drop table {table.fullname}"
    return Operation(what, table, DropTable(table), _not(_is_table(table)), "ACCESS EXCLUSIVE")


def set_storage(table: sa.Table, settings: Settings) -> Operation:
    """How PostgreSQL keeps a table."""
    return _alter(f"set storage of {table.fullname}", table, f"SET ({listed(settings)})")


def reset_storage(table: sa.Table, settings: Settings) -> Operation:
    return _alter(f"reset storage of {table.fullname}", table, f"RESET ({', '.join(settings)})")


def _alter(what: str, table: sa.Table, change: str) -> Operation:
    ddl = sa.DDL(f"ALTER TABLE %(fullname)s {change}")  # type: ignore[no-untyped-call]
    # a parent of partitions has no storage: they have
    return Operation(what, table, ddl.against(table), lambda c: is_partitioned(c, table), "SHARE UPDATE EXCLUSIVE")


def is_partitioned(connection: sa.Connection, table: sa.Table) -> bool:
    """Whether it is a parent of partitions; False where there is no such table."""
    if connection.dialect.name != "postgresql":
        return False
    name = connection.dialect.identifier_preparer.format_table(table)
    query = sa.text("SELECT EXISTS (SELECT FROM pg_partitioned_table WHERE partrelid = to_regclass(:name))")
    return bool(connection.scalar(query, {"name": name}))


def seed(table: sa.Table, rows: Sequence[dict[str, Any]]) -> Operation:
    """The first rows of a table that the same step creates."""
    statement = sa.insert(table).values(list(rows))
    return Operation(f"first rows of {table.fullname}", table, statement, _has_rows(table), new=True)


def note_version(checkpoint: sa.Table, version: int) -> list[Operation]:
    """What the tables are from now on."""
    row = checkpoint.c.name == "schema_version"
    note = sa.insert(checkpoint).values(name="schema_version", value=str(version))
    what = f"note version {version} in {checkpoint.fullname}"
    return [
        Operation(what, checkpoint, sa.delete(checkpoint).where(row), _never),
        Operation(what, checkpoint, note, _never),
    ]


# ---------------------------------------------------------------- what is done already


def _never(connection: sa.Connection) -> bool:
    return False


def _not(done: Done) -> Done:
    return lambda connection: not done(connection)


def _is_table(table: sa.Table) -> Done:
    return lambda connection: sa.inspect(connection).has_table(table.name, schema=table.schema)


def _has_rows(table: sa.Table) -> Done:
    return lambda connection: connection.scalar(sa.select(sa.literal(1)).select_from(table).limit(1)) is not None


def _is_index(index: sa.Index) -> Done:
    table = _table_of(index)

    def done(connection: sa.Connection) -> bool:
        inspector = sa.inspect(connection)
        if not inspector.has_table(table.name, schema=table.schema):
            return False
        return any(found["name"] == index.name for found in inspector.get_indexes(table.name, schema=table.schema))

    return done


def _table_of(index: sa.Index) -> sa.Table:
    assert index.table is not None
    return index.table


# ---------------------------------------------------------------- an index beside writers


class AddIndex(ExecutableDDLElement):
    """CREATE INDEX on a table in use: MySQL and MariaDB build it without holding writers up, or refuse to; PostgreSQL does
    with ``concurrently``, outside a transaction."""

    inherit_cache = False

    def __init__(self, index: sa.Index, *, concurrently: bool = False) -> None:
        self.index, self.concurrently = index, concurrently


@compiles(AddIndex)
def _add_index(element: AddIndex, compiler: Any, **kw: Any) -> str:
    return str(compiler.process(CreateIndex(element.index), **kw))


@compiles(AddIndex, "postgresql")
def _add_index_postgresql(element: AddIndex, compiler: Any, **kw: Any) -> str:
    text = str(compiler.process(CreateIndex(element.index), **kw))
    return text.replace("CREATE INDEX ", "CREATE INDEX CONCURRENTLY ", 1) if element.concurrently else text


@compiles(AddIndex, "mysql", "mariadb")
def _add_index_mysql(element: AddIndex, compiler: Any, **kw: Any) -> str:
    return f"{compiler.process(CreateIndex(element.index), **kw)} ALGORITHM=INPLACE LOCK=NONE"
