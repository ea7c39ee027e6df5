"""The relay removes what is over, beside what it sends."""

from __future__ import annotations

import json
import time
import uuid
from itertools import pairwise
from typing import Any

import pytest
import sqlalchemy as sa

from outbox import ConfigurationError
from outbox.backoff import Backoff
from outbox.cleanup import Retention
from outbox.relay import Limits, cleaning
from outbox.stores import open_store
from tests.cleanup.past import DAY, handled, ids
from tests.relay.database import Database
from tests.relay.running import eventually, relay, running


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST", "OTHERS"):
        monkeypatch.setattr(cleaning, name, 0.01)


def ended(database: Database) -> dict[str, Any] | None:
    rows = [json.loads(row.value) for row in database.rows("checkpoint") if row.name == "cleanup"]
    return rows[0] if rows else None


async def test_a_relay_removes_what_is_old_while_it_sends(database: Database) -> None:
    old = handled(database, 31, *(uuid.uuid4() for _ in range(500)))
    (young,) = handled(database, 29)
    found = relay(database, "memory://cleaning")
    async with running(found):
        await eventually(lambda: ended(database))
        database.add(*"abc")
        await eventually(lambda: found.counts.sent == 3)
        assert ids(database, "inbox") == {young}
        done = ended(database)
        assert done is not None
        assert done["removed"] == {"inbox": len(old)}
        assert done["retention"]["inbox"] == 30 * DAY
        handled(database, 31)  # the next sweep is some minutes off
    assert database.count("inbox") == 2


async def test_of_several_relays_the_one_with_bucket_0_does_it(database: Database) -> None:
    found = [relay(database, f"memory://{name}", retention=Retention(inbox=90 * DAY)) for name in "ab"]
    async with running(found[0]), running(found[1]):
        await eventually(lambda: len({row.owner for row in database.rows("lease")}) == 2)
        await eventually(lambda: ended(database))
    assert all(one.error is None for one in found)


async def test_a_relay_that_keeps_everything_removes_nothing(on_sqlite: Database) -> None:
    handled(on_sqlite, 400)
    found = relay(on_sqlite, "memory://keeping", retention=Retention.forever())
    async with running(found):
        on_sqlite.add("a")
        await eventually(lambda: found.counts.sent == 1)
    assert (on_sqlite.count("inbox"), ended(on_sqlite)) == (1, None)


async def test_a_stop_does_not_wait_for_the_rest_of_it(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    handled(database, 31, *(uuid.uuid4() for _ in range(3000)))
    found = relay(database, "memory://stopping")
    async with running(found):
        await eventually(lambda: database.count("inbox") < 3000)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert ended(database) is None
    assert database.count("inbox") > 0


async def test_a_table_that_it_may_not_delete_from_is_said_once_and_sending_goes_on(
    on_postgresql: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaning, "AGAIN", Backoff(first=0.01, factor=1.0, most=0.01))
    handled(on_postgresql, 31)
    on_postgresql.execute(
        sa.text(
            "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'not you'; end $$;"
            "create trigger refuse before delete on outbox_inbox for each row execute function refuse()"
        )
    )
    found = relay(on_postgresql, "memory://refused")
    async with running(found):
        await eventually(lambda: "not you" in caplog.text)
        on_postgresql.add("a")
        await eventually(lambda: found.counts.sent == 1)
    assert caplog.text.count("cannot remove what is over") == 1


def test_an_inbox_that_forgets_before_retries_are_over_is_refused(on_sqlite: Database) -> None:
    limits = Limits(attempts=20, backoff=Backoff(most=3600))
    with pytest.raises(ConfigurationError, match="a message's retries by the relay can take 20 h"):
        relay(on_sqlite, "memory://x", limits=limits, retention=Retention(inbox=3600))


class Owns:
    """Leases, as far as cleaning looks at them."""

    def __init__(self, *buckets: int) -> None:
        self.epochs = dict.fromkeys(buckets, 1)


async def test_a_relay_without_bucket_0_leaves_it_to_the_other_and_gives_up_its_place(on_sqlite: Database) -> None:
    handled(on_sqlite, 31, *(uuid.uuid4() for _ in range(500)))
    store = open_store(on_sqlite.url, on_sqlite.tables)
    leases: Any = Owns(1, 2)
    mine = cleaning.Cleaning(store, leases, Retention())
    assert await mine.step() == cleaning.FIRST
    for _ in range(5):
        assert await mine.step() == cleaning.OTHERS
    assert on_sqlite.count("inbox") == 500
    leases.epochs[0] = 1
    await mine.step()
    await mine.step()
    assert on_sqlite.count("inbox") == 300
    del leases.epochs[0]
    for _ in range(5):
        assert await mine.step() == cleaning.OTHERS
    assert on_sqlite.count("inbox") == 300
    await store.close()


async def test_what_fails_is_tried_again_after_longer_and_longer(on_sqlite: Database) -> None:
    handled(on_sqlite, 31)
    store = open_store(on_sqlite.url, on_sqlite.tables)
    leases: Any = Owns(0)
    mine = cleaning.Cleaning(store, leases, Retention())
    await mine.step()
    on_sqlite.execute(
        sa.text("create trigger refuse before delete on outbox_inbox begin select raise(abort, 'not you'); end")
    )
    assert await mine.step() == 0.0
    # 0.0: a sweep was begun anew
    pauses = [pause for _ in range(7) if (pause := await mine.step())]
    assert pauses[0] > 0.1
    assert all(later > earlier for earlier, later in pairwise(pauses[:4]))
    on_sqlite.execute(sa.text("drop trigger refuse"))
    while on_sqlite.count("inbox"):
        await mine.step()
    assert mine._failures == 0
    await store.close()
