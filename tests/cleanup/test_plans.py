"""A batch of the cleanup goes by the index on the time and by primary keys, however many rows there are: none of its
statements looks at a whole table, or sorts one."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from outbox.cleanup.sweep import Sweep
from outbox.stores.engine import sync_engine_for
from tests.cleanup.past import KEEP
from tests.relay.database import Database
from tests.stores.planned import Statement, dialect, watched, watched_url
from tests.stores.test_plans import analyze, fill

MANY = {"inbox": 60_000, "dead_letter": 60_000, "attempt": 20_000}
MOST = 6_000  # rows that one statement looks at: a batch of 1,000, each of which is asked some questions
MOST_WORK = 300_000  # SQLite's steps for that
BATCHES = 6

# A moment of that day, sixty days ago.
LONG_AGO = {
    "postgresql": "now() - interval '60 days' - random() * interval '1 day'",
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f000', 'now', '-60 days', '-' || (abs(random()) % 86400) || ' seconds')",
    "mysql": "utc_timestamp(6) - interval 60 day - interval floor(rand() * 86400000000) microsecond",
}


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def database(request: pytest.FixtureRequest) -> Database:
    found: Database = request.getfixturevalue(f"on_{request.param}")
    if found.name == "postgresql":  # when statistics are taken is the test's to say
        with found.engine.begin() as connection:
            for name in MANY:
                connection.exec_driver_sql(f"alter table outbox_{name} set (autovacuum_enabled = off)")
    return found


@pytest.mark.parametrize("known", [True, False], ids=["statistics", "statistics of empty tables"])
def test_no_statement_looks_at_a_whole_table(database: Database, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox, letter = database.tables.inbox, database.tables.dead_letter
    if not known:
        analyze(database)
    # while it has no statistics, PostgreSQL reads sixty thousand rows rather than a thousand by an index; more it does not
    fill(database, {name: rows * (5 if database.name == "postgresql" else 1) for name, rows in MANY.items()})
    ago = sa.text(LONG_AGO[dialect(database)])
    database.execute(sa.update(inbox).values(processed_at=ago))
    database.execute(sa.update(letter).values(closed_at=ago, consumer="shipping"))
    database.execute(sa.update(database.tables.attempt).values(consumer="shipping"))
    if known:
        analyze(database)
    with watched(database, monkeypatch) as statements:
        engine = sync_engine_for(watched_url(database))
        sweep = Sweep(database.tables, KEEP)
        with engine.begin() as connection:
            sweep.begin(connection)
        for table in ("dead_letter", "inbox"):
            for _ in range(BATCHES):
                with engine.begin() as connection:
                    batch = sweep.batch(connection)
                sweep.done(batch, 0.0)
                assert batch.table == table
                assert batch.full
            if table == "dead_letter":
                sweep._place = sweep._next = type(sweep._place)(rule=sweep._place.rule + 1)
        engine.dispose()
    assert sweep.removed["inbox"] > 1000
    for bad in statements:
        if _is_bad(bad):
            print("BAD", bad.text, [str(x) for x in bad.scans], bad.work)
    assert [str(bad) for bad in statements if _is_bad(bad)] == []


def _is_bad(statement: Statement) -> bool:
    big = [scan for scan in statement.scans if scan.table.removeprefix("outbox_") in MANY]
    # a walk along the whole index on the time ends with the batch: its rows are counted
    walks = [scan for scan in big if scan.looked_at is None and scan.whole and "idx" not in scan.how]
    return bool(walks) or any((scan.looked_at or 0) > MOST for scan in big) or statement.work > MOST_WORK
