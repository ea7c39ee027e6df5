"""Are these tables still as the migrations made them? Compared so that nothing is said of what does no harm: a longer column,
a wider index, a column of the user's own, another name.

A difference is said with the statement that mends it, since whoever changed the table knew one too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.schema import AddConstraint, CreateColumn, CreateIndex

from outbox.tables import Tables

# An index whose concurrent creation was cut off is in the catalogue, costs every insert, and serves no query.
INVALID_INDEXES: Final = sa.text(
    "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid"
    " JOIN pg_namespace n ON n.oid = t.relnamespace"
    " WHERE NOT i.indisvalid AND t.relname = ANY(:tables) AND n.nspname = coalesce(:schema, current_schema())"
)
# SHOW CREATE TABLE leaves out a collation that is the table's default.
MYSQL_COLLATIONS: Final = sa.text(
    "SELECT TABLE_NAME, COLUMN_NAME, COLLATION_NAME FROM information_schema.COLUMNS"
    " WHERE TABLE_SCHEMA = coalesce(:schema, database()) AND TABLE_NAME IN :tables AND COLLATION_NAME IS NOT NULL"
).bindparams(sa.bindparam("tables", expanding=True))
MYSQL_ENGINES: Final = sa.text(
    "SELECT TABLE_NAME, ENGINE FROM information_schema.TABLES"
    " WHERE TABLE_SCHEMA = coalesce(:schema, database()) AND TABLE_NAME IN :tables"
).bindparams(sa.bindparam("tables", expanding=True))
# Without AUTOINCREMENT a position is given out again after its row was deleted.
SQLITE_TABLE: Final = "SELECT sql FROM {schema}sqlite_master WHERE type = 'table' AND name = ?"


@dataclass(frozen=True)
class Difference:
    """What is wrong with a table, and the statement that mends it (None: there is none)."""

    what: str
    mend: str | None


def differences(connection: sa.Connection, inspector: sa.Inspector, tables: Tables) -> list[Difference]:
    """Whatever was changed by hand and matters. Some catalogue queries for all tables together."""
    shapes = _Shapes(connection, inspector, tables)
    return [difference for table in tables.all for difference in shapes.of(table)]


class _Shapes:
    def __init__(self, connection: sa.Connection, inspector: sa.Inspector, tables: Tables) -> None:
        names = [table.name for table in tables.all]
        self._connection, self._dialect, self._tables = connection, connection.dialect, tables
        asked: dict[str, Any] = {"schema": tables.schema, "filter_names": names}
        self._columns = _by_name(inspector.get_multi_columns(**asked))
        self._keys = _by_name(inspector.get_multi_pk_constraint(**asked))
        self._unique = _by_name(inspector.get_multi_unique_constraints(**asked))
        self._indexes = _by_name(inspector.get_multi_indexes(**asked))
        self._checks = _by_name(inspector.get_multi_check_constraints(**asked))
        self._collations: dict[tuple[str, str], str] = {}
        self._engines: dict[str, str] = {}
        if self._dialect.name in _MYSQL:
            rows = connection.execute(MYSQL_COLLATIONS, {"tables": names, "schema": tables.schema})
            self._collations = {(table, column): collation for table, column, collation in rows}
            engines = connection.execute(MYSQL_ENGINES, {"tables": names, "schema": tables.schema})
            self._engines = {table: engine for table, engine in engines}  # noqa: C416  # dict() of rows: typed differently
        self._invalid: set[str] = set()
        if self._dialect.name == "postgresql":
            found = connection.scalars(INVALID_INDEXES, {"tables": names, "schema": tables.schema})
            self._invalid = set(found)

    def of(self, table: sa.Table) -> Iterator[Difference]:
        engine = self._engines.get(table.name, "InnoDB")
        if engine != "InnoDB":
            yield self._difference(f"{table.fullname} is of {engine}, expected InnoDB", "ENGINE=InnoDB", table)
        there = {column["name"]: column for column in self._columns.get(table.name, ())}
        for column in table.columns:
            if column.name not in there:
                yield self._difference(
                    f"{_full(column)} is missing (expected {self._spec(column)})",
                    f"ADD COLUMN {self._column(column)}",
                    table,
                )
            else:
                yield from self._column_differs(column, there[column.name])
        for name, found in there.items():
            if name not in table.columns and _refuses_our_inserts(found):
                yield Difference(
                    f"{table.fullname}.{name} is no column of ours, and NOT NULL without a default, so that inserts fail",
                    f"give it a default, or drop it: {self._alter(table)} DROP COLUMN {self._quote(name)}",
                )
        if not table.columns.keys() - there.keys():
            yield from self._keys_differ(table)

    # ------------------------------------------------------------ columns

    def _column_differs(self, column: sa.Column[Any], found: Mapping[str, Any]) -> Iterator[Difference]:
        expected, actual = self._type(column.type), self._type(found["type"])
        collation = self._collations.get((column.table.name, column.name))
        if collation and "COLLATE" not in actual:
            actual += f" COLLATE {collation}"
        if not _serves(expected, actual, self._dialect.name):
            yield self._changed(column, f"has the type {actual}, expected {expected}", f"TYPE {expected}")
        if not column.nullable and found["nullable"] and not (self._sqlite and column.primary_key):
            yield self._changed(column, "may be NULL, expected NOT NULL", "SET NOT NULL")
        if column.nullable and not found["nullable"]:
            yield self._changed(column, "is NOT NULL, expected that it may be NULL", "DROP NOT NULL")
        if column.identity is not None:
            yield from self._identity_differs(column, found)
        elif column.server_default is not None and found["default"] is None:
            default = self._column(column).partition(" DEFAULT ")[2].removesuffix(" NOT NULL")
            yield self._changed(column, f"has no default, expected {default}", f"SET DEFAULT {default}")

    def _identity_differs(self, column: sa.Column[Any], found: Mapping[str, Any]) -> Iterator[Difference]:
        expected = self._spec(column)
        if self._sqlite:
            schema = f"{self._quote(self._tables.schema)}." if self._tables.schema else ""
            asked = (SQLITE_TABLE.format(schema=schema), (column.table.name,))
            text = self._connection.exec_driver_sql(*asked).scalar()
            if text is not None and "AUTOINCREMENT" not in text.upper():
                yield self._changed(
                    column, "is without AUTOINCREMENT, so that numbers of deleted rows are given out again", None
                )
            return
        identity = found.get("identity")
        if identity is None and found.get("autoincrement") is not True and "nextval" not in str(found["default"]):
            yield self._changed(
                column, f"is not numbered by the database, expected {expected}", "ADD GENERATED BY DEFAULT AS IDENTITY"
            )
        elif identity and column.name == "position" and (identity.get("cache") or 1) > 1:
            yield self._changed(
                column,
                f"is numbered with CACHE {identity['cache']}, so that sessions take numbers out of order; expected CACHE 1",
                "SET CACHE 1",
            )

    def _changed(self, column: sa.Column[Any], what: str, change: str | None) -> Difference:
        name = self._quote(column.name)
        if change is None or self._sqlite:
            return Difference(f"{_full(column)} {what}", None)
        if self._dialect.name != "postgresql":
            return self._difference(f"{_full(column)} {what}", f"MODIFY COLUMN {self._column(column)}", column.table)
        if change.startswith("TYPE "):
            change += f" USING {name}::{change.removeprefix('TYPE ')}"
        return self._difference(f"{_full(column)} {what}", f"ALTER COLUMN {name} {change}", column.table)

    # ------------------------------------------------------------ keys, indexes, checks

    def _keys_differ(self, table: sa.Table) -> Iterator[Difference]:
        primary = self._keys.get(table.name, {}).get("constrained_columns") or []
        unique = [found["column_names"] for found in self._unique.get(table.name, ())]
        indexes = [index for index in self._indexes.get(table.name, ()) if index["name"] not in self._invalid]
        unique += [index["column_names"] for index in indexes if index["unique"] and not _is_partial(index)]
        for constraint in table.constraints:
            if isinstance(constraint, sa.CheckConstraint):
                if not any("bucket" in found["sqltext"] for found in self._checks.get(table.name, ())):
                    what = f"{table.fullname} lacks the check that its bucket is one that a relay owns"
                    yield self._without(constraint, what)
                continue
            assert isinstance(constraint, (sa.PrimaryKeyConstraint, sa.UniqueConstraint))
            columns = [column.name for column in constraint.columns]
            kind = "primary key" if isinstance(constraint, sa.PrimaryKeyConstraint) else "unique key"
            there = [primary, *unique] if kind == "unique key" else [primary]
            if not any(set(found) == set(columns) for found in there):
                had = f" (found {_listed(primary)})" if kind == "primary key" and primary else ""
                yield self._without(constraint, f"{table.fullname} lacks the {kind} {_listed(columns)}{had}")
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            columns = [column.name for column in index.columns]
            using = index.dialect_options["postgresql"]["using"] or "btree"
            if not any(_begins_with(found, columns) for found in [primary, *unique]) and not any(
                _begins_with(found["column_names"], columns) and _usable(found, using) for found in indexes
            ):
                broken = " (an attempt to build it was cut off)" if index.name in self._invalid else ""
                yield Difference(
                    f"{table.fullname} lacks an index on {_listed(columns)}{broken}", self._create(index, bool(broken))
                )

    def _without(self, constraint: sa.Constraint, what: str) -> Difference:
        if self._sqlite:
            return Difference(what, None)
        return Difference(what, _one_line(AddConstraint(constraint).compile(dialect=self._dialect)))

    def _create(self, index: sa.Index, broken: bool) -> str:
        text = _one_line(CreateIndex(index).compile(dialect=self._dialect))
        if self._dialect.name != "postgresql":
            return text
        schema = f"{self._quote(self._tables.schema)}." if self._tables.schema else ""
        drop = f"DROP INDEX CONCURRENTLY {schema}{self._quote(str(index.name))}; " if broken else ""
        return drop + text.replace("CREATE INDEX ", "CREATE INDEX CONCURRENTLY ", 1)

    # ------------------------------------------------------------ words

    @property
    def _sqlite(self) -> bool:
        return self._dialect.name == "sqlite"

    def _type(self, type_: sa.types.TypeEngine[Any]) -> str:
        while hasattr(type_, "data_type"):  # a domain is as good as what it is made of
            type_ = type_.data_type
        if isinstance(type_, sa.types.NullType):
            return ""  # what SQLAlchemy does not know, nobody can compare
        return str(type_.compile(dialect=self._dialect))

    def _column(self, column: sa.Column[Any]) -> str:
        return _one_line(CreateColumn(column).compile(dialect=self._dialect))

    def _spec(self, column: sa.Column[Any]) -> str:
        return self._column(column).removeprefix(self._quote(column.name)).strip()

    def _difference(self, what: str, change: str, table: sa.Table) -> Difference:
        return Difference(what, f"{self._alter(table)} {change}")

    def _alter(self, table: sa.Table) -> str:
        return f"ALTER TABLE {self._dialect.identifier_preparer.format_table(table)}"

    def _quote(self, name: str | None) -> str:
        return str(self._dialect.identifier_preparer.quote(name or ""))


# ---------------------------------------------------------------- types

_INTEGERS: Final = {"TINYINT": 1, "SMALLINT": 2, "MEDIUMINT": 3, "INTEGER": 4, "INT": 4, "BIGINT": 8}
_TEXTS: Final = {"TINYTEXT": 255, "TEXT": 65_535, "MEDIUMTEXT": 1 << 24, "LONGTEXT": 1 << 32, "CLOB": 1 << 32}
_BYTES: Final = {"TINYBLOB": 255, "BLOB": 65_535, "MEDIUMBLOB": 1 << 24, "LONGBLOB": 1 << 32, "BYTEA": 1 << 32}
_CHARACTERS: Final = ("VARCHAR", "CHAR", "CHARACTER VARYING", "NVARCHAR", "NCHAR", "CHARACTER")
_MYSQL: Final = ("mysql", "mariadb")


def _serves(expected: str, found: str, dialect: str) -> bool:
    """Whether a column of the type ``found`` takes and gives back what one of ``expected`` does."""
    if not found or expected == found:
        return True
    kind, size = _family(expected, dialect)
    other, enough = _family(found, dialect)
    if kind != other:
        return False
    by_bytes = r"COLLATE \w*bin"
    if re.search(by_bytes, expected) and "COLLATE" in found and not re.search(by_bytes, found):
        return False  # compared without case, the keys 'a' and 'A' are one
    return dialect == "sqlite" or enough >= size


def _family(type_: str, dialect: str) -> tuple[str, int]:
    """What sort of type it is, and how much it holds."""
    match = re.match(r"([A-Z_ ]+?)\s*(?:\((\d+)[^)]*\))?(?:\s+(.*))?$", type_, re.IGNORECASE | re.DOTALL)
    name = (match[1] if match else type_).upper()
    number = int(match[2]) if match and match[2] else None
    rest = ((match[3] if match else "") or "").upper()
    first = name.split()[0]
    if first in _INTEGERS:
        return "integer", _INTEGERS[first]
    if first in _BYTES:
        return "bytes", _BYTES[first]
    if dialect == "sqlite":  # which keeps text, times and ids alike, as text
        return ("text", 0) if first in (*_CHARACTERS, *_TEXTS, "DATETIME", "TIMESTAMP", "UUID") else (name, 0)
    if first in _TEXTS:
        return "text", _TEXTS[first] if dialect in _MYSQL else 1 << 32
    if name in _CHARACTERS or first in _CHARACTERS:
        return "text", 1 << 32 if number is None and first != "CHAR" else number or 1
    if first in ("TIMESTAMP", "DATETIME"):
        zone = "with" if "WITH TIME ZONE" in f"{name} {rest}" else "without"
        return f"{first} {zone}", number if number is not None else (0 if dialect in _MYSQL else 6)
    return name, number or 0


# ---------------------------------------------------------------- small questions


def _by_name(found: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: value for (_, name), value in found.items()}


def _full(column: sa.Column[Any]) -> str:
    return f"{column.table.fullname}.{column.name}"


def _listed(columns: Iterable[str]) -> str:
    return f"({', '.join(columns)})"


def _one_line(compiled: object) -> str:
    return " ".join(str(compiled).split())


def _refuses_our_inserts(found: Mapping[str, Any]) -> bool:
    by_itself = found["default"] is not None or found.get("computed") or found.get("identity")
    return not found["nullable"] and not by_itself and found.get("autoincrement") is not True


def _begins_with(found: list[str | None], columns: list[str]) -> bool:
    return found[: len(columns)] == columns


def _options(index: Mapping[str, Any]) -> Mapping[str, Any]:
    options: Mapping[str, Any] = index.get("dialect_options", {})
    return options


def _is_partial(index: Mapping[str, Any]) -> bool:
    return any(name.endswith("_where") for name in _options(index))


def _usable(index: Mapping[str, Any], using: str) -> bool:
    """A btree serves for whatever was expected; something else only where it was."""
    return not _is_partial(index) and _options(index).get("postgresql_using", "btree") in ("btree", using)
