"""`outbox migrate`: to which version, as a plan, as a script, and the grants."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox import Outbox
from outbox.observe.schema import check_schema
from outbox_migrations import LATEST, script
from outbox_migrations._grants import USES
from tests.cli.command import outbox, quick, refused
from tests.cli.conftest import Shop
from tests.migrations.older import Older

NOWHERE = "postgresql://app:{}@no-such-host.invalid/shop"


def version(shop: Shop) -> str | None:
    with shop.engine.connect() as connection:
        found: str | None = connection.scalar(
            sa.text("select value from outbox_checkpoint where name = 'schema_version'")
        )
        return found


def test_it_makes_the_tables_then_does_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new.db"
    made = outbox("migrate", "--database", url)
    assert (made.status, made.err) == (0, "")
    assert made.out == f"outbox tables are at version {LATEST} (ran 0001_tables, 0002_storage_and_closed)\n"
    assert quick("migrate", "--database", url).out == f"outbox tables are at version {LATEST}, as they were\n"


def test_to_goes_up_and_refuses_to_go_down_without_a_word(tmp_path: Path, shop: Shop) -> None:
    database = ("--database", shop.url)
    refused(quick("migrate", *database, "--to", "1"), 2, f"have version {LATEST}, and 1 is below it", "--downgrade")
    assert version(shop) == str(LATEST)
    assert quick("migrate", *database, "--to", "1", "--downgrade").out.startswith(
        "outbox tables are at version 1 (ran 0002"
    )
    assert version(shop) == "1"
    refused(quick("status", *database), 2, "have version 1; this pyoutbox needs 2. Run `outbox migrate`")
    assert quick("migrate", *database, "--to", str(LATEST)).status == 0
    refused(quick("migrate", *database, "--to", "0"), 2, "drops them with all that is in them", "--downgrade")
    assert quick("migrate", *database, "--to", "0", "--downgrade").out.startswith(
        "there are no outbox tables (ran 0001"
    )
    assert "outbox_message" not in sa.inspect(shop.engine).get_table_names()
    refused(quick("migrate", *database, "--to", "9"), 2, f"up to version {LATEST}", "pip install -U pyoutbox")
    assert quick("migrate", *database, "--to", "x").status == 2


def test_what_is_dropped_and_was_not_sent_is_said(shop: Shop) -> None:
    """Without a word whoever had not drained would never know."""
    outbox = Outbox()
    with shop.engine.begin() as connection:
        outbox.add(connection, "orders", {"order_id": 1}, key=1)
        outbox.add(connection, "orders", {"order_id": 2}, key=2, deliver_at=dt.timedelta(days=1))
    dropped = ("migrate", "--database", shop.url, "--to", "0")
    assert quick(*dropped, "--dry-run").out.endswith("\ndrops 2 messages not sent\n")
    assert quick(*dropped, "--downgrade").out.endswith("); dropped 2 messages not sent\n")
    assert quick(*dropped, "--downgrade").out == "there are no outbox tables, as they were\n"


def test_a_dry_run_says_which_steps_and_what_each_locks(shop: Shop) -> None:
    database = ("--database", shop.url)
    assert quick("migrate", *database, "--dry-run").out == "nothing to do\n"
    quick("migrate", *database, "--to", "1", "--downgrade")
    said = quick("migrate", *database, "--dry-run").out.splitlines()
    assert said[0] == "0002_storage_and_closed"
    assert said[1] == "  create index outbox_dead_letter_closed_at_idx on outbox_dead_letter"
    assert said[2].startswith("      locks ")
    assert version(shop) == "1"


def test_a_dry_run_makes_no_file(tmp_path: Path) -> None:
    refused(quick("migrate", "--dry-run", "--database", f"sqlite:///{tmp_path}/typo.db"), 3, "there is no such file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("database", ["postgresql", "mysql", "mariadb", "sqlite"])
def test_a_script_needs_no_database(database: str) -> None:
    done = quick("migrate", "--sql", "--database", database, "--prefix", "shop_")
    assert (done.status, done.err) == (0, "")
    assert done.out.count("CREATE TABLE shop_") == 11
    assert done.out == script(database, prefix="shop_")


def test_a_script_for_a_server_that_is_away_takes_the_dialect_from_its_url() -> None:
    url = NOWHERE.format("hunter2-and-more")
    done = outbox("migrate", "--sql", "--from", "1", "--database", url, "--schema", "app")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "-- 0002_storage_and_closed"
    assert "CREATE INDEX CONCURRENTLY" in lines[2]
    assert lines[3:5] == ["BEGIN;", "SET LOCAL lock_timeout = '500ms';"]
    assert lines[-1] == "COMMIT;"


@pytest.mark.parametrize("start", [0, 1])
def test_a_script_makes_what_the_command_makes(tmp_path: Path, postgresql_url: str, start: int) -> None:
    for url in (f"sqlite:///{tmp_path}/app.db", postgresql_url):
        engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        older = Older(engine) if start else None
        before = older.fill() if older else {}
        done = quick("migrate", "--sql", "--database", url, "--from", str(start))
        raw = engine.raw_connection()
        driver = raw.driver_connection
        assert driver is not None
        if engine.dialect.name == "sqlite":
            driver.executescript(done.out)
        else:
            driver.autocommit = True
            for statement in "".join(line for line in done.out.splitlines(True) if line[:2] != "--").split(";\n"):
                if statement.strip():
                    driver.execute(statement)
        raw.invalidate()
        with engine.connect() as connection:
            check_schema(connection, Outbox().tables)
        if older:
            assert older.counts() == before
        engine.dispose()


def test_a_script_downwards_wants_the_word_too() -> None:
    refused(quick("migrate", "--sql", "--database", "postgresql", "--from", "2", "--to", "1"), 2, "--downgrade")
    done = quick("migrate", "--sql", "--database", "postgresql", "--from", "2", "--to", "1", "--downgrade")
    assert "RESET (autovacuum" in done.out
    done = quick("migrate", "--sql", "--database", "postgresql", "--from", "2", "--to", "0", "--downgrade")
    assert done.out.count("DROP TABLE") == 11


@pytest.mark.parametrize("what", ["--sql", "--grants"])
def test_what_connects_to_nothing_asks_for_no_more_than_the_kind(what: str) -> None:
    refused(quick("migrate", what), 2, "no database given", "its kind is enough: --database postgresql")


def test_every_use_is_in_the_help() -> None:
    said = " ".join(quick("migrate", "--help").out.split())
    assert f"(uses: {', '.join(USES)})" in said


def test_grants_are_printed_for_the_roles_that_are_named() -> None:
    done = quick("migrate", "--grants", "--database", "postgresql", "--role", "add=shop", "--role", "cancel=shop")
    grants = [line for line in done.out.splitlines() if line.startswith("GRANT")]
    assert len(grants) == 4
    assert all(line.endswith(" TO shop;") for line in grants)
    assert "GRANT pg_read_all_stats TO outbox_operator;" in quick("migrate", "--grants", "--database", "postgresql").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--role", "add=x"), "--role says nothing without --grants"),
        (("--from", "1"), "--from says nothing without --sql"),
        (("--grants", "--role", "shop"), "write USE=ROLE"),
        (("--grants", "--role", "fly=shop"), "'fly' is no use of the outbox"),
        (("--grants", "--role", 'add=a"; drop table x; --'), "must be an SQL identifier"),
        (("--sql", "--to", "7"), "up to version"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...], words: str) -> None:
    refused(quick("migrate", "--database", "postgresql://x/y", *arguments), 2, words)


def test_a_table_changed_by_hand_is_said_by_migrate_and_by_whatever_starts(shop: Shop) -> None:
    shop.execute("alter table outbox_message drop column headers")
    for verb in (("migrate",), ("status",), ("dlq", "groups")):
        refused(quick(*verb, "--database", shop.url), 2, "outbox_message.headers is missing", "To mend: ALTER TABLE")


NASTY = st.text(st.characters(exclude_characters="\x00"), min_size=1, max_size=12) | st.sampled_from(
    ['x"; drop table users; --', "x'; drop table users; --", "a.b", "a b", "Ab", "a;", "a`b", "x" * 32, "--", "é"]
)


@settings(deadline=None, max_examples=60)
@given(NASTY, st.sampled_from(["--prefix", "--schema"]), st.sampled_from(["--sql", "--grants"]))
def test_a_prefix_or_schema_cannot_carry_sql(name: str, option: str, what: str) -> None:
    done = quick("migrate", what, "--database", "postgresql", f"{option}={name}")
    if done.status == 0:
        assert re.fullmatch(r"[A-Za-z0-9_$]+", name)
        assert ";" not in done.out.replace(";\n", "")
    else:
        assert done.status == 2
        assert done.out == ""
