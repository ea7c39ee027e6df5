"""What goes and what stays, in which portions, beside others that do the same or hold rows."""

from __future__ import annotations

import datetime as dt
import threading
import uuid
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox import ConfigurationError, Consumer
from outbox.backoff import Backoff
from outbox.cleanup import Retention, sweep
from outbox.cleanup.pace import Pace
from outbox.consumer.retries import Retries
from outbox.dialects import clock
from tests.cleanup.past import DAY, KEEP, audited, buried, cleanup, handled, ids, tried, unsent
from tests.relay.conftest import ON_EACH
from tests.relay.database import Database


@ON_EACH
def test_what_is_old_and_over_goes_and_the_rest_stays(database: Database) -> None:
    (young,), (old,) = handled(database, 29.9), handled(database, 30.1)
    (open_,), (again,), (relays,) = handled(database, 99, outcome="dead"), handled(database, 99), handled(database, 99)
    buried(database, open_)
    tried(database, again, "replay")
    buried(database, relays, consumer="", days=1, state="replayed")
    over = buried(database, old, "discarded", days=21)
    audited(database, 301)
    audited(database, 299)
    database.add("a")
    done = cleanup(database).run()
    assert done.removed == {"inbox": 1, "dead_letter": 1, "audit": 1}
    assert ids(database, "inbox") == {young, open_, again, relays}
    assert over not in ids(database, "dead_letter", "id")
    assert (database.count("message"), database.count("attempt"), database.count("dead_letter")) == (1, 1, 2)
    assert {(kept.table, kept.count) for kept in done.kept} == {("inbox", 1), ("dead_letter", 1)}
    assert len(done.kept) == 4
    assert cleanup(database).run().removed == {}


@ON_EACH
def test_a_dry_run_says_the_same_and_removes_nothing(database: Database) -> None:
    kept, *_ = handled(database, 40, *(uuid.uuid4() for _ in range(7)))
    buried(database, kept)
    planned = cleanup(database).plan()
    assert database.count("inbox") == 7
    done = cleanup(database).run()
    assert (planned.removed, planned.kept) == (done.removed, done.kept)
    assert done.removed == {"inbox": 6}


@ON_EACH
@pytest.mark.parametrize("rows", [1, 3, 10])
def test_no_transaction_removes_more_than_a_batch_even_where_all_rows_have_one_time(
    database: Database, rows: int
) -> None:
    moment = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    same = [uuid.uuid4() for _ in range(25)]
    values = [{"consumer": "c", "message_id": id, "outcome": "done", "processed_at": moment} for id in same]
    with database.engine.begin() as connection:
        connection.execute(sa.insert(database.tables.inbox), values)
    buried(database, same[4], consumer="c")
    handled(database, 50, *(uuid.uuid4() for _ in range(12)))
    batches: list[int] = []
    before = 0

    def note(removed: dict[str, int]) -> None:
        nonlocal before
        batches.append(removed.get("inbox", 0) - before)
        before = removed.get("inbox", 0)

    assert cleanup(database, rows=rows).run(progress=note).removed == {"inbox": 36}
    assert max(batches) <= rows
    assert ids(database, "inbox") == {same[4]}


@pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)
def test_a_row_that_somebody_holds_is_not_waited_for(database: Database) -> None:
    """As a consumer does that replays a message: its transaction is open while its handler works."""
    held, *others = handled(database, 40, *(uuid.uuid4() for _ in range(5)))
    inbox = database.tables.inbox
    with database.open_transaction() as connection:
        connection.execute(sa.update(inbox).where(inbox.c.message_id == held).values(processed_at=clock()))
        assert cleanup(database).run().removed == {"inbox": len(others)}
    assert ids(database, "inbox") == {held}  # handled now, so it is young
    assert cleanup(database).run().removed == {}


@ON_EACH
def test_of_two_cleanups_at_once_each_row_is_removed_by_one(database: Database) -> None:
    handled(database, 40, *(uuid.uuid4() for _ in range(400)))
    counts: list[int] = []
    start = threading.Barrier(2)

    def clean() -> None:
        start.wait()
        counts.append(cleanup(database, rows=7).run().removed.get("inbox", 0))

    threads = [threading.Thread(target=clean) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counts) == 2
    assert sum(counts) == 400 - database.count("inbox")
    cleanup(database).run()  # what one skipped because the other held it
    assert database.count("inbox") == 0


@ON_EACH
def test_what_was_sent_and_not_settled_for_longer_than_that_keeps_its_inbox_row(database: Database) -> None:
    """No relay ran for forty days; the first one sends it again."""
    waits, over = handled(database, 39, uuid.uuid4(), uuid.uuid4())
    unsent(database, waits, 40)
    assert cleanup(database).run().removed == {"inbox": 1}
    assert ids(database, "inbox") == {waits}
    assert over not in ids(database, "inbox")


def test_a_clock_that_has_jumped_removes_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    handled(database, 1)

    behind = SimpleNamespace(now=lambda zone: dt.datetime.now(zone) - dt.timedelta(days=100))
    monkeypatch.setattr(sweep, "dt", SimpleNamespace(datetime=behind, UTC=dt.UTC))
    with pytest.raises(ConfigurationError, match=r"2,400 hours ahead of this machine's: nothing is removed"):
        cleanup(database).run()
    assert database.count("inbox") == 1


def test_a_transaction_that_fails_is_tried_again_and_nothing_is_skipped(database: Database) -> None:
    handled(database, 40, *(uuid.uuid4() for _ in range(30)))
    tables, found = database.tables, []
    made = sweep.Sweep(tables, KEEP, rows=7)
    with database.engine.begin() as connection:
        made.begin(connection)
    for turn in range(100):
        with database.engine.connect() as connection:
            batch = made.batch(connection)
            if turn % 2:  # the commit did not come through
                connection.rollback()
                continue
            connection.commit()
        made.done(batch, 0.001)
        found.append(batch.removed)
        if batch.last:
            break
    assert sum(found) == 30
    assert database.count("inbox") == 0


# ---------------------------------------------------------------- at random

STATES = st.fixed_dictionaries(
    {
        "age": st.sampled_from([1, 29, 31, 400]),
        "outcome": st.sampled_from(["done", "dead"]),
        "attempt": st.sampled_from([None, None, "waiting", "replay"]),
        "letters": st.lists(
            st.tuples(
                st.sampled_from(["billing", "", "shipping"]),
                st.sampled_from(["open", "replayed", "discarded"]),
                st.sampled_from([1, 19, 21, 31]),
            ),
            max_size=2,
            unique_by=lambda one: one[0],
        ),
    }
)


def _goes(state: dict[str, Any]) -> tuple[set[str], bool]:
    """By hand: whose letters go, and whether the inbox row of billing does."""
    gone = {
        consumer
        for consumer, what, closed in state["letters"]
        if what != "open" and closed > 20 and not (consumer == "billing" and state["attempt"])
    }
    left = {consumer for consumer, _, _ in state["letters"]} - gone
    return gone, state["age"] > 30 and not state["attempt"] and not left & {"billing", ""}


@ON_EACH
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states=st.lists(STATES, min_size=1, max_size=8), rows=st.integers(1, 5))
def test_no_row_that_is_needed_is_ever_removed(database: Database, states: list[dict[str, Any]], rows: int) -> None:
    for table in ("inbox", "attempt", "dead_letter"):
        database.execute(sa.delete(getattr(database.tables, table)))
    stays, letters = set(), set()
    for state in states:
        (id,) = handled(database, state["age"], outcome=state["outcome"])
        if state["attempt"]:
            tried(database, id, state["attempt"])
        gone, goes = _goes(state)
        for consumer, what, closed in state["letters"]:
            letter = buried(database, id, what, closed, consumer)
            if consumer not in gone:
                letters.add(letter)
        if not goes:
            stays.add(id)
    cleanup(database, rows=rows).run()
    assert ids(database, "inbox") == stays
    assert ids(database, "dead_letter", "id") == letters
    assert database.count("attempt") == sum(bool(state["attempt"]) for state in states)


# ---------------------------------------------------------------- pace and settings


def test_a_slow_database_gets_smaller_batches_and_longer_pauses() -> None:
    pace = Pace(most=1000)
    for _ in range(4):
        assert pace.after(0.01, full=True) == pytest.approx(0.09)
    assert pace.rows == 1000
    assert pace.after(1.0, full=True) == pytest.approx(9.0)
    assert pace.rows == 50
    assert pace.after(30.0, full=True) == 60.0
    assert pace.rows == 10
    assert pace.after(0.01, full=False) == pytest.approx(0.09)
    assert pace.rows == 10


def test_retention_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_RETENTION_INBOX", "45d")
    monkeypatch.setenv("OUTBOX_RETENTION_AUDIT", "forever")
    found = Retention.from_environment(dead_letter=7 * DAY)
    assert (found.inbox, found.dead_letter, found.audit) == (45 * DAY, 7 * DAY, float("inf"))
    monkeypatch.setenv("OUTBOX_RETENTION_SENT", "a while")
    with pytest.raises(ConfigurationError, match="OUTBOX_RETENTION_SENT: 'a while' is no age"):
        Retention.from_environment()
    assert not Retention.forever().removes


@pytest.mark.parametrize("inbox", [0, -1, 60, float("nan"), True, "30d"])
def test_a_retention_that_would_forget_too_soon_is_refused(inbox: Any) -> None:
    with pytest.raises(ConfigurationError, match="retention: inbox="):
        Retention(inbox=inbox)


async def test_a_consumer_whose_retries_outlast_the_inbox_does_not_start(on_sqlite: Database) -> None:
    cleanup(on_sqlite, Retention(inbox=3600)).run()
    retries = Retries(attempts=10, backoff=Backoff(most=600))
    consumer = Consumer("billing", on_sqlite.outbox, database=on_sqlite.url, transport="memory://late", retries=retries)
    consumer.on("orders")(lambda payload: None)
    with pytest.raises(
        ConfigurationError, match="kept for 1 h 0 m, and the retries of consumer 'billing' can take 1 h 40 m"
    ):
        async with consumer:
            pass
