"""Tables changed by hand: the table and the column are named, with what was expected, what was found and what mends it;
and what does no harm is not said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from outbox import Outbox, SchemaMismatch
from outbox.dialects import MYSQL
from outbox.observe.schema import check_schema
from tests.migrations.project import mysql_url
from tests.services.fixtures import INSTALL_TIMEOUT

DATABASES = [
    "sqlite",
    pytest.param("postgresql", marks=pytest.mark.timeout(INSTALL_TIMEOUT)),
    pytest.param("mariadb", marks=pytest.mark.timeout(INSTALL_TIMEOUT)),
]


def engine_on(name: str, request: pytest.FixtureRequest, folder: Path) -> sa.Engine:
    if name == "sqlite":
        return sa.create_engine(f"sqlite:///{folder}/app.db")
    url = request.getfixturevalue(f"{name}_url")
    return sa.create_engine(mysql_url(url) if name == "mariadb" else url.replace("postgresql:", "postgresql+psycopg:"))


@pytest.fixture(params=DATABASES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    found = engine_on(request.param, request, tmp_path)
    Outbox().metadata.create_all(found)
    yield found
    found.dispose()


@pytest.fixture
def postgres(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    found = engine_on("postgresql", request, tmp_path)
    yield found
    found.dispose()


def kind(engine: sa.Engine) -> str:
    return "mariadb" if engine.dialect.name in MYSQL else engine.dialect.name


def run(engine: sa.Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement.replace(":", r"\:")))


def said(engine: sa.Engine, outbox: Outbox | None = None) -> str:
    with engine.begin() as connection, pytest.raises(SchemaMismatch) as caught:
        check_schema(connection, (outbox or Outbox()).tables)
    return str(caught.value)


def fine(engine: sa.Engine, outbox: Outbox | None = None) -> None:
    with engine.begin() as connection:
        check_schema(connection, (outbox or Outbox()).tables)


# What each database is told, and what is said then. `mend`: the words after "To mend: " are statements that do it.
BROKEN: dict[str, dict[str, list[str]]] = {
    "outbox_message.headers is missing": {
        "postgresql": ["alter table outbox_message drop column headers"],
        "mariadb": ["alter table outbox_message drop column headers"],
        "sqlite": ["alter table outbox_message drop column headers"],
    },
    "outbox_message.payload has the type": {
        "postgresql": ["alter table outbox_message alter payload type text using encode(payload, 'hex')"],
        "mariadb": ["alter table outbox_message modify payload blob"],  # 64 KiB, and then it is cut or refused
    },
    "outbox_message.key has the type": {
        "postgresql": ["alter table outbox_message alter key type varchar(20)"],
        "mariadb": [
            "alter table outbox_message modify `key` varchar(255) character set utf8mb4 collate utf8mb4_general_ci"
        ],
    },
    "outbox_message.created_at has the type": {
        "postgresql": ["alter table outbox_message alter created_at type timestamp"],
        "mariadb": ["alter table outbox_message modify created_at datetime not null default (utc_timestamp())"],
    },
    "outbox_parked.position has the type": {
        "postgresql": ["alter table outbox_parked alter position type integer"],
        "mariadb": ["alter table outbox_parked modify position integer not null"],
    },
    "outbox_inbox.outcome may be NULL, expected NOT NULL": {
        "postgresql": ["alter table outbox_inbox alter outcome drop not null"],
        "mariadb": [
            "alter table outbox_inbox modify outcome varchar(8) character set utf8mb4 collate utf8mb4_bin null"
        ],
    },
    "outbox_message.key is NOT NULL, expected that it may be NULL": {
        "postgresql": ["alter table outbox_message alter key set not null"],
        "mariadb": [
            "alter table outbox_message modify `key` varchar(255) character set utf8mb4 collate utf8mb4_bin not null"
        ],
    },
    "outbox_message.created_at has no default": {
        "postgresql": ["alter table outbox_message alter created_at drop default"],
        "mariadb": ["alter table outbox_message alter created_at drop default"],
    },
    "outbox_message.position is not numbered by the database": {
        "postgresql": ["alter table outbox_message alter position drop identity"],
        "mariadb": ["alter table outbox_message modify position bigint not null"],
    },
    "outbox_message.position is numbered with CACHE 20": {
        "postgresql": ["alter table outbox_message alter position set cache 20"],
    },
    "outbox_inbox lacks the primary key (consumer, message_id)": {
        "postgresql": ["alter table outbox_inbox drop constraint outbox_inbox_pkey"],
        "mariadb": ["alter table outbox_inbox drop primary key"],
    },
    "outbox_dead_letter lacks the unique key (consumer, message_id, cycle)": {
        "postgresql": ["alter table outbox_dead_letter drop constraint outbox_dead_letter_key"],
        "mariadb": ["alter table outbox_dead_letter drop index outbox_dead_letter_key"],
    },
    "outbox_scheduled lacks an index on (deliver_at)": {
        "postgresql": ["drop index outbox_scheduled_deliver_at_idx"],
        "mariadb": ["drop index outbox_scheduled_deliver_at_idx on outbox_scheduled"],
        "sqlite": ["drop index outbox_scheduled_deliver_at_idx"],
    },
    "outbox_message lacks the check that its bucket is one that a relay owns": {
        "postgresql": ["alter table outbox_message drop constraint outbox_message_bucket_check"],
        "mariadb": ["alter table outbox_message drop constraint outbox_message_bucket_check"],
    },
}
NO_WAY_BACK = "outbox_message.payload has the type", "outbox_message.headers is missing"


@pytest.mark.parametrize("what", BROKEN)
def test_what_was_changed_is_named_and_what_is_said_mends_it(engine: sa.Engine, what: str) -> None:
    statements = BROKEN[what].get(kind(engine))
    if statements is None:
        return  # this database does not let anybody do that
    run(engine, *statements)
    text = said(engine)
    assert f"not those of version 2: {what}" in text
    assert "Somebody has changed them by hand. To mend: " in text
    if "has the type" in what:
        assert ", expected " in text
    mend = text.partition("To mend: ")[2].removesuffix(". Then start again")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not (engine.dialect.name == "postgresql" and what.startswith(NO_WAY_BACK[0])):
            connection.execute(sa.text(mend.replace(":", r"\:")))
            fine(engine)


def test_sqlite_without_autoincrement_or_a_key_is_told_what_it_lacks(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    Outbox().metadata.create_all(engine)
    run(
        engine,
        "drop table outbox_message",
        "create table outbox_message (position integer primary key, id char(32) not null, bucket smallint not null,"
        " topic text not null, key text, type text, payload blob, content_type text, headers text,"
        " created_at datetime default current_timestamp not null)",
        "drop table outbox_lease",
        "create table outbox_lease (bucket text not null, owner text, epoch bigint default 0 not null, expires_at datetime,"
        " transactional_id text, fence_pending text)",
    )
    text = said(engine)
    assert "outbox_message.position is without AUTOINCREMENT" in text
    assert "outbox_message lacks the check that its bucket" in text
    assert "outbox_lease.bucket has the type TEXT, expected SMALLINT" in text
    assert "outbox_lease lacks the primary key (bucket)" in text
    assert "make the table anew" in text
    engine.dispose()


def test_a_column_of_somebody_elses_that_refuses_our_inserts_is_named(engine: sa.Engine) -> None:
    if engine.dialect.name == "sqlite":
        run(engine, "alter table outbox_message add column tenant text")
        fine(engine)
        return
    run(engine, "alter table outbox_message add column tenant varchar(20) not null")
    assert "outbox_message.tenant is no column of ours, and NOT NULL without a default" in said(engine)


HARMLESS = {
    "postgresql": [
        "alter table outbox_message alter topic type text",
        "alter table outbox_message alter headers type varchar",
        "alter table outbox_parked alter attempts type bigint",
        "create domain our_text as varchar(300)",
        "alter table outbox_message alter type type our_text",
        "alter table outbox_message add column tenant text not null default 'acme'",
        "drop index outbox_sent_id_idx",
        "create index by_another_name on outbox_sent (id, topic)",
        "drop index outbox_inbox_processed_at_idx",
        "create index a_btree_this_time on outbox_inbox (processed_at)",
        "alter table outbox_dead_letter drop constraint outbox_dead_letter_key",
        "create unique index my_key on outbox_dead_letter (message_id, consumer, cycle)",
        "alter index outbox_message_pkey rename to message_pk",
        "alter table outbox_message set (fillfactor = 70)",
    ],
    "mariadb": [
        "alter table outbox_message modify topic varchar(300) character set utf8mb4 collate utf8mb4_bin not null",
        "alter table outbox_message modify headers longtext character set utf8mb4 collate utf8mb4_bin",
        "alter table outbox_parked modify attempts bigint not null default 0",
        "alter table outbox_message add column tenant varchar(20) not null default 'acme'",
        "drop index outbox_sent_id_idx on outbox_sent",
        "create index by_another_name on outbox_sent (id, topic)",
        "alter table outbox_message row_format = dynamic",
    ],
    "sqlite": [
        "alter table outbox_message add column tenant text not null default 'acme'",
        "drop index outbox_sent_id_idx",
        "create index by_another_name on outbox_sent (id, topic)",
    ],
}


def test_what_does_no_harm_is_not_said(engine: sa.Engine) -> None:
    for statement in HARMLESS[kind(engine)]:
        run(engine, statement)
        if "drop " not in statement:  # what comes next makes up for it
            fine(engine)


def test_several_differences_are_listed_and_the_rest_is_counted(engine: sa.Engine) -> None:
    for name in ("last_error", "first_failed_at", "last_failed_at"):
        run(engine, f"alter table outbox_parked drop column {name}", f"alter table outbox_attempt drop column {name}")
    run(engine, "alter table outbox_sent drop column topic")
    text = said(engine)
    assert "outbox_parked.last_error is missing" in text
    assert "; and 1 more. Somebody" in text


def test_tables_in_a_schema_are_named_with_it(postgres: sa.Engine) -> None:
    outbox = Outbox(schema="app", prefix="shop_")
    run(postgres, "create schema app")
    outbox.metadata.create_all(postgres)
    fine(postgres, outbox)
    run(postgres, "alter table app.shop_message drop column headers")
    assert "app.shop_message.headers is missing (expected TEXT)" in said(postgres, outbox)
    assert "ALTER TABLE app.shop_message ADD COLUMN headers TEXT" in said(postgres, outbox)


def test_it_asks_little(engine: sa.Engine) -> None:
    """Whatever starts asks this, 10 ms on a quiet machine: servers for all tables at once, SQLite, which is no round trip
    away, for each."""
    asked: list[str] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def count(connection: object, cursor: object, statement: str, *rest: object) -> None:
        asked.append(statement)

    fine(engine)
    assert 0 < len(asked) <= {"postgresql": 15, "mariadb": 20, "sqlite": 120}[kind(engine)]
