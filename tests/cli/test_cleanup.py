"""`outbox cleanup`, and its line in `outbox status`."""

from __future__ import annotations

import datetime as dt
import uuid
from pathlib import Path

import sqlalchemy as sa

from outbox.cleanup.days import AHEAD
from outbox.dialects import clock
from tests.cli.command import quick, refused
from tests.cli.conftest import Shop
from tests.cli.states import add, bury, remember

DAY = 86400


def old(shop: Shop, number: int, days: int = 40) -> None:
    for _ in range(number):
        remember(shop, uuid.uuid4(), "billing", processed_at=clock(-days * DAY))


def inbox(shop: Shop) -> int:
    with shop.engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(shop.outbox.tables.inbox)) or 0


def test_it_says_what_it_removed_and_what_it_kept_and_why(shop: Shop, tmp_path: Path) -> None:
    old(shop, 3)
    bury(shop, add(shop), "billing")
    shop.execute(sa.update(shop.outbox.tables.inbox).values(processed_at=clock(-40 * DAY)))
    dry = quick("cleanup", "--database", shop.url, "--dry-run")
    assert (dry.status, inbox(shop)) == (0, 4)
    assert "would remove             3  outbox_inbox  older than 30 d 0 h" in dry.out
    assert "ran" in quick("status", "--database", shop.url).out
    done = quick("cleanup", "--database", shop.url, "--archive", str(tmp_path / "gone.jsonl"), "--batch", "2")
    assert (done.status, inbox(shop)) == (0, 1)
    assert "removed                  3  outbox_inbox" in done.out
    assert "kept                     1  outbox_inbox  their dead letter is kept" in done.out
    assert "kept                     1  outbox_dead_letter  open: replay or discard them" in done.out
    assert len((tmp_path / "gone.jsonl").read_text().splitlines()) == 3
    assert "and removed 3 rows; the inbox goes back 40 d" in quick("status", "--database", shop.url).out


def test_it_says_which_days_of_a_partitioned_inbox_it_made(postgres: Shop) -> None:
    assert quick("migrate", "--partition-inbox", "--database", postgres.url).status == 0
    last = dt.datetime.now(dt.UTC).date() + dt.timedelta(days=AHEAD)
    done = quick("cleanup", "--database", postgres.url)
    assert f"made                7 days  partitions of outbox_inbox, up to {last}" in done.out
    assert quick("cleanup", "--database", postgres.url, "--json").json()["made"] == []


def test_json(shop: Shop) -> None:
    old(shop, 2, days=2)
    assert quick("cleanup", "--database", shop.url, "--json").json()["removed"] == {}
    done = quick("cleanup", "--database", shop.url, "--older-than", "1d", "--json").json()
    assert done["removed"] == {"inbox": 2}
    assert done["retention"]["inbox"] == done["retention"]["dead_letter"] == DAY
    assert quick("status", "--database", shop.url, "--json").json()["cleanup"]["removed"] == {"inbox": 2}


def test_what_it_cannot_do_is_said(sqlite: Shop) -> None:
    old(sqlite, 1)
    refused(quick("cleanup", "--database", sqlite.url, "--older-than", "5m"), 2, "inbox=300 seconds", "at least 3600")
    refused(quick("cleanup", "--database", sqlite.url, "--older-than", "old"), 2, "'old' is no age")
    refused(quick("cleanup", "--database", sqlite.url, "--dry-run", "--archive", "x"), 2, "--archive")
    assert inbox(sqlite) == 1
