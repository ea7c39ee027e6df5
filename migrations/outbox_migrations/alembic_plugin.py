"""Alembic's plugin (1.18 or newer), by the entry point group ``alembic.plugins``: what autogenerate says of our tables.

- Where they are missing it renders the one line ``outbox_migrations.upgrade(op, to=…)``, which also seeds them, in
  place of two hundred lines that name types of ours without importing them. Where they are of an older version, too: for
  what no comparison of columns sees, such as storage settings.
- Where they are in the database and not in the metadata (``env.py`` does not import the module with the `Outbox`) it
  leaves them alone, where Alembic would drop them.
- On databases that have no identity columns it sees no difference in those that only PostgreSQL makes.

The entry point's name begins with ``alembic.autogenerate.``, so that it is on without a line in ``env.py``; out with
``autogenerate_plugins=["alembic.autogenerate.*", "~alembic.autogenerate.outbox"]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alembic.runtime.plugins import Plugin


def setup(plugin: Plugin) -> None:
    """Called by Alembic while it is being imported itself: what needs more of it is imported later."""
    from alembic.util import DispatchPriority

    plugin.add_autogenerate_comparator(_tables, "autogenerate", "outbox", priority=DispatchPriority.LAST)
    for database in ("sqlite", "mysql", "mariadb"):
        plugin.add_autogenerate_comparator(
            _identity, "column", "server_default", qualifier=database, priority=DispatchPriority.FIRST
        )


def _tables(autogen_context: Any, upgrade_ops: Any) -> Any:
    from alembic.util import PriorityDispatchResult

    from outbox_migrations._autogenerate import keep_ours, render_ours

    render_ours(autogen_context, upgrade_ops)
    keep_ours(autogen_context, upgrade_ops)
    return PriorityDispatchResult.CONTINUE


def _identity(
    autogen_context: Any, alter_column_op: Any, schema: Any, tname: Any, cname: Any, conn_col: Any, metadata_col: Any
) -> Any:
    from alembic.util import PriorityDispatchResult

    from outbox_migrations._autogenerate import is_ours

    if metadata_col.identity is not None and is_ours(metadata_col.table):
        return PriorityDispatchResult.STOP
    return PriorityDispatchResult.CONTINUE
