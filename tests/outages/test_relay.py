"""The relay's connections are cut in the middle of each of its steps."""

from __future__ import annotations

from collections import defaultdict

import pytest

from outbox._outgoing import Outgoing
from outbox.transport import Outcome
from tests.outages.cutter import WHENS, Cutter, When
from tests.relay.database import Database
from tests.relay.running import eventually, relay, running
from tests.relay.scripted import Scripted

# MySQL is told the index: `delete t from … t force index (primary) where …`
DELETE = r"delete( \w+)? from {}\b"
STEPS = {
    "reading": "select position",
    "settling": DELETE.format("outbox_message"),
    "renewing the leases": "update outbox_lease set expires_at",
    "parking": "insert into outbox_parked",
    "releasing what was parked": DELETE.format("outbox_parked"),
    "giving up": "insert into outbox_dead_letter",
    "committing": "commit",
}
KEYS = ["good", "flaky", "bad", "fine"]


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("step", STEPS)
async def test_nothing_is_lost_and_each_key_keeps_its_order(
    database: Database, cutter: Cutter, step: str, when: When
) -> None:
    fate: dict[str, str] = {}

    def script(row: Outgoing, tries: int) -> Outcome | None:
        if fate.get(row.id) == "bad":
            return Outcome.reject("never")
        return Outcome.retry("not now") if fate.get(row.id) == "flaky" and tries < 1 else None

    broker = Scripted(script)
    found = relay(database, broker, database=cutter.url, lease=1.0)
    async with running(found):
        await found.started.wait()
        database.add("before")
        await eventually(lambda: broker.keys() == ["before"] and database.count() == 0)
        cutter.arm(STEPS[step], when, times=2)
        ids = []
        with database.open_transaction() as connection:
            for _ in range(5):
                added = database.add(*KEYS, connection=connection)
                if not ids:
                    fate |= dict(zip(added, KEYS, strict=True))
                ids += added
        if step in ("committing", "renewing the leases", "reading"):
            await eventually(cutter.cut.is_set)
        await eventually(lambda: database.count() == database.count("parked") == 0)
    letters = database.rows("dead_letter")
    assert cutter.seen > 0
    assert [str(letter.message_id) for letter in letters] == [id for id in ids if fate.get(id) == "bad"]
    sent = [row for row in broker.stored if row.key != "before"]
    assert sorted({row.id for row in sent} | {str(letter.message_id) for letter in letters}) == sorted(ids)
    order = defaultdict(list)
    for id in broker.first_ids():
        order[next(row.key for row in sent if row.id == id) if id in ids else "before"].append(id)
    for at, key in enumerate(KEYS):
        assert order[key] == [id for id in ids[at :: len(KEYS)] if fate.get(id) != "bad"]
