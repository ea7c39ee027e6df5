"""What is known of a replay before it is done."""

from __future__ import annotations

import datetime as dt
import uuid

import pytest
import sqlalchemy as sa

from outbox import ConfigurationError
from outbox.dead_letters import Plan
from outbox.dead_letters.record import Failure
from tests.dead_letters.conftest import ON_EACH
from tests.dead_letters.graveyard import Graveyard


def test_each_destination_is_counted_by_itself_and_nothing_is_changed(graveyard: Graveyard) -> None:
    graveyard.bury(key="1")
    graveyard.bury(key="1", failure=Failure("no-handler"))
    graveyard.bury(key=None, consumer="mail")
    graveyard.bury_unsent(1, key="1")
    graveyard.bury_unsent(2, key=None, headers="not JSON")
    plan = graveyard.letters.plan(topic="orders")
    found = [(to.consumer, to.through, to.count, to.keys, to.handler_ran, to.unreadable) for to in plan.to]
    assert (plan.count, found) == (
        5,
        [
            ("", "outbox_message", 2, 1, 0, 1),
            ("billing", "outbox_attempt", 2, 1, 1, 0),
            ("mail", "outbox_attempt", 1, 0, 1, 0),
        ],
    )
    assert "Of 1 of them a handler ran." in "\n".join(plan.notes())
    assert len(graveyard.letters.find()) == 5
    assert graveyard.rows("attempt") == graveyard.rows("audit") == []


def test_later_letters_that_stay_open_are_a_hole_in_the_order(graveyard: Graveyard) -> None:
    first = graveyard.bury(partition=0, offset=5)
    graveyard.bury(partition=0, offset=4)  # earlier
    graveyard.bury(partition=0, offset=9, type=None)
    graveyard.bury(partition=0, offset=9, key="8")  # of another key
    graveyard.bury(partition=0, offset=9, consumer="mail")

    def open_(plan: Plan) -> int:
        return plan.to[0].later_open

    assert open_(graveyard.letters.plan(first)) == 1
    assert open_(graveyard.letters.plan(consumer="billing", type="order.placed")) == 1  # NULL is not that type
    assert open_(graveyard.letters.plan(consumer="billing", limit=1)) == 2
    assert open_(graveyard.letters.plan(consumer="billing", limit=100)) == 0
    assert open_(graveyard.letters.plan(consumer="billing")) == 0


@ON_EACH
def test_without_offsets_the_time_tells_what_is_later(graveyard: Graveyard) -> None:
    noon = dt.datetime(2026, 11, 22, 12, tzinfo=dt.UTC)
    first = graveyard.bury(created_at=noon)
    graveyard.bury(created_at=noon - dt.timedelta(seconds=1))
    graveyard.bury(created_at=noon + dt.timedelta(seconds=1), partition=1, offset=1)
    assert graveyard.letters.plan(first).to[0].later_open == 1


def test_a_later_message_whose_replay_was_handled_is_known(graveyard: Graveyard) -> None:
    first = graveyard.bury(partition=0, offset=1)
    second = graveyard.bury(partition=0, offset=2)
    graveyard.letters.replay(second)
    assert graveyard.letters.plan(first).to[0].handled_later == 0  # it waits still
    letter = graveyard.letters.get(second)
    assert letter is not None
    with graveyard.engine.begin() as connection:
        assert graveyard.outbox.claim(connection, "billing", letter.message_id, cycle=1)
    (to,) = graveyard.letters.plan(first).to
    assert (to.handled_later, to.later_open) == (1, 0)
    assert to.handled_later_at_most is not None
    assert to.handled_later_at_most >= 1


def test_what_waits_in_the_outbox_goes_before_a_replay_of_the_relays(graveyard: Graveyard) -> None:
    graveyard.bury_unsent(1, key="7")
    with graveyard.engine.begin() as connection:
        for key in ("7", "7", "8", None):
            graveyard.outbox.add(connection, "orders", {}, **({"key": key} if key else {}))
        graveyard.outbox.add(connection, "returns", {}, key="7")
    assert graveyard.letters.plan(consumer="").to[0].queued == 2


def test_more_than_a_statement_takes_parameters(graveyard: Graveyard) -> None:
    id = graveyard.bury(partition=0, offset=0)
    letter = graveyard.tables.dead_letter
    with graveyard.engine.begin() as connection:
        row = dict(connection.execute(sa.select(letter).where(letter.c.id == id)).one()._mapping)
        rows = [{**row, "id": _id(n), "message_id": _id(n), "offset": n} for n in range(1, 70_000)]
        connection.execute(sa.insert(letter), rows)
    plan = graveyard.letters.plan(consumer="billing", limit=69_999)
    assert (plan.count, plan.to[0].later_open) == (69_999, 1)


def test_everything_is_not_planned_by_saying_nothing(graveyard: Graveyard) -> None:
    with pytest.raises(ConfigurationError, match="plan: say which dead letters"):
        graveyard.letters.plan()
    assert graveyard.letters.plan(consumer="nobody") == Plan(0, ())


def _id(number: int) -> uuid.UUID:
    return uuid.UUID(int=number)
