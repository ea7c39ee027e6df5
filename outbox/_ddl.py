"""The tables as an SQL script, for those who migrate by hand: what ``metadata.create_all`` would execute, in words."""

from __future__ import annotations

from itertools import groupby
from typing import Any, Final

import sqlalchemy as sa

from outbox.errors import ConfigurationError
from outbox.tables import SCHEMA_VERSION, Tables, tables_for

# A driver that SQLAlchemy has for each; it is not imported.
_URLS: Final = {
    "postgresql": "postgresql+psycopg://",
    "mysql": "mysql+pymysql://",
    "mariadb": "mariadb+pymysql://",
    "sqlite": "sqlite://",
}

# The database makes this outbox's own id: a script that is written once may be run on several.
_NEW_ID: Final = {
    "postgresql": "gen_random_uuid()::text",
    "mysql": "uuid()",
    "mariadb": "uuid()",
    "sqlite": (
        "lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2) || '-a' ||"
        " substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6)))"
    ),
}


def script(tables: Tables, database: str) -> str:
    """Tables, indexes and the rows that they begin with. Raises `ConfigurationError` for an unknown database."""
    if database not in _URLS:
        raise ConfigurationError(f"ddl({database!r}): 'postgresql', 'mysql', 'mariadb' and 'sqlite' are possible")
    tables = tables_for(sa.MetaData(), tables.schema, tables.prefix)  # without what the user's metadata listens to
    found: list[tuple[Any, Any]] = []

    def note(statement: Any, parameters: Any = None, *rest: Any, **kw: Any) -> None:
        found.append((statement, parameters))

    engine = sa.create_mock_engine(_URLS[database], note)
    tables.metadata.create_all(engine, tables=tables.all, checkfirst=False)
    texts = [f"-- The outbox tables, version {SCHEMA_VERSION}. To be run once."]
    for are_indexes, run in groupby(found, lambda each: isinstance(each[0], sa.schema.CreateIndex)):
        written = [_text(statement, rows, engine.dialect) + ";" for statement, rows in run]
        texts += sorted(written) if are_indexes else written  # a table has a set of them
    return "\n\n".join(texts) + "\n"


def _text(statement: Any, rows: list[dict[str, Any]] | None, dialect: sa.Dialect) -> str:
    if isinstance(statement, sa.schema.ExecutableDDLElement):
        return str(statement.compile(dialect=dialect)).strip()
    assert rows is not None
    for row in rows:
        if row.get("name") == "outbox_id":
            row["value"] = sa.literal_column(_NEW_ID[dialect.name])
    return str(statement.values(rows).compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
