"""What the Alembic plugin does; imported by it when autogenerate runs."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from alembic.autogenerate.api import AutogenContext
from alembic.autogenerate.render import renderers
from alembic.operations import ops

from outbox.tables import is_prefix, tables_for
from outbox_migrations import LATEST
from outbox_migrations._filter import PARTITION

_NAMES: Final = frozenset(table.name.removeprefix("x_") for table in tables_for(sa.MetaData(), None, "x_").all)

Place = tuple[str | None, str]
"""Schema and name of a table, or schema and prefix of all. The schema is None where it is the database's default."""


class Upgrade(ops.MigrateOperation):
    """``outbox_migrations.upgrade(op, to=…)`` in a revision; ``start`` is the version that the tables have before it."""

    def __init__(self, to: int, start: int, schema: str | None, prefix: str) -> None:
        self.to, self.start, self.schema, self.prefix = to, start, schema, prefix

    def reverse(self) -> Downgrade:
        return Downgrade(self.start, self.to, self.schema, self.prefix)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        return ("outbox_upgrade", self.to, self.schema, self.prefix)


class Downgrade(ops.MigrateOperation):
    """``outbox_migrations.downgrade(op, to=…)`` in a revision."""

    def __init__(self, to: int, start: int, schema: str | None, prefix: str) -> None:
        self.to, self.start, self.schema, self.prefix = to, start, schema, prefix

    def reverse(self) -> Upgrade:
        return Upgrade(self.start, self.to, self.schema, self.prefix)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        return ("outbox_downgrade", self.to, self.schema, self.prefix)


@renderers.dispatch_for(Upgrade)
@renderers.dispatch_for(Downgrade)
def _render(autogen_context: AutogenContext, op: Upgrade | Downgrade) -> str:
    autogen_context.imports.add("import outbox_migrations")
    # only a script (--sql) needs to be told where it starts, and only where that is not nothing at all
    where = f", start={op.start}" if min(op.start, op.to) > 0 else ""
    where += "" if op.schema is None else f", schema={op.schema!r}"
    where += "" if op.prefix == "outbox_" else f", prefix={op.prefix!r}"
    return f"outbox_migrations.{type(op).__name__.lower()}(op, to={op.to}{where})"


def is_ours(table: sa.Table) -> bool:
    """Whether a table of the user's metadata is one of a whole set of ours."""
    names = {other.name for other in table.metadata.tables.values() if other.schema == table.schema}
    prefixes = [table.name.removesuffix(name) for name in _NAMES if table.name.endswith(name)]
    return any(names.issuperset(prefix + name for name in _NAMES) for prefix in prefixes)


def render_ours(autogen_context: AutogenContext, upgrade_ops: ops.UpgradeOps) -> None:
    """Put one line for the operations that create a whole set of our tables, or that alter one of an older version."""
    for (schema, prefix), places in _sets(autogen_context, upgrade_ops, ops.CreateTableOp):
        # without include_schemas Alembic does not see that they are there
        there = _version(autogen_context, schema, prefix) or 0
        _replace(
            autogen_context, upgrade_ops, places, Upgrade(LATEST, there, schema, prefix) if there < LATEST else None
        )
    for schema, prefix in _known(autogen_context):
        older = _version(autogen_context, schema, prefix)
        if older is not None and older < LATEST and not _is_in(upgrade_ops, schema, prefix):
            places = {(schema, prefix + ours) for ours in _NAMES}
            _replace(autogen_context, upgrade_ops, places, Upgrade(LATEST, older, schema, prefix))


def _replace(
    autogen_context: AutogenContext, upgrade_ops: ops.UpgradeOps, places: set[Place], by: Upgrade | None
) -> None:
    first = next((i for i, op in enumerate(upgrade_ops.ops) if _place(op, autogen_context) in places), 0)
    if by is not None:
        upgrade_ops.ops.insert(first, by)
    upgrade_ops.ops[:] = [op for op in upgrade_ops.ops if _place(op, autogen_context) not in places]


def _is_in(upgrade_ops: ops.UpgradeOps, schema: str | None, prefix: str) -> bool:
    return any(isinstance(op, Upgrade) and (op.schema, op.prefix) == (schema, prefix) for op in upgrade_ops.ops)


def _known(autogen_context: AutogenContext) -> list[Place]:
    """Schema and prefix of the whole sets of our tables in the user's metadata."""
    tables = {_in_default(table.schema, table.name, autogen_context) for table in autogen_context.sorted_tables}
    return _whole(tables)


def _version(autogen_context: AutogenContext, schema: str | None, prefix: str) -> int | None:
    """The version that the database's tables say they have; None where there are none, or they say nothing."""
    connection = autogen_context.connection
    if connection is None:
        return None
    checkpoint = tables_for(sa.MetaData(), schema, prefix).checkpoint
    if not sa.inspect(connection).has_table(checkpoint.name, schema=schema):
        return None
    found = connection.scalar(sa.select(checkpoint.c.value).where(checkpoint.c.name == "schema_version"))
    return int(found) if found is not None and found.isdecimal() else None


def keep_ours(autogen_context: AutogenContext, upgrade_ops: ops.UpgradeOps) -> None:
    """Take out the operations that drop a whole set of our tables: only `downgrade` does that. And those that drop
    partitions of an inbox of ours, which are in nobody's metadata."""
    whole = _sets(autogen_context, upgrade_ops, ops.DropTableOp)
    ours = {place for _, places in whole for place in places}
    parents = {
        (schema, f"{prefix}inbox") for schema, prefix in (*_known(autogen_context), *(found for found, _ in whole))
    }

    def keeps(op: ops.MigrateOperation) -> bool:
        place = _place(op, autogen_context)
        if place is None:
            return False
        parent = PARTITION.sub("", place[1])
        return place in ours or (parent != place[1] and (place[0], parent) in parents)

    upgrade_ops.ops[:] = [op for op in upgrade_ops.ops if not keeps(op)]


def _sets(
    autogen_context: AutogenContext, upgrade_ops: ops.UpgradeOps, kind: type[ops.CreateTableOp | ops.DropTableOp]
) -> list[tuple[Place, set[Place]]]:
    """Whole sets of our tables among the tables that are created or dropped: schema and prefix, and each table's place."""
    found = {place for op in upgrade_ops.ops if isinstance(op, kind) and (place := _place(op, autogen_context))}
    return [((schema, prefix), {(schema, prefix + ours) for ours in _NAMES}) for schema, prefix in _whole(found)]


def _whole(tables: set[Place]) -> list[Place]:
    """Schema and prefix of each whole set of our tables among these.

    By their names, not by the `Outbox`: the metadata may hold copies (``Table.to_metadata``), or none at all.
    """
    sets = []
    for schema, name in sorted(tables, key=str):
        prefix = name.removesuffix("message")
        if is_prefix(prefix) and prefix != name and tables >= {(schema, prefix + ours) for ours in _NAMES}:
            sets.append((schema, prefix))
    return sets


def _place(op: ops.MigrateOperation, autogen_context: AutogenContext) -> Place | None:
    if not isinstance(op, (ops.CreateTableOp, ops.DropTableOp, ops.ModifyTableOps)):
        return None
    return _in_default(op.schema, op.table_name, autogen_context)


def _in_default(schema: str | None, name: str, autogen_context: AutogenContext) -> Place:
    dialect = autogen_context.dialect
    is_default = dialect is not None and schema == dialect.default_schema_name
    return (None if is_default else schema, name)
