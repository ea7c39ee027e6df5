"""Rows that no `Outbox.add` would write: each is sent, a dead letter, or refused by the table. None holds up others."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

import pytest
import sqlalchemy as sa

from outbox._message import bucket_of
from outbox.transport import Outcome
from outbox.transports import open_transport
from outbox.transports.memory import forget
from tests.relay.conftest import ON_EACH
from tests.relay.database import Database
from tests.relay.running import QUICK, eventually, relay, running
from tests.relay.scripted import Scripted


@ON_EACH
@pytest.mark.parametrize("bucket", [64, 99, -1])
@pytest.mark.parametrize("table", ["message", "scheduled"])
def test_a_bucket_that_no_relay_can_own_is_refused(database: Database, table: str, bucket: int) -> None:
    """It would never be read, and nobody would notice."""
    row = {"id": uuid.uuid4(), "bucket": bucket, "topic": "t"}
    if table == "scheduled":
        row["deliver_at"] = sa.func.current_timestamp()
    with pytest.raises(sa.exc.DBAPIError, match="bucket_check"):  # of MariaDB an OperationalError
        database.execute(sa.insert(getattr(database.tables, table)).values(row))


@pytest.mark.parametrize("headers", ["no json", "[1, 2]", '{"a": 1}', "", "{}"])
async def test_headers_that_are_no_object_of_text_make_a_dead_letter_and_others_flow(
    database: Database, headers: str
) -> None:
    forget()
    bad = database.add("a", headers=headers)
    database.add("a", "b")
    drained = await relay(database, open_transport("memory://by-hand")).adrain()
    assert database.count() == database.count("parked") == 0
    accepted = headers in ("", "{}")
    assert (drained.sent, drained.dead) == ((3, 0) if accepted else (2, 1))
    if not accepted:
        (letter,) = database.rows("dead_letter")
        assert (str(letter.message_id), letter.reason, letter.headers) == (bad[0], "rejected", headers)


async def test_an_empty_topic_holds_up_no_other_and_is_not_lost(database: Database) -> None:
    forget()
    database.add("a", topic="")
    database.add("a", topic="good")
    async with running(relay(database, open_transport("memory://empty-topic"))) as found:
        await eventually(lambda: found.counts.sent >= 1)
        await asyncio.sleep(0.1)
        assert found.counts.sent + database.count() + database.count("dead_letter") + database.count("parked") == 2


@ON_EACH
async def test_a_row_with_nothing_but_what_it_must_have_is_sent(database: Database) -> None:
    ids = database.add(None, type=None, payload=None, content_type=None)
    broker = Scripted()
    await relay(database, broker).adrain()
    assert broker.ids() == ids


@ON_EACH
async def test_a_wrong_bucket_of_a_key_loses_nothing_and_blocks_nothing(database: Database) -> None:
    """Its order is not kept against the right one's; that is all."""
    right = bucket_of("k", uuid.uuid4())
    broker = Scripted(lambda row, tries: Outcome.retry("once") if tries == 0 else None)
    # each bucket's head may also be behind the other's: more attempts than one failure costs
    async with running(relay(database, broker, limits=replace(QUICK, attempts=20))):
        ids = database.add("k", "k", bucket=(right + 1) % 64) + database.add("k", "k")
        await eventually(lambda: database.count() == database.count("parked") == 0)
    assert sorted(broker.ids()) == sorted(ids)


@pytest.mark.parametrize("id", ["order 7", "8F14E45F-CEEA-467F-A0D6-6A8A4C8B2E10", "x" * 32])
async def test_on_sqlite_an_id_or_a_time_that_is_none_is_carried_through_to_the_dead_letter(
    on_sqlite: Database, id: str
) -> None:
    with on_sqlite.engine.begin() as connection:
        connection.exec_driver_sql(
            "insert into outbox_message (id, bucket, topic, key, created_at) values (?, ?, 't', 'k', 'yesterday')",
            (id, bucket_of("k", uuid.uuid4())),
        )
    others = on_sqlite.add("k", topic="t")
    broker = Scripted(lambda row, tries: None if row.id in others else Outcome.retry("no"))
    async with running(relay(on_sqlite, broker)):
        await eventually(lambda: on_sqlite.count() == on_sqlite.count("parked") == 0)
    assert broker.ids() == others
    assert on_sqlite.count("dead_letter") == 1
