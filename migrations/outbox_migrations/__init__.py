"""The outbox tables in versioned steps. One source for a revision of yours (`upgrade`, `downgrade`), for
``outbox migrate`` (`migrate`) and, through the Alembic plugin, for ``alembic revision --autogenerate``.

Version 0 is no tables at all. Alembic is not needed to import this, nor for `migrate`.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import sqlalchemy as sa

from outbox import ConfigurationError
from outbox.tables import Tables, tables_for
from outbox_migrations._filter import include_object
from outbox_migrations._step import Place, Step
from outbox_migrations._version import begin_alone, version_in
from outbox_migrations.v0001_tables import STEP as TABLES

STEPS: Final[tuple[Step, ...]] = (TABLES,)
"""Step n, counted from 1, makes version n out of version n - 1. What was released is never changed, only added to."""

LATEST: Final = len(STEPS)
"""The version that this pyoutbox works with."""


class Operations(Protocol):
    """What is used of Alembic's ``op``."""

    def get_context(self) -> Any: ...

    def get_bind(self) -> sa.Connection: ...

    def execute(self, sqltext: Any, /) -> None: ...


def upgrade(op: Operations, to: int | None = None, *, schema: str | None = None, prefix: str = "outbox_") -> None:
    """Bring the tables to version ``to`` (None: `LATEST`), in a revision of yours: ``outbox_migrations.upgrade(op, to=1)``.

    Write the number down: a revision should do the same in two years. Tables are created and seeded: version, this
    outbox's own id, number of buckets, one lease row a bucket. Online, only the steps that the database has not had
    are run; offline (``--sql``) the database cannot be asked, and all steps up to ``to`` are written out. ``schema``,
    which must exist, and ``prefix`` are those of your `Outbox`. It runs in the revision's transaction.

    Raises `ConfigurationError` for a version that this pyoutbox does not know, `SchemaMismatch` where the database has
    tables of a newer one, or tables that are not all there.
    """
    target = LATEST if to is None else _known(to)
    place, offline = _place(op, schema, prefix)
    start = 0 if offline else version_in(op.get_bind(), place.tables, LATEST)
    _ascend(place, start, target)


def downgrade(op: Operations, to: int = 0, *, schema: str | None = None, prefix: str = "outbox_") -> None:
    """Bring the tables back to version ``to``, inside a revision of yours.

    Version 0 **drops the tables with all that is in them**: messages that were committed and not sent yet, dead letters,
    and the inbox, without which a message that comes again has its effect again. Drain the outbox first.

    Raises as `upgrade` does.
    """
    _known(to)
    place, offline = _place(op, schema, prefix)
    start = LATEST if offline else version_in(op.get_bind(), place.tables, LATEST)
    for version in range(start, to, -1):
        STEPS[version - 1].downgrade(place)
        if version > 1:
            place.record(version - 1)


def migrate(connection: sa.Connection, *, schema: str | None = None, prefix: str = "outbox_") -> list[str]:
    """Bring the tables to `LATEST` where there is no Alembic; returns the names of the steps that it took.

    Runs in the transaction of ``connection``, which the caller commits: all or nothing, on SQLite too. Called again it
    does nothing; of two processes that call it at once, the second waits for the first. Tables that ``create_all`` made
    are checked, seeded and left alone.

    Raises `SchemaMismatch` where the schema does not exist, where the tables are of a newer pyoutbox, or are not all
    there. Lets the driver's errors through, as SQLAlchemy raises them.
    """
    tables = tables_for(sa.MetaData(), schema, prefix)
    begin_alone(connection, tables)
    return _ascend(
        Place(tables, connection.dialect.name, connection.execute), version_in(connection, tables, LATEST), LATEST
    )


def _ascend(place: Place, start: int, target: int) -> list[str]:
    taken = []
    for version in range(start + 1, target + 1):
        step = STEPS[version - 1]
        step.upgrade(place)
        place.record(version)
        taken.append(step.name)
    return taken


def _place(op: Operations, schema: str | None, prefix: str) -> tuple[Place, bool]:
    tables: Tables = tables_for(sa.MetaData(), schema, prefix)
    context = op.get_context()
    dialect: sa.Dialect = context.dialect
    if not context.as_sql:
        return Place(tables, dialect.name, op.execute), False
    return Place(tables, dialect.name, lambda statement: op.execute(_without_parameters(statement, dialect))), True


def _without_parameters(statement: Any, dialect: sa.Dialect) -> Any:
    """A script has no parameters, and not every ``env.py`` says ``literal_binds=True``."""
    if isinstance(statement, sa.schema.ExecutableDDLElement):
        return statement
    sql = str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
    return sa.text(sql.replace(":", r"\:"))


def _known(version: int) -> int:
    if not isinstance(version, int) or not 0 <= version <= LATEST:
        raise ConfigurationError(
            f"to={version!r}: this pyoutbox knows the outbox tables up to version {LATEST}; "
            "for a newer one: pip install -U pyoutbox"
        )
    return version


__all__ = ["LATEST", "STEPS", "Operations", "downgrade", "include_object", "migrate", "upgrade"]
