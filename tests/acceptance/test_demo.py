"""The demo is believed because it can fail: its counts come from the databases, and its exit status from the counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(240)


def demo(*arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the JSON object of the last line, and everything that was printed."""
    done = subprocess.run(
        [sys.executable, "-m", "outbox", "demo", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **environment},
    )
    lines = done.stdout.strip().splitlines()
    said = done.stdout + done.stderr
    return done.returncode, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}, said


def check(status: int, table: dict[str, Any], said: str, *, orders: int, kills: int) -> None:
    assert status == 0, said
    assert table["orders"] == orders
    assert table["kills"] == kills
    assert table["rolled_back"] > 0
    assert table["sent"] - table["duplicates"] == orders
    assert table["effects"] == orders - 5
    assert table["dead_letters"] == table["replayed"] == 5
    assert table["effects_after_replay"] == orders
    assert [table[name] for name in ("lost", "doubled", "ghosts", "out_of_order")] == [0, 0, 0, 0]


def test_on_sqlite_and_the_local_broker_every_count_is_right_though_processes_are_killed() -> None:
    status, table, said = demo("--orders", "1500", "--kills", "6")
    check(status, table, said, orders=1500, kills=6)
    assert "All counts are right." in said


def test_on_postgresql_and_kafka_every_count_is_right_though_processes_are_killed(
    postgresql_url: str, kafka_url: str
) -> None:
    status, table, said = demo(
        "--orders", "3000", "--kills", "6", "--database", postgresql_url, "--transport", kafka_url
    )
    check(status, table, said, orders=3000, kills=6)


def test_on_mariadb_and_the_local_broker_every_count_is_right_though_processes_are_killed(mariadb_url: str) -> None:
    status, table, said = demo("--orders", "400", "--kills", "2", "--database", mariadb_url)
    check(status, table, said, orders=400, kills=2)


def test_the_demo_fails_when_the_inbox_forgets(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import outbox._outbox as o; o.Outbox.claim = lambda *a, **k: True")
    status, table, said = demo("--orders", "1500", "--kills", "8", "--seed", "1", PYTHONPATH=str(tmp_path))
    assert status == 1, said
    assert table["doubled"] > 0


def test_a_database_that_cannot_be_reached_is_said_in_one_line() -> None:
    status, _, said = demo("--orders", "10", "--database", "postgresql://nobody:secret@127.0.0.1:1/none")
    assert status == 3
    assert "Traceback" not in said
    assert "secret" not in said
