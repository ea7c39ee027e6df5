"""What the Alembic plugin does; imported by it when autogenerate runs."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from alembic.autogenerate.api import AutogenContext
from alembic.autogenerate.render import renderers
from alembic.operations import ops

from outbox.tables import tables_for
from outbox_migrations import LATEST

_NAMES: Final = frozenset(table.name.removeprefix("x_") for table in tables_for(sa.MetaData(), None, "x_").all)

Place = tuple[str | None, str]
"""Schema and name of a table, or schema and prefix of all. The schema is None where it is the database's default."""


class Upgrade(ops.MigrateOperation):
    """``outbox_migrations.upgrade(op, to=…)`` in a revision."""

    def __init__(self, to: int, schema: str | None, prefix: str) -> None:
        self.to, self.schema, self.prefix = to, schema, prefix

    def reverse(self) -> Downgrade:
        return Downgrade(0, self.schema, self.prefix)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        return ("outbox_upgrade", self.to, self.schema, self.prefix)


class Downgrade(ops.MigrateOperation):
    """``outbox_migrations.downgrade(op, to=…)`` in a revision."""

    def __init__(self, to: int, schema: str | None, prefix: str) -> None:
        self.to, self.schema, self.prefix = to, schema, prefix

    def reverse(self) -> Upgrade:
        return Upgrade(LATEST, self.schema, self.prefix)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        return ("outbox_downgrade", self.to, self.schema, self.prefix)


@renderers.dispatch_for(Upgrade)
@renderers.dispatch_for(Downgrade)
def _render(autogen_context: AutogenContext, op: Upgrade | Downgrade) -> str:
    autogen_context.imports.add("import outbox_migrations")
    where = "" if op.schema is None else f", schema={op.schema!r}"
    where += "" if op.prefix == "outbox_" else f", prefix={op.prefix!r}"
    return f"outbox_migrations.{type(op).__name__.lower()}(op, to={op.to}{where})"


def is_ours(table: sa.Table) -> bool:
    """Whether a table of the user's metadata is one of a whole set of ours."""
    names = {other.name for other in table.metadata.tables.values() if other.schema == table.schema}
    prefixes = [table.name.removesuffix(name) for name in _NAMES if table.name.endswith(name)]
    return any(names.issuperset(prefix + name for name in _NAMES) for prefix in prefixes)


def render_ours(autogen_context: AutogenContext, upgrade_ops: ops.UpgradeOps) -> None:
    """Put one line for the operations that create a whole set of our tables."""
    for (schema, prefix), places in _sets(autogen_context, upgrade_ops, ops.CreateTableOp):
        first = next(i for i, op in enumerate(upgrade_ops.ops) if _place(op, autogen_context) in places)
        upgrade_ops.ops.insert(first, Upgrade(LATEST, schema, prefix))
        upgrade_ops.ops[:] = [op for op in upgrade_ops.ops if _place(op, autogen_context) not in places]


def keep_ours(autogen_context: AutogenContext, upgrade_ops: ops.UpgradeOps) -> None:
    """Take out the operations that drop a whole set of our tables: only `downgrade` does that."""
    for _, places in _sets(autogen_context, upgrade_ops, ops.DropTableOp):
        upgrade_ops.ops[:] = [op for op in upgrade_ops.ops if _place(op, autogen_context) not in places]


def _sets(
    autogen_context: AutogenContext, upgrade_ops: ops.UpgradeOps, kind: type[ops.CreateTableOp | ops.DropTableOp]
) -> list[tuple[Place, set[Place]]]:
    """Whole sets of our tables among the tables that are created or dropped: schema and prefix, and each table's place.

    By their names, not by the `Outbox`: the metadata may hold copies (``Table.to_metadata``), or none at all.
    """
    found = {place for op in upgrade_ops.ops if isinstance(op, kind) and (place := _place(op, autogen_context))}
    sets = []
    for schema, name in sorted(found, key=str):
        prefix = name.removesuffix("message")
        places: set[Place] = {(schema, prefix + ours) for ours in _NAMES}
        if prefix != name and places <= found:
            sets.append(((schema, prefix), places))
    return sets


def _place(op: ops.MigrateOperation, autogen_context: AutogenContext) -> Place | None:
    if not isinstance(op, (ops.CreateTableOp, ops.DropTableOp, ops.ModifyTableOps)):
        return None
    dialect = autogen_context.dialect
    in_default = dialect is not None and op.schema == dialect.default_schema_name
    return (None if in_default else op.schema, op.table_name)
