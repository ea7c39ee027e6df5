"""What is said of tables that are missing, elsewhere, older or newer; and what is put right in silence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from outbox import Outbox, SchemaMismatch
from outbox.observe.schema import check_schema
from outbox.stores.engine import sync_engine_for
from outbox.tables import SCHEMA_VERSION
from tests.services.fixtures import INSTALL_TIMEOUT

DATABASES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.timeout(INSTALL_TIMEOUT))]


@pytest.fixture(params=DATABASES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    if request.param == "postgresql":
        engine = sync_engine_for(request.getfixturevalue("postgresql_url"))
    else:
        engine = sync_engine_for(f"sqlite:///{tmp_path / 'shop.db'}", create=True)
    yield engine
    engine.dispose()


@pytest.fixture
def postgresql_engine(postgresql_url: str) -> Iterator[sa.Engine]:
    engine = sync_engine_for(postgresql_url)
    yield engine
    engine.dispose()


def check(engine: sa.Engine, outbox: Outbox) -> None:
    with engine.begin() as connection:
        check_schema(connection, outbox.tables)


def test_tables_as_create_all_makes_them_pass(engine: sa.Engine) -> None:
    outbox = Outbox()
    outbox.metadata.create_all(engine)
    check(engine, outbox)
    check(engine, outbox)


def test_no_tables_at_all(engine: sa.Engine) -> None:
    with pytest.raises(
        SchemaMismatch, match=r"no outbox tables here \(looked for outbox_message\)\. Run `outbox migrate`"
    ):
        check(engine, Outbox())


def test_a_table_of_the_users_is_not_taken_for_ours(engine: sa.Engine) -> None:
    metadata = sa.MetaData()
    sa.Table("chat_message", metadata, sa.Column("id", sa.Integer, primary_key=True))
    metadata.create_all(engine)
    with pytest.raises(SchemaMismatch) as caught:
        check(engine, Outbox())
    assert "chat_" not in str(caught.value)


def test_tables_of_another_prefix_are_named(engine: sa.Engine) -> None:
    Outbox(prefix="shop_").metadata.create_all(engine)
    with pytest.raises(
        SchemaMismatch, match=r"found shop_message: pass --prefix shop_, or Outbox\(prefix='shop_'\), if"
    ):
        check(engine, Outbox())


def test_of_several_sets_none_is_taken_for_ours(engine: sa.Engine) -> None:
    """On a server with many applications the first one is somebody else's: a relay started on it sends their messages."""
    for prefix in ("billing_", "shop_"):
        Outbox(prefix=prefix).metadata.create_all(engine)
    with pytest.raises(
        SchemaMismatch, match=r"found billing_message, shop_message: if one of these is yours.* Else run `outbox migr"
    ) as caught:
        check(engine, Outbox())
    assert "--prefix billing_" not in str(caught.value)


def test_tables_in_the_default_place_are_named(postgresql_engine: sa.Engine) -> None:
    Outbox().metadata.create_all(postgresql_engine)
    with pytest.raises(
        SchemaMismatch, match=r"found outbox_message: pass neither --schema nor --prefix, or Outbox\(\)"
    ):
        check(postgresql_engine, Outbox(schema="app"))


def test_tables_of_another_schema_are_named(postgresql_engine: sa.Engine) -> None:
    with postgresql_engine.begin() as connection:
        connection.execute(sa.text("create schema app"))
    Outbox(schema="app", prefix="shop_").metadata.create_all(postgresql_engine)
    with pytest.raises(
        SchemaMismatch,
        match=r"looked for outbox_message\); found app.shop_message: pass --schema app --prefix shop_, or "
        r"Outbox\(schema='app', prefix='shop_'\)",
    ):
        check(postgresql_engine, Outbox())
    check(postgresql_engine, Outbox(schema="app", prefix="shop_"))


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0", "have version 0; this pyoutbox needs 2. Run `outbox migrate`, or outbox_migrations.upgrade"),
        ("99", "have version 99, made by a newer pyoutbox; .* pip install -U pyoutbox"),
        ("first", "'first', which is no number"),
    ],
)
def test_tables_of_another_version(engine: sa.Engine, version: str, said: str) -> None:
    assert SCHEMA_VERSION == 2
    outbox = Outbox()
    outbox.metadata.create_all(engine)
    checkpoint = outbox.tables.checkpoint
    with engine.begin() as connection:
        connection.execute(sa.update(checkpoint).where(checkpoint.c.name == "schema_version").values(value=version))
    with pytest.raises(SchemaMismatch, match=said):
        check(engine, outbox)


def test_a_missing_table_and_a_missing_column_are_named(engine: sa.Engine) -> None:
    outbox = Outbox()
    outbox.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("alter table outbox_inbox rename column cycle to circle"))
    with pytest.raises(SchemaMismatch, match=r"not those of version 2: outbox_inbox\.cycle is missing"):
        check(engine, outbox)
    outbox.tables.inbox.drop(engine)
    with pytest.raises(SchemaMismatch, match="incomplete: outbox_inbox is missing"):
        check(engine, outbox)


def test_another_number_of_buckets(engine: sa.Engine) -> None:
    outbox = Outbox()
    outbox.metadata.create_all(engine)
    checkpoint = outbox.tables.checkpoint
    with engine.begin() as connection:
        connection.execute(sa.update(checkpoint).where(checkpoint.c.name == "buckets").values(value="128"))
    with pytest.raises(SchemaMismatch, match="128 buckets; this pyoutbox uses 64"):
        check(engine, outbox)


def test_rows_that_a_bare_migration_left_out_are_seeded_and_none_is_changed(engine: sa.Engine) -> None:
    outbox = Outbox()
    outbox.metadata.create_all(engine)
    tables = outbox.tables
    with engine.begin() as connection:
        connection.execute(sa.delete(tables.checkpoint).where(tables.checkpoint.c.name != "outbox_id"))
        mine = connection.execute(sa.select(tables.checkpoint.c.value)).scalar_one()
        connection.execute(sa.delete(tables.lease).where(tables.lease.c.bucket > 10))
        connection.execute(sa.update(tables.lease).values(owner="somebody"))
    check(engine, outbox)
    with engine.connect() as connection:
        values = dict(connection.execute(sa.select(tables.checkpoint.c.name, tables.checkpoint.c.value)).all())
        owners = connection.execute(sa.select(tables.lease.c.owner).order_by(tables.lease.c.bucket)).scalars().all()
    assert (values["outbox_id"], values["schema_version"], values["buckets"]) == (mine, str(SCHEMA_VERSION), "64")
    assert list(owners) == ["somebody"] * 11 + [None] * 53


def test_a_role_that_may_only_read_can_start(postgresql_engine: sa.Engine) -> None:
    outbox = Outbox()
    outbox.metadata.create_all(postgresql_engine)
    with postgresql_engine.begin() as connection:
        connection.execute(sa.text("set transaction read only"))
        check_schema(connection, outbox.tables)
