"""For Alembic before 1.18, which has no plugins: keep autogenerate away from tables that it does not know."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa

from outbox.tables import Tables, tables_for

_OURS: Final[Tables] = tables_for(sa.MetaData(), None, "outbox_")
_NAMES: Final = frozenset(table.name for table in _OURS.all)


def include_object(object: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:
    """For ``context.configure(include_object=…)`` in ``env.py``: False for outbox tables that are in the database and
    not in your metadata (``env.py`` does not import the module with your `Outbox`), which autogenerate would drop.

    Knows the default prefix only. Not needed with Alembic 1.18 or newer, where the plugin sees to it.
    """
    return not (type_ == "table" and reflected and compare_to is None and name in _NAMES)
