"""What goes through: in order, once, and gone from the table after the acknowledgement and not before."""

from __future__ import annotations

import asyncio

import pytest

from outbox.relay import Limits
from outbox.transport import Outcome
from tests.relay.database import Database
from tests.relay.running import eventually, relay, running
from tests.relay.scripted import Scripted

PIPELINES = pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "lanes"])


@PIPELINES
async def test_what_is_committed_is_sent_in_order_and_removed(database: Database, pipeline: bool) -> None:
    ids = database.add(*[f"k{n % 7}" for n in range(500)], *[None] * 20)
    broker = Scripted(pipeline=pipeline)
    drained = await relay(database, broker).adrain()
    assert drained.sent == 520
    assert sorted(broker.ids()) == sorted(ids)
    for key in {f"k{n}" for n in range(7)}:
        of_key = [id for id, k in zip(ids, [f"k{n % 7}" for n in range(500)], strict=False) if k == key]
        assert [row.id for row in broker.stored if row.key == key] == of_key
    assert database.count() == 0
