"""`outbox consume` and `outbox dlq`: what goes wrong before there is anything to consume."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import outbox, quick, refused

BILLING = """
from outbox import Consumer, Outbox

outbox = Outbox()
billing = Consumer("billing", outbox)


@billing.on("orders")
def charge(order: dict) -> None: ...
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(BILLING)
    return tmp_path


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_misspelt_sqlite_file_is_not_made_by_a_consumer(folder: Path, by: str) -> None:
    url = f"sqlite:///{folder}/shpo.db"
    words = ["consume", "shop:billing", "--transport", "memory://x"]
    if by == "option":
        done = outbox(*words, "--database", url, folder=folder)
    else:
        done = outbox(*words, folder=folder, OUTBOX_DATABASE=url)
    refused(done, 3, "there is no such file", f"{folder}/shpo.db", "outbox migrate")
    assert not (folder / "shpo.db").exists()


@pytest.mark.parametrize(
    "verb", [["dlq", "groups"], ["dlq", "list"], ["dlq", "replay", "--topic", "x"], ["trace", "x"]]
)
def test_a_misspelt_sqlite_file_is_not_made_by_those_who_look(verb: list[str], tmp_path: Path) -> None:
    done = outbox(*verb, "--database", f"sqlite:///{tmp_path}/shpo.db")
    refused(done, 3, "there is no such file", f"{tmp_path}/shpo.db", "outbox migrate")
    assert not (tmp_path / "shpo.db").exists()


def test_migrate_makes_the_file(tmp_path: Path) -> None:
    assert outbox("migrate", "--database", f"sqlite:///{tmp_path}/shop.db").status == 0
    assert (tmp_path / "shop.db").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--app", "shop:billing"], ["--app", "shop:outbox"], ["--app=shop:billing", "--database", "sqlite:///x"]],
)
def test_a_consumer_is_given_without_an_option(folder: Path, arguments: list[str]) -> None:
    done = outbox("consume", *arguments, folder=folder)
    refused(done, 2, "outbox consume MODULE:NAME", "outbox consume shop.billing:billing", "no --app")


def test_an_app_beside_a_consumer_says_nothing(folder: Path) -> None:
    done = outbox("consume", "shop:billing", "--app", "shop:outbox", folder=folder)
    refused(done, 2, "outbox consume shop:billing", "no --app", "its own Outbox")


def test_no_consumer_at_all_is_wrong_usage() -> None:
    refused(outbox("consume"), 2, "outbox consume MODULE:NAME", "outbox consume shop.billing:billing")


def test_an_outbox_in_place_of_a_consumer_says_what_is_wanted(folder: Path) -> None:
    done = outbox("consume", "shop:outbox", folder=folder)
    refused(done, 2, "shop:outbox", "this is an Outbox, not a Consumer", "shop.billing:billing")


def test_the_help_says_what_becomes_of_types_without_a_handler() -> None:
    said = " ".join(quick("consume", "--help").out.split())
    assert "without a handler become dead letters" in said
    assert "unknown='ignore'" in said
    assert "--app" not in said
