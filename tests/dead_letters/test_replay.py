"""Handing dead letters back, and closing them: which ones, in which order, once, and audited."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import sqlalchemy as sa

from outbox import ConfigurationError
from outbox._message import bucket_of, new_id
from outbox.dead_letters import DeadLetters
from outbox.dead_letters import replay as replaying
from tests.dead_letters.conftest import ON_EACH
from tests.dead_letters.graveyard import Graveyard


@ON_EACH
def test_a_consumers_dead_letter_waits_in_its_attempt_table(graveyard: Graveyard) -> None:
    message = new_id()
    id = graveyard.bury(message_id=message, partition=2, offset=99, headers='{"tenant": "a"}')
    assert graveyard.letters.replay(id).count == 1
    (row,) = graveyard.rows("attempt")
    assert (row["consumer"], row["message_id"], row["cycle"], row["state"]) == ("billing", message, 1, "replay")
    assert (row["topic"], row["key"], row["type"], row["partition"]) == ("orders", "7", "order.placed", 2)
    assert (row["offset"], row["sequence"], row["attempts"]) == (99, 99, 0)
    assert (row["payload"], row["headers"]) == (b'{"order_id": 7}', '{"tenant": "a"}')
    (inbox,) = graveyard.rows("inbox")
    assert (inbox["outcome"], inbox["cycle"]) == ("dead", 1)
    letter = graveyard.letters.get(id)
    assert letter is not None
    assert letter.state == "replayed"
    assert letter.closed_at is not None
    assert graveyard.rows("message") == []


@ON_EACH
def test_the_relays_dead_letter_goes_back_into_the_outbox(graveyard: Graveyard) -> None:
    first = graveyard.bury_unsent(10, headers='{"tenant": "a"}')
    second = graveyard.bury_unsent(9, key=None, cycle=3)
    assert graveyard.letters.replay(consumer="").count == 2
    rows = graveyard.rows("message")
    assert [row["id"] for row in rows] == [second, first]  # by their old positions
    assert json.loads(rows[0]["headers"]) == {"outbox-cycle": "4"}
    assert json.loads(rows[1]["headers"]) == {"tenant": "a", "outbox-cycle": "1"}
    assert (rows[1]["payload"], rows[1]["content_type"], rows[1]["key"]) == (b"\x00bytes", "text/plain", "7")
    assert [row["bucket"] for row in rows] == [bucket_of(None, second), bucket_of("7", first)]
    assert graveyard.rows("attempt") == []


def test_unreadable_headers_leave_a_relays_dead_letter_open_and_name_it(graveyard: Graveyard) -> None:
    graveyard.bury_unsent(1, headers="not JSON")
    graveyard.bury_unsent(2)
    (broken, _) = graveyard.letters.find(consumer="")
    replayed = graveyard.letters.replay(consumer="")
    assert (replayed.count, replayed.skipped) == (1, (broken.id,))
    assert [letter.id for letter in graveyard.letters.find()] == [broken.id]


def test_only_what_is_asked_for_is_replayed(graveyard: Graveyard) -> None:
    graveyard.bury(consumer="shipping")
    graveyard.bury(topic="returns")
    wanted = graveyard.bury()
    group = graveyard.letters.find(consumer="billing", topic="orders")[0].fingerprint
    assert graveyard.letters.replay(group=group, topic="orders").count == 1
    assert [letter.id for letter in graveyard.letters.find(state="replayed")] == [wanted]


@ON_EACH
def test_a_limit_takes_the_oldest_a_canary(graveyard: Graveyard) -> None:
    for offset in (5, 3, 4):
        graveyard.bury(offset=offset)
    assert graveyard.letters.replay(consumer="billing", limit=1).count == 1
    assert [row["offset"] for row in graveyard.rows("attempt")] == [3]
    assert graveyard.letters.replay(consumer="billing", limit=0).count == 0
    assert graveyard.letters.replay(consumer="billing").count == 2


def test_many_are_replayed_in_bounded_transactions_each_with_its_line_in_the_audit(
    graveyard: Graveyard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaying, "AT_ONCE", 3)
    for offset in range(8):
        graveyard.bury(offset=offset)
    graveyard.bury(consumer="shipping")
    replayed = graveyard.letters.replay(consumer="billing", who="ada@ops", why="voucher bug mended")
    assert replayed.count == 8
    audit = graveyard.rows("audit")
    assert [row["count"] for row in audit] == [3, 3, 2]
    assert {(row["action"], row["who"], row["why"]) for row in audit} == {("replay", "ada@ops", "voucher bug mended")}
    assert json.loads(audit[0]["target"]) == {"consumer": "billing", "state": "open"}
    assert sorted(row["sequence"] for row in graveyard.rows("attempt")) == list(range(8))


def test_the_audit_says_who_by_itself(graveyard: Graveyard) -> None:
    id = graveyard.bury()
    graveyard.letters.replay(id)
    (row,) = graveyard.rows("audit")
    assert "@" in row["who"]
    assert json.loads(row["target"])["id"] == str(id)


def test_a_second_replay_finds_nothing(graveyard: Graveyard) -> None:
    id = graveyard.bury()
    assert [graveyard.letters.replay(id).count for _ in range(2)] == [1, 0]
    assert len(graveyard.rows("attempt")) == len(graveyard.rows("audit")) == 1


@ON_EACH
def test_of_two_operators_at_once_one_replays_each(graveyard: Graveyard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "AT_ONCE", 5)
    for offset in range(60):
        graveyard.bury(offset=offset)
    counts: list[int] = []
    start = threading.Barrier(2)

    def operate() -> None:
        start.wait()
        counts.append(graveyard.letters.replay(consumer="billing").count)

    threads = [threading.Thread(target=operate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counts) == 2
    assert sum(counts) == len(graveyard.rows("attempt")) == 60
    assert sum(row["count"] for row in graveyard.rows("audit")) == 60


@ON_EACH
@pytest.mark.parametrize("level", [None, "AUTOCOMMIT"])
def test_a_replay_that_fails_in_the_middle_leaves_nothing_half_done(graveyard: Graveyard, level: str | None) -> None:
    """Also on an engine that is in autocommit mode; SQLite, which has no level to change that to, refuses it."""
    graveyard.bury()
    engine = graveyard.engine.execution_options(isolation_level=level) if level else graveyard.engine
    letters = DeadLetters(graveyard.outbox, database=engine)
    if level and graveyard.engine.dialect.name == "sqlite":
        with pytest.raises(ConfigurationError, match="autocommit"):
            letters.replay(consumer="billing")
        return

    def fail(connection: Any, statement: str, *rest: Any) -> None:
        if "outbox_audit" in statement:
            raise RuntimeError("killed here")

    sa.event.listen(graveyard.engine, "before_execute", lambda c, s, *rest: fail(c, str(s)))
    with pytest.raises(RuntimeError, match="killed here"):
        letters.replay(consumer="billing")
    assert [letter.state for letter in graveyard.letters.find(state="any")] == ["open"]
    assert graveyard.rows("attempt") == []
    assert [row["cycle"] for row in graveyard.rows("inbox")] == [0]


@ON_EACH
def test_a_stale_attempt_row_gives_way_and_a_waiting_replay_stays(graveyard: Graveyard) -> None:
    for state, attempts in (("waiting", 2), ("replay", 1)):
        message = new_id()
        graveyard.bury(message_id=message)
        with graveyard.engine.begin() as connection:
            connection.execute(
                graveyard.tables.attempt.insert(),
                {
                    "consumer": "billing",
                    "message_id": message,
                    "topic": "orders",
                    "state": state,
                    "attempts": attempts,
                    "cycle": 0,
                },
            )
    graveyard.letters.replay(consumer="billing")
    assert sorted((row["state"], row["attempts"], row["cycle"]) for row in graveyard.rows("attempt")) == [
        ("replay", 0, 1),
        ("replay", 1, 0),
    ]


def test_discarding_closes_and_keeps_the_inbox_row(graveyard: Graveyard) -> None:
    ids = [graveyard.bury() for _ in range(3)]
    assert graveyard.letters.discard(ids[0], why="a test order") == 1
    assert graveyard.letters.discard(consumer="billing", why="test orders") == 2
    assert graveyard.letters.find() == []
    assert {row["outcome"] for row in graveyard.rows("inbox")} == {"dead"}
    assert [(row["action"], row["count"], row["why"]) for row in graveyard.rows("audit")] == [
        ("discard", 1, "a test order"),
        ("discard", 2, "test orders"),
    ]
    assert graveyard.letters.replay(consumer="billing").count == 0


def test_everything_is_never_meant_by_saying_nothing(graveyard: Graveyard) -> None:
    graveyard.bury()
    with pytest.raises(ConfigurationError, match="replay: say which dead letters"):
        graveyard.letters.replay()
    with pytest.raises(ConfigurationError, match="discard: say which dead letters"):
        graveyard.letters.discard()
    assert len(graveyard.letters.find()) == 1


def test_an_async_engine_is_refused_with_what_to_do(graveyard: Graveyard) -> None:
    from outbox.dead_letters import DeadLetters
    from outbox.stores.engine import async_engine_for

    letters = DeadLetters(graveyard.outbox, database=async_engine_for(graveyard.url))
    with pytest.raises(ConfigurationError, match="this is sync code: pass a URL or a sync Engine"):
        letters.groups()
