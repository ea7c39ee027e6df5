"""The outbox tables in versioned steps. One source for a revision of yours (`upgrade`, `downgrade`), for
``outbox migrate`` (`migrate`, `script`, `plan`) and, through the Alembic plugin, for ``alembic revision --autogenerate``.

Version 0 is no tables at all. Alembic is not needed to import this, nor for `migrate`. docs/migrations.md says in which
order to roll a new version out, and what each step locks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, NamedTuple, Protocol

import sqlalchemy as sa

from outbox import ConfigurationError
from outbox.observe.schema import check_schema
from outbox.tables import tables_for
from outbox_migrations import _partitions, _script
from outbox_migrations._alone import alone, begin_alone, require_schema
from outbox_migrations._filter import include_object, include_object_for
from outbox_migrations._grants import grants
from outbox_migrations._online import PATIENCE, Online
from outbox_migrations._operations import Operation, is_partitioned, note_version
from outbox_migrations._step import Place, Step
from outbox_migrations._version import version_in
from outbox_migrations.v0001_tables import STEP as TABLES
from outbox_migrations.v0002_storage_and_closed import STEP as STORAGE_AND_CLOSED

STEPS: Final[tuple[Step, ...]] = (TABLES, STORAGE_AND_CLOSED)
"""Step n, counted from 1, makes version n out of version n - 1. What was released is never changed, only added to."""

LATEST: Final = len(STEPS)
"""The version that this pyoutbox works with."""


class Operations(Protocol):
    """What is used of Alembic's ``op``."""

    def get_context(self) -> Any: ...

    def get_bind(self) -> sa.Connection: ...

    def execute(self, sqltext: Any, /) -> None: ...


# ---------------------------------------------------------------- in a revision of the user's


def upgrade(
    op: Operations,
    to: int | None = None,
    *,
    start: int | None = None,
    schema: str | None = None,
    prefix: str = "outbox_",
    patience: float = PATIENCE,
) -> None:
    """Bring the tables to version ``to`` (None: `LATEST`), in a revision of yours: ``outbox_migrations.upgrade(op, to=1)``.

    Write the number down: a revision should do the same in two years. Tables are created and seeded: version, this
    outbox's own id, number of buckets, one lease row a bucket. Online, only the steps that the database has not had
    are run, and what a cut-off attempt left undone. Offline (``--sql``) the database cannot be asked: all steps from
    ``start`` are written out, by default from where the script itself has brought these tables, else from nothing.
    ``schema``, which must exist, and ``prefix`` are those of your `Outbox`.

    It runs in the revision's transaction. A statement that needs a lock on a table in use waits for it half a second at
    a time, for ``patience`` seconds in all. An index on a large table is built outside the transaction
    (``autocommit_block``), which commits what the revision did before: leave this line in a revision of its own.

    Raises `ConfigurationError` for a version that this pyoutbox does not know, `SchemaMismatch` where the database has
    tables of a newer one, or tables that are not all there, `StoreUnavailable` where a lock was not had in time.
    """
    target = LATEST if to is None else _known(to)
    tables = tables_for(sa.MetaData(), schema, prefix)
    context = op.get_context()
    place = Place(context.dialect.name, tables.schema, prefix)
    if context.as_sql:
        first = _start(op, place, start, unknown=0)
        for _, operations in _upwards(place, first, target):
            _write(op, operations, fresh=first == 0)
        _remember(op, place, target)
        return
    first = version_in(op.get_bind(), tables, LATEST)
    online = Online(op.get_bind, patience=patience, outside=_outside(op))
    for _, operations in _upwards(place, first, target):
        online.carry_out(operations)


def downgrade(
    op: Operations, to: int = 0, *, start: int | None = None, schema: str | None = None, prefix: str = "outbox_"
) -> None:
    """Bring the tables back to version ``to``, inside a revision of yours.

    Version 0 **drops the tables with all that is in them**: messages that were committed and not sent yet, dead letters,
    and the inbox, without which a message that comes again has its effect again. Drain the outbox first.

    ``start``: for a script, as in `upgrade`; by default from where the script has brought them, else from `LATEST`.
    Raises as `upgrade` does.
    """
    target = _known(to)
    tables = tables_for(sa.MetaData(), schema, prefix)
    context = op.get_context()
    place = Place(context.dialect.name, tables.schema, prefix)
    if context.as_sql:
        first = _start(op, place, start, unknown=LATEST)
        for _, operations in _downwards(place, first, target):
            _write(op, operations, fresh=False)
        _remember(op, place, target)
        return
    online = Online(op.get_bind)
    first = version_in(op.get_bind(), tables, LATEST, drop=target == 0)
    for _, operations in _downwards(place, first, target):
        online.carry_out(operations)


# ---------------------------------------------------------------- where there is no Alembic


def migrate(
    where: sa.Engine | sa.Connection,
    *,
    to: int | None = None,
    downgrade: bool = False,
    schema: str | None = None,
    prefix: str = "outbox_",
    patience: float = PATIENCE,
) -> list[str]:
    """Bring the tables to version ``to`` (None: `LATEST`) where there is no Alembic; returns the steps that it took.

    ``where``: an ``Engine`` (up to three connections of it), on which nobody queues behind us: new tables are made in one
    transaction, each change of tables in use in one of its own, an index beside its writers. Or a ``Connection``: all of
    it in its transaction, which the caller commits (SQLite and PostgreSQL: all or nothing); then an index on a large table
    is refused.

    Called again it does nothing, or what a cut-off attempt left undone; of two processes that call it at once, the second
    waits for the first. Tables that ``create_all`` made are checked, seeded and left alone. ``downgrade``: allows a ``to``
    below the version that is there; version 0 drops all that is in the tables. ``patience``: seconds to go on trying for
    a lock.

    Raises `SchemaMismatch` where the schema does not exist, where the tables are of a newer pyoutbox, not all there, or
    changed by hand; `ConfigurationError` for a version that is unknown, or below without ``downgrade``;
    `StoreUnavailable` where a lock was not had in time. Lets the driver's errors through, as SQLAlchemy raises them.
    """
    target = LATEST if to is None else _known(to)
    tables = tables_for(sa.MetaData(), schema, prefix)
    if not isinstance(where, (sa.Engine, sa.Connection)):
        raise ConfigurationError(
            f"migrate takes a sync Engine or Connection, not {type(where).__name__}; with an AsyncEngine: "
            "async with engine.begin() as connection: await connection.run_sync(outbox_migrations.migrate)"
        )
    if isinstance(where, sa.Engine):
        with alone(where, tables, patience) as (connection, commit, outside):
            require_schema(connection, tables)
            first = version_in(connection, tables, LATEST, drop=target == 0)
            # SQLite has one writer anyway; new tables of PostgreSQL appear all together
            whole = where.dialect.name == "sqlite" or (first == 0 and where.dialect.name == "postgresql")
            online = Online(lambda: connection, patience=patience, outside=outside, commit=None if whole else commit)
            return _migrate(online, connection, tables.schema, prefix, first, target, downgrade)
    with begin_alone(where, tables, patience):
        first = version_in(where, tables, LATEST, drop=target == 0)
        online = Online(lambda: where, patience=patience)
        return _migrate(online, where, tables.schema, prefix, first, target, downgrade)


class Planned(NamedTuple):
    """One operation that `migrate` would carry out: of which step, what it is, and who waits for whom meanwhile."""

    step: str
    what: str
    locks: str


def plan(
    connection: sa.Connection, *, to: int | None = None, schema: str | None = None, prefix: str = "outbox_"
) -> list[Planned]:
    """What ``migrate(engine, to=…)`` would do in this database. Reads only. Raises as `migrate` does."""
    target = LATEST if to is None else _known(to)
    tables = tables_for(sa.MetaData(), schema, prefix)
    require_schema(connection, tables)
    first = version_in(connection, tables, LATEST, seed=False, drop=target == 0)
    place = Place(connection.dialect.name, tables.schema, prefix)
    steps = _upwards(place, first, target) if target >= first else _downwards(place, first, target)
    found = [
        Planned(name, operation.what, operation.locks(place.dialect, fresh=first == 0, alone=True))
        for name, operations in steps
        for operation in operations
    ]
    return list(dict.fromkeys(found))


def script(
    dialect: str, *, to: int | None = None, start: int = 0, schema: str | None = None, prefix: str = "outbox_"
) -> str:
    """The SQL that brings the tables from version ``start`` to ``to`` (below it: downwards), for a DBA. ``dialect``:
    ``postgresql``, ``mysql``, ``mariadb`` or ``sqlite``. Connects to nothing. Raises `ConfigurationError`."""
    target = LATEST if to is None else _known(to)
    tables = tables_for(sa.MetaData(), schema, prefix)
    found = _script.dialect_of(dialect)
    place = Place(dialect, tables.schema, prefix)
    first = _known(start)
    steps = _upwards(place, first, target) if target >= first else _downwards(place, first, target)
    return "\n".join(_script.script(steps, found, fresh=first == 0)) + "\n"


# ---------------------------------------------------------------- an inbox in partitions


def partition_inbox(
    where: Operations | sa.Engine | sa.Connection,
    *,
    schema: str | None = None,
    prefix: str = "outbox_",
    patience: float = PATIENCE,
) -> bool:
    """Put the inbox into daily partitions (PostgreSQL), of which those that are over are dropped instead of deleted from;
    returns whether it was not yet. ``where``: ``op`` in a revision of yours, an ``Engine`` or a ``Connection``.

    A moment's ACCESS EXCLUSIVE lock on the inbox, for which it waits as `upgrade` does. What is in it is not copied: it
    becomes the default partition. `outbox cleanup` and the relays make the days, so one of them must run as the tables'
    owner. Raises `ConfigurationError` on another database, and as `upgrade` does.
    """
    return _partition(where, schema, prefix, patience, partitioned=True)


def unpartition_inbox(
    where: Operations | sa.Engine | sa.Connection,
    *,
    schema: str | None = None,
    prefix: str = "outbox_",
    patience: float = PATIENCE,
) -> bool:
    """The way back from `partition_inbox`. **Consumers wait while the days' rows are copied** (some seconds a million): run
    `outbox cleanup` before, and at a quiet hour. Raises as `partition_inbox` does, and `ConfigurationError` in a transaction
    of yours that is not READ COMMITTED: it would leave behind what is claimed while it waits for its lock."""
    return _partition(where, schema, prefix, patience, partitioned=False)


def plan_inbox(
    connection: sa.Connection, partitioned: bool, *, schema: str | None = None, prefix: str = "outbox_"
) -> list[Planned]:
    """What `partition_inbox`, or without ``partitioned`` `unpartition_inbox`, would do in this database. Reads only."""
    found = _partitions.operation(connection.dialect.name, schema, prefix, partitioned=partitioned)
    _require_latest(connection, schema, prefix)
    if found.done(connection):
        return []
    return [Planned("inbox", found.what, found.locks("postgresql", fresh=False, alone=True))]


def script_inbox(dialect: str, partitioned: bool, *, schema: str | None = None, prefix: str = "outbox_") -> str:
    """The SQL of it, for a DBA. Connects to nothing."""
    found = _partitions.operation(dialect, schema, prefix, partitioned=partitioned)
    return "\n".join(_script.script([("inbox", [found])], _script.dialect_of(dialect), fresh=False)) + "\n"


def _partition(
    where: Operations | sa.Engine | sa.Connection, schema: str | None, prefix: str, patience: float, partitioned: bool
) -> bool:
    tables = tables_for(sa.MetaData(), schema, prefix)
    if isinstance(where, sa.Engine):
        found = _partitions.operation(where.dialect.name, schema, prefix, partitioned=partitioned)
        with alone(where, tables, patience) as (connection, commit, _):
            connection.execution_options(isolation_level="READ COMMITTED")  # whatever the application's is
            return _carry_out(found, lambda: connection, patience, schema, prefix, commit)
    if isinstance(where, sa.Connection):
        found = _partitions.operation(where.dialect.name, schema, prefix, partitioned=partitioned)
        return _carry_out(found, lambda: where, patience, schema, prefix)
    context = where.get_context()
    found = _partitions.operation(context.dialect.name, schema, prefix, partitioned=partitioned)
    if context.as_sql:
        _write(where, [found], fresh=False)
        return True
    return _carry_out(found, where.get_bind, patience, schema, prefix)


def _carry_out(
    operation: Operation,
    connection: Callable[[], sa.Connection],
    patience: float,
    schema: str | None,
    prefix: str,
    commit: Callable[[], None] | None = None,
) -> bool:
    _require_latest(connection(), schema, prefix)
    if operation.done(connection()):
        return False
    if is_partitioned(connection(), operation.table):
        _partitions.require_read_committed(connection())
    Online(connection, patience=patience, commit=commit).carry_out([operation])
    return True


def _require_latest(connection: sa.Connection, schema: str | None, prefix: str) -> None:
    check_schema(connection, tables_for(sa.MetaData(), schema, prefix))


# ---------------------------------------------------------------- which steps


def _upwards(place: Place, start: int, target: int) -> Iterator[tuple[str, list[Operation]]]:
    checkpoint = _checkpoint(place)
    for version in range(start + 1, target + 1):
        step = STEPS[version - 1]
        yield step.name, [*step.upgrade(place), *note_version(checkpoint, version)]


def _downwards(place: Place, start: int, target: int) -> Iterator[tuple[str, list[Operation]]]:
    if target == 0 < start:
        yield STEPS[0].name, list(STEPS[0].downgrade(place))  # the tables, with what later steps added to them
        return
    checkpoint = _checkpoint(place)
    for version in range(start, target, -1):
        step = STEPS[version - 1]
        yield step.name, [*step.downgrade(place), *note_version(checkpoint, version - 1)]


def _checkpoint(place: Place) -> sa.Table:
    return tables_for(sa.MetaData(), place.schema, place.prefix).checkpoint


def _migrate(
    online: Online,
    connection: sa.Connection,
    schema: str | None,
    prefix: str,
    first: int,
    target: int,
    downgrade: bool,
) -> list[str]:
    if target < first and not downgrade:
        raise ConfigurationError(
            f"the tables have version {first}, and {target} is below it. "
            + ("Version 0 drops them with all that is in them. " if target == 0 else "")
            + "To go back say so: downgrade=True, or `outbox migrate --downgrade`"
        )
    place = Place(connection.dialect.name, schema, prefix)
    taken = []
    for name, operations in _upwards(place, first, target) if target >= first else _downwards(place, first, target):
        online.carry_out(operations)
        taken.append(name)
    if target == LATEST:
        check_schema(connection, tables_for(sa.MetaData(), schema, prefix))
    return taken


# ---------------------------------------------------------------- Alembic


def _outside(op: Operations) -> Any:
    """How to leave the revision's transaction: None where it is not Alembic's own."""
    context = op.get_context()
    if getattr(context, "_in_external_transaction", False):
        return None

    @contextmanager
    def outside() -> Iterator[sa.Connection]:
        block: AbstractContextManager[Any] = context.autocommit_block()
        with block:
            yield op.get_bind()

    return outside


def _write(op: Operations, operations: list[Operation], *, fresh: bool) -> None:
    """Operations into Alembic's script. It has no parameters, and not every ``env.py`` says ``literal_binds=True``."""
    context = op.get_context()
    dialect: sa.Dialect = context.dialect
    postgresql = dialect.name == "postgresql"
    in_use = postgresql and not fresh
    if in_use and any(operation.mode != "ROW EXCLUSIVE" for operation in operations):
        op.execute(sa.text(_script.SET_TIMEOUT))
    for operation in operations:
        if in_use and operation.beside is not None:
            with context.autocommit_block():
                for line in _script.beside_writers(operation, dialect):
                    op.execute(sa.text(line.replace(":", r"\:")))
            op.execute(sa.text(_script.SET_TIMEOUT))
        else:
            op.execute(sa.text(_script.sql(operation.statement, dialect).replace(":", r"\:")))
    if in_use:
        op.execute(sa.text(_script.RESET_TIMEOUT))


def _start(op: Operations, place: Place, start: int | None, *, unknown: int) -> int:
    if start is not None:
        return _known(start)
    known: dict[Place, int] = getattr(op.get_context(), "_outbox_versions", {})
    return known.get(place, unknown)


def _remember(op: Operations, place: Place, version: int) -> None:
    """What the tables are at this place of the script, for the revisions that follow in it."""
    context = op.get_context()
    context._outbox_versions = {**getattr(context, "_outbox_versions", {}), place: version}


def _known(version: int) -> int:
    if not isinstance(version, int) or isinstance(version, bool) or not 0 <= version <= LATEST:
        raise ConfigurationError(
            f"to={version!r}: this pyoutbox knows the outbox tables up to version {LATEST}; "
            "for a newer one: pip install -U pyoutbox"
        )
    return version


__all__ = [
    "LATEST",
    "STEPS",
    "Operations",
    "Planned",
    "downgrade",
    "grants",
    "include_object",
    "include_object_for",
    "migrate",
    "partition_inbox",
    "plan",
    "plan_inbox",
    "script",
    "script_inbox",
    "unpartition_inbox",
    "upgrade",
]
