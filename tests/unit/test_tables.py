"""The tables: whose metadata they join, where they are, what they are called, in every database's DDL."""

from __future__ import annotations

import datetime as dt
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.schema import CreateIndex, CreateTable

from outbox import ConfigurationError, Outbox
from outbox.dialects import clock, insert_if_absent, was_absent
from outbox.tables import SCHEMA_VERSION, Tables

NAMES = {
    *("message", "scheduled", "parked", "dead_letter", "audit", "inbox", "attempt", "sent", "lease", "relay"),
    "checkpoint",
}


def names(metadata: sa.MetaData) -> set[str]:
    return set(metadata.tables)


# ---------------------------------------------------------------- which tables


def test_the_tables_join_the_users_metadata() -> None:
    class Base(DeclarativeBase):
        pass

    outbox = Outbox(Base.metadata)
    assert outbox.metadata is Base.metadata
    assert names(Base.metadata) == {f"outbox_{name}" for name in NAMES}
    assert {table.name for table in outbox.tables.all} == names(Base.metadata)


def test_without_metadata_an_outbox_has_its_own() -> None:
    assert Outbox().metadata is not Outbox().metadata


def test_a_second_outbox_on_the_same_metadata_is_the_same_tables() -> None:
    metadata = sa.MetaData()
    assert Outbox(metadata).tables is Outbox(metadata).tables
    assert Outbox(metadata, schema="app").tables is Outbox(metadata, schema="app").tables
    assert Outbox(metadata, prefix="shop_").tables is not Outbox(metadata).tables


def test_the_schema_of_the_metadata_is_ours_too() -> None:
    metadata = sa.MetaData(schema="app")
    outbox = Outbox(metadata)
    assert names(metadata) == {f"app.outbox_{name}" for name in NAMES}
    assert outbox.tables.schema == "app"
    assert Outbox(metadata, schema="app").tables is outbox.tables
    assert Outbox(metadata, schema="other").tables.message.schema == "other"


def test_the_repr_says_where() -> None:
    assert repr(Outbox(schema="app", prefix="shop_")) == "Outbox(schema='app', prefix='shop_')"


def test_tables_that_were_cleared_from_the_metadata_are_made_anew() -> None:
    metadata = sa.MetaData()
    Outbox(metadata)
    metadata.clear()
    assert Outbox(metadata).tables.message is metadata.tables["outbox_message"]


def test_a_table_of_somebody_else_is_not_taken_over_and_nothing_is_left_behind() -> None:
    metadata = sa.MetaData()
    sa.Table("outbox_sent", metadata)
    with pytest.raises(
        ConfigurationError, match="'outbox_sent' already, which is not pyoutbox's: choose another prefix"
    ):
        Outbox(metadata)
    assert names(metadata) == {"outbox_sent"}
    Outbox(metadata, prefix="shop_outbox_")


class Base(DeclarativeBase):
    pass


class WithMetadata:
    metadata = sa.MetaData()


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (Base, r"takes a MetaData, not Base; did you mean Base\.metadata\?"),
        (WithMetadata(), r"not WithMetadata; did you mean WithMetadata\.metadata\?"),
        ("app", "not str"),
        (sa.create_engine("sqlite://"), "not Engine"),
    ],
)
def test_what_is_no_metadata_is_refused_with_advice(wrong: Any, advice: str) -> None:
    with pytest.raises(ConfigurationError, match=advice):
        Outbox(wrong)


# ---------------------------------------------------------------- prefix and schema cannot carry SQL


@given(st.text(st.characters(), max_size=40) | st.text("abz_09-;\"' .", max_size=33))
def test_a_prefix_is_a_small_identifier_or_refused(prefix: str) -> None:
    if re.fullmatch("[a-z_][a-z0-9_]{0,30}", prefix) and "\n" not in prefix:
        for table in Outbox(prefix=prefix).tables.all:
            assert table.name.startswith(prefix)
            for index in table.indexes:
                assert len(index.name or "") <= 63
    else:
        with pytest.raises(ConfigurationError, match="prefix"):
            Outbox(prefix=prefix)


@given(st.text(st.characters(), max_size=70) | st.text("aZ_09$-;\"' .\n", max_size=10))
def test_a_schema_is_an_identifier_or_refused(schema: str) -> None:
    if re.fullmatch("[A-Za-z_][A-Za-z0-9_$]{0,62}", schema) and "\n" not in schema:
        assert Outbox(schema=schema).tables.message.schema == schema
    else:
        with pytest.raises(ConfigurationError, match="schema"):
            Outbox(schema=schema)


@pytest.mark.parametrize("wrong", [None, 7, b"outbox_", "Outbox_", "outbox\n", 'x"; DROP TABLE a; --', "x" * 32, ""])
def test_known_bad_prefixes(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="prefix"):
        Outbox(prefix=wrong)


# ---------------------------------------------------------------- names


CONVENTIONS: list[dict[str, str]] = [
    {},
    {"ix": "ix_%(column_0_label)s", "uq": "uq_%(table_name)s", "pk": "pk_%(table_name)s", "ck": "ck_%(table_name)s"},
    # not for "pk", which SQLAlchemy refuses for every table: it makes a nameless one first
    {key: f"{key}_%(table_name)s_%(constraint_name)s" for key in ("uq", "ck", "fk")},
]


def constraint_names(tables: Tables, dialect: sa.Dialect) -> set[str]:
    ddl = "".join(str(CreateTable(table).compile(dialect=dialect)) for table in tables.all)
    ddl += "".join(str(CreateIndex(index).compile(dialect=dialect)) for table in tables.all for index in table.indexes)
    return set(re.findall(r"(?:CONSTRAINT|INDEX) (\S+)", ddl))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_naming_convention_does_not_change_our_names(convention: Any) -> None:
    dialect = sa.make_url("postgresql+psycopg://").get_dialect()()
    plain = constraint_names(Outbox().tables, dialect)
    metadata = sa.MetaData(naming_convention=convention) if convention else sa.MetaData()
    assert constraint_names(Outbox(metadata).tables, dialect) == plain
    assert {"outbox_message_pkey", "outbox_dead_letter_key", "outbox_parked_key_idx"} <= plain
    assert len(plain) == len(NAMES) + 1 + 2 + sum(len(table.indexes) for table in Outbox().tables.all)


def test_every_constraint_and_index_has_a_name_of_ours() -> None:
    for table in Outbox(prefix="shop_").tables.all:
        names = [str(index.name) for index in table.indexes]
        names += [str(constraint.name) for constraint in table.constraints]
        assert all(name.startswith(table.name) for name in names)


# ---------------------------------------------------------------- DDL


@pytest.mark.parametrize("url", ["postgresql+psycopg://", "sqlite://", "mysql://", "mariadb://"])
@pytest.mark.parametrize("schema", [None, "app"])
def test_the_ddl_compiles(url: str, schema: str | None) -> None:
    dialect = sa.make_url(url).get_dialect()()
    for table in Outbox(schema=schema).tables.all:
        ddl = str(CreateTable(table).compile(dialect=dialect))
        assert ("app." in ddl) == (schema is not None)
        for index in table.indexes:
            assert str(CreateIndex(index).compile(dialect=dialect))
        assert str(sa.select(table, clock(30)).compile(dialect=dialect))
        assert str(insert_if_absent(table, dialect.name).compile(dialect=dialect))


def ddl(url: str, name: str = "message") -> str:
    return str(CreateTable(getattr(Outbox().tables, name)).compile(dialect=sa.make_url(url).get_dialect()()))


def test_positions_are_given_out_one_by_one_and_never_again() -> None:
    assert "position BIGINT GENERATED BY DEFAULT AS IDENTITY (CACHE 1)" in ddl("postgresql+psycopg://")
    assert "PRIMARY KEY AUTOINCREMENT" in ddl("sqlite://")
    assert "position BIGINT NOT NULL AUTO_INCREMENT" in ddl("mysql://")


def test_mysql_compares_keys_byte_by_byte_and_keeps_microseconds() -> None:
    text = ddl("mysql://")
    assert (
        "`key` VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin" in text
    )  # not …_bin, which pads 'a' and 'a '
    assert "created_at DATETIME(6) NOT NULL DEFAULT (utc_timestamp(6))" in text
    assert "payload LONGBLOB" in text
    assert "`key` VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin" in ddl("mariadb://")


def test_mysql_and_mariadb_have_the_same_type_for_ids() -> None:
    """SQLAlchemy's own would be CHAR(32) by one URL of a MariaDB and UUID by another."""
    for url in ("mysql://", "mariadb://"):
        assert "id CHAR(36) CHARACTER SET ascii COLLATE ascii_general_ci NOT NULL" in ddl(url)


def test_other_databases_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="database 'oracle': PostgreSQL, SQLite, MySQL and MariaDB"):
        insert_if_absent(Outbox().tables.inbox, "oracle")


# ---------------------------------------------------------------- created


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "postgresql":
        url = sa.make_url(request.getfixturevalue("postgresql_url")).set(drivername="postgresql+psycopg")
    elif request.param == "mariadb":
        url = sa.make_url(request.getfixturevalue("mariadb_url")).set(drivername="mysql+pymysql")
    else:
        url = sa.make_url(f"sqlite:///{tmp_path / 'tables.db'}")
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()


def test_create_all_seeds_what_the_relay_needs(engine: sa.Engine) -> None:
    outbox = Outbox()
    for _ in range(2):  # the second time there is nothing to do
        outbox.metadata.create_all(engine)
    seeded(engine, outbox.tables)


def test_a_copy_in_another_schema_seeds_itself(engine: sa.Engine) -> None:
    if engine.dialect.name == "sqlite":
        engine = engine.execution_options(schema_translate_map={"copy": None})
    copy = sa.MetaData()
    for table in Outbox().tables.all:
        table.to_metadata(copy, schema="copy")
    with engine.begin() as connection:
        if engine.dialect.name != "sqlite":
            connection.execute(sa.schema.CreateSchema("copy", if_not_exists=True))
        copy.create_all(connection)
        leases = copy.tables["copy.outbox_lease"]
        assert connection.scalar(sa.select(sa.func.count()).select_from(leases)) == 64
        if engine.dialect.name == "mysql":
            connection.execute(sa.schema.DropSchema("copy"))  # a database of the server's


def test_two_outboxes_with_other_prefixes_live_side_by_side(engine: sa.Engine) -> None:
    metadata = sa.MetaData()
    first, second = Outbox(metadata), Outbox(metadata, prefix="second_")
    metadata.create_all(engine)
    assert seeded(engine, first.tables) != seeded(engine, second.tables)


def seeded(engine: sa.Engine, tables: Tables) -> str:
    """The outbox's own id, after a look at the rest."""
    with engine.connect() as connection:
        checkpoint, lease = tables.checkpoint, tables.lease
        seeds = {row.name: row.value for row in connection.execute(sa.select(checkpoint))}
        assert seeds.keys() == {"schema_version", "outbox_id", "buckets"}
        assert (seeds["schema_version"], seeds["buckets"]) == (str(SCHEMA_VERSION), "64")
        assert str(uuid.UUID(seeds["outbox_id"])) == seeds["outbox_id"]
        buckets = connection.execute(sa.select(lease.c.bucket, lease.c.epoch, lease.c.owner).order_by(lease.c.bucket))
        assert [tuple(row) for row in buckets] == [(bucket, 0, None) for bucket in range(64)]
        return str(seeds["outbox_id"])


def test_the_databases_clock_is_an_instant_and_can_be_moved(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        now, later, before = connection.execute(sa.select(clock(), clock(30), clock(-0.5))).one()
    assert now.utcoffset() == dt.timedelta()
    assert abs(now - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)
    assert dt.timedelta(seconds=29) < later - now < dt.timedelta(seconds=31)
    assert before < now


def test_an_insert_if_absent_says_whether_it_was(engine: sa.Engine) -> None:
    outbox = Outbox()
    outbox.metadata.create_all(engine)
    row = {"consumer": "billing", "message_id": uuid.uuid4(), "outcome": "done"}
    with engine.begin() as connection:
        insert = insert_if_absent(outbox.tables.inbox, engine.dialect.name)
        name = engine.dialect.name
        assert [was_absent(connection.execute(insert, row), name) for _ in range(3)] == [True, False, False]
