"""For Alembic before 1.18, which has no plugins: keep autogenerate away from tables that it does not know."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import sqlalchemy as sa

from outbox.tables import tables_for

PARTITION: Final = re.compile(r"_(default|d\d{8})$")
"""What the name of a partition of the inbox adds to the inbox's."""


def include_object_for(prefix: str = "outbox_") -> Callable[[Any, str | None, str, bool, Any], bool]:
    """`include_object` for tables of another prefix, in whatever schema."""
    names = frozenset(table.name for table in tables_for(sa.MetaData(), None, prefix).all)

    def include_object(object: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:
        if type_ == "column" and compare_to is not None and object.table.name in names:
            # only PostgreSQL makes an identity column of ours; with compare_server_default Alembic wants it everywhere
            return object.identity is None or compare_to.identity is not None
        unknown = type_ == "table" and reflected and compare_to is None
        parent = PARTITION.sub("", name or "")
        return not (unknown and (name in names or (parent != name and parent == f"{prefix}inbox")))

    return include_object


_default = include_object_for()


def include_object(object: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:
    """For ``context.configure(include_object=…)`` in ``env.py``: False for outbox tables that are in the database and
    not in your metadata (``env.py`` does not import the module with your `Outbox`), which autogenerate would drop, and for
    identity columns of ours where the database has none.

    Knows the default prefix only (`include_object_for` another). Not needed with Alembic 1.18 or newer, where the plugin
    sees to it.
    """
    return _default(object, name, type_, reflected, compare_to)
