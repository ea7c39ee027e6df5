"""No statement of the relay or the consumer looks at a whole table: not while the tables are empty, not with a million rows,
and not when they were empty a moment ago and the database has not noticed yet.

Which statements those are is not written down here: a relay and a consumer do what they do, and the database tells.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox._outgoing import Outgoing
from outbox.backoff import Backoff
from outbox.consumer import runtime
from outbox.consumer.attempts import Attempts
from outbox.observe.status import status
from outbox.relay import Limits, Relay, _relay
from outbox.stores import open_store
from outbox.stores.engine import sync_engine_for
from outbox.transport import Outcome
from outbox.transports import memory
from tests.consumer.billing import Billing, OrderPlaced, charge, placed, until
from tests.consumer.billing import running as consuming
from tests.relay.database import Database, key_in_bucket, row
from tests.relay.running import eventually, running
from tests.relay.scripted import Scripted
from tests.stores.planned import Statement, dialect, watched, watched_url

BIG = ("message", "scheduled", "parked", "inbox", "attempt", "dead_letter")
LONG = bool(os.environ.get("OUTBOX_TEST_LONG"))  # a million rows in each of them, which takes a minute more
MANY = {name: 1_000_000 if LONG or name == "message" else 100_000 for name in BIG}
MOST = 50_000  # rows of one statement: a batch, what is in flight, and as much again of a peer's; a whole table is more
MOST_WORK = 1_000_000  # steps of SQLite's for that

# Sources of n = 1, 2, …, {rows}; a UUID and a moment after tomorrow, by n; the others by their names.
DIGITS = " union all ".join(f"select {digit} as d" for digit in range(10))
WORDS = {
    "postgresql": {
        "numbers": "generate_series(1, {rows}) numbers (n)",
        "uuid": "lpad(to_hex(n), 32, '0')::uuid",
        "later": "now() + interval '1 day' + n * interval '1 ms'",
        "bytes": "'x'::bytea",
        "of_thousand": "'k' || (n % 1000)",
        "of_ten": "'parked-' || (n / 10)",
        "key": "key",
    },
    "sqlite": {
        "numbers": "(with recursive numbers (n) as (select 1 union all select n + 1 from numbers where n < {rows})"
        " select n from numbers)",
        "uuid": "printf('%032x', n)",
        "later": "strftime('%Y-%m-%d %H:%M:%f000', 'now', '+1 day', (n / 1000) || ' seconds')",
        "bytes": "x'78'",
        "of_thousand": "'k' || (n % 1000)",
        "of_ten": "'parked-' || (n / 10)",
        "key": "key",
    },
    "mysql": {
        "numbers": "(select 1 + a.d + 10 * b.d + 100 * c.d + 1000 * e.d + 10000 * f.d + 100000 * g.d as n"
        + f" from ({DIGITS}) a, ({DIGITS}) b, ({DIGITS}) c, ({DIGITS}) e, ({DIGITS}) f, ({DIGITS}) g"
        + " having n <= {rows}) numbers",
        "uuid": "concat('00000000-0000-4000-8000-', lpad(hex(n), 12, '0'))",
        "later": "utc_timestamp(6) + interval 1 day + interval n * 1000 microsecond",
        "bytes": "x'78'",
        "of_thousand": "concat('k', n % 1000)",
        "of_ten": "concat('parked-', n div 10)",
        "key": "`key`",
    },
}
FILL = {
    "message": "(id, bucket, topic, {key}, type, payload)"
    " select {uuid}, n % 64, 'orders', {of_thousand}, 'order.placed', {bytes} from {numbers}",
    "scheduled": "(id, bucket, topic, {key}, payload, deliver_at)"
    " select {uuid}, n % 64, 'orders', {of_thousand}, {bytes}, {later} from {numbers}",
    # keys of ten, each with its head
    "parked": "(position, id, bucket, topic, {key}, payload, created_at, role, next_attempt_at)"
    " select -n, {uuid}, 32 + n % 32, 'orders', {of_ten}, {bytes}, {later},"
    " case n % 10 when 9 then 'head' else 'behind' end, {later} from {numbers}",
    "inbox": "(consumer, message_id, outcome) select 'billing', {uuid}, 'done' from {numbers}",
    "attempt": "(consumer, message_id, topic, {key}, sequence, state, next_attempt_at, payload)"
    " select 'billing', {uuid}, 'orders', {of_thousand}, n, 'replay', {later}, {bytes} from {numbers}",
    "dead_letter": "(id, consumer, message_id, cycle, topic, reason, fingerprint, attempts, state)"
    " select {uuid}, 'billing', {uuid}, 0, 'orders', 'rejected', 'f', 1, 'discarded' from {numbers}",
}


def fill(database: Database, rows: Mapping[str, int]) -> None:
    with database.engine.begin() as connection:
        if dialect(database) == "mysql":
            connection.exec_driver_sql("set sql_log_bin = 0")  # nobody reads it, and it is half of the work
        for name, count in rows.items():
            words = {word: text.format(rows=count) for word, text in WORDS[dialect(database)].items()}
            statement = f"insert into outbox_{name} " + FILL[name].format(**words)
            connection.execution_options(no_parameters=True).exec_driver_sql(statement)


def analyze(database: Database) -> None:
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if dialect(database) == "mysql":
            tables = ", ".join(f"outbox_{name}" for name in BIG)
            connection.exec_driver_sql(f"analyze table {tables}").all()
        else:
            connection.exec_driver_sql("vacuum analyze" if database.name == "postgresql" else "analyze")


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def database(request: pytest.FixtureRequest) -> Database:
    found: Database = request.getfixturevalue(f"on_{request.param}")
    if found.name == "postgresql":
        with found.engine.begin() as connection:
            for name in BIG:
                connection.exec_driver_sql(f"alter table outbox_{name} set unlogged")
                # when statistics are taken is the test's to say
                connection.exec_driver_sql(f"alter table outbox_{name} set (autovacuum_enabled = off)")
    return found


# ------------------------------------------------------------ what a relay and a consumer do


def fate(row: Outgoing, tries: int) -> Outcome | None:
    if row.topic == "down":
        return Outcome.unavailable("away", scope="topic")
    if row.type == "refused":
        return Outcome.reject("too big")
    if row.type == "fails once" and tries == 0:
        return Outcome.retry("not now")
    return None


class Sparing(Scripted):
    """Answers for ``others`` messages that are not ``ours``, and for more only once it may `go_on`. A relay that went on
    while a slow machine is still about what was parked would walk over ever more rows of its peer, who sends none."""

    def __init__(self, ours: Sequence[str], others: int) -> None:
        super().__init__(fate)
        self.ours, self.others = set(ours), others
        self.go_on = asyncio.Event()

    async def publish(self, batch: Sequence[Outgoing]) -> list[Outcome]:
        outcomes = await super().publish(batch)
        if len(self.acked) > self.others and self.ours.isdisjoint(row.id for row in batch):
            await self.go_on.wait()
        return outcomes


class Work:
    """Messages of each fate, below the others' positions: half of them in the buckets that a relay has beside a peer, half
    in the rest, for a relay that has all."""

    def __init__(self, database: Database) -> None:
        self.database, self.tables = database, database.tables
        self.ids: list[list[str]] = []
        with database.engine.begin() as connection:
            for first in (0, 32):
                keys = [key_in_bucket(bucket) for bucket in range(first, first + 10)]
                ids = database.add(*keys[:3], type="fails once", connection=connection)
                ids += database.add(*keys[:3], type="behind it", connection=connection)
                database.add(keys[4], type="refused", connection=connection)
                database.add(keys[5], topic="down", connection=connection)
                for key in keys[6:8]:
                    columns = row(key) | {"deliver_at": dt.datetime(2020, 1, 1, tzinfo=dt.UTC)}
                    connection.execute(sa.insert(self.tables.scheduled), columns)
                self.ids.append(ids)

    async def relay(self, ids: list[str], others: int, reads: Sequence[Collection[str]], peers: int = 0) -> None:
        """Until all that can happen has: sent, parked and tried again, given up, moved because it is due, left out of the
        ``reads`` because its topic is away; and so many of the others are sent."""
        database, tables = self.database, self.tables
        far = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)
        for peer in range(peers):
            values = {"owner": f"peer-{peer}", "host": "h", "version": "1", "heartbeat_at": far}
            database.execute(sa.insert(tables.relay).values(values))
        broker = Sparing(ids, others)
        limits = Limits(batch=500, window=2000, poll=0.01, backoff=Backoff(first=0.02, factor=1.5, most=0.1))
        found = Relay(database.outbox, database=watched_url(database), transport=broker, limits=limits)

        def done() -> bool:
            sent = len(broker.acked) > others and set(ids) <= set(broker.acked)
            return sent and found.counts.dead == 1 and ["down"] in map(list, reads)

        async with running(found):
            try:
                await eventually(done, timeout=60)
            finally:
                broker.go_on.set()
        database.execute(sa.delete(tables.relay))


def watched_reads(store: Any, monkeypatch: pytest.MonkeyPatch) -> list[Collection[str]]:
    """The topics that each read of such a store has left out."""
    reads: list[Collection[str]] = []
    read = store.read

    async def reading(self: Any, *arguments: Any) -> Any:
        rows = await read(self, *arguments)
        reads.append(arguments[2])
        return rows

    monkeypatch.setattr(store, "read", reading)
    return reads


async def consume_everything(billing: Billing, url: str, looks: Sequence[None]) -> None:
    """Handled once, skipped as a duplicate, tried again, given up, replayed after some ``looks`` for replays."""
    consumer = billing.consumer(database=url)
    broken = True

    @consumer.on(OrderPlaced)
    def handle(event: OrderPlaced, session: Session) -> None:
        if event.order_id == 1 and broken:
            raise ValueError("not mended yet")
        charge(event, session)

    async with consuming(consumer):
        twice = placed(0)
        await billing.publish(twice, twice, placed(1, key="other"), placed(2))
        await until(lambda: consumer.state.counts.dead == 1 and billing.charges() == [0, 2])
        await until(lambda: len(looks) > 12)
        (letter,) = billing.letters.find(state="open", consumer="billing")
        broken = False
        billing.letters.replay(letter.id)
        await until(lambda: sorted(billing.charges()) == [0, 1, 2])


# ------------------------------------------------------------ what the database did for it

# Once, when buckets come to a relay: all keys of theirs that are parked, to be held in memory.
AT_A_START = "SELECT DISTINCT outbox_parked.bucket"


def too_much(statements: Sequence[Statement], rows: int) -> list[str]:
    """Those that look at a whole table, or at more of it than they are about. A table of one row may be read whole."""
    ours = {f"outbox_{name}" for name in BIG}
    most, most_work = (MOST, MOST_WORK) if rows > 1 else (100, MOST_WORK // 100)

    def is_too_much(statement: Statement) -> bool:
        scans = [scan for scan in statement.scans if scan.table in ours]
        whole = any(scan.whole for scan in scans) and rows > 1
        return whole or max((scan.looked_at or 0 for scan in scans), default=0) > most or statement.work > most_work

    return [str(statement) for statement in statements if is_too_much(statement) and AT_A_START not in statement.text]


def were_seen(statements: Sequence[Statement]) -> None:
    """Fails where what is watched is not what relay and consumer send."""
    texts = [" ".join(statement.text.lower().split()) for statement in statements]
    for words in (
        ("from outbox_message", "order by position"),
        ("from outbox_message", "bucket", "order by position"),
        ("from outbox_message", "and topic", "order by position"),
        ("delete ", "from outbox_message", "position"),
        ("update outbox_lease",),
        ("insert into outbox_parked",),
        ("from outbox_parked", "next_attempt_at <="),
        ("delete ", "from outbox_parked"),
        ("from outbox_scheduled", "deliver_at <="),
        ("delete ", "from outbox_scheduled"),
        ("insert into outbox_dead_letter",),
        ("insert into outbox_inbox",),
        ("update outbox_inbox",),
        ("insert into outbox_attempt",),
        ("update outbox_attempt",),
        ("delete ", "from outbox_attempt"),
    ):
        assert any(all(word in text for word in words) for text in texts), f"never sent: {' … '.join(words)}"


@pytest.mark.parametrize("rows", [1, 1_000_000])
async def test_no_statement_of_relay_and_consumer_looks_at_a_whole_table(
    database: Database, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # often enough for psycopg to prepare what is asked again and again, and for PostgreSQL to keep its plan
    monkeypatch.setattr(_relay, "DUE", 0.02)
    monkeypatch.setattr(runtime, "REPLAY_POLL", 0.02)
    looks: list[None] = []
    take = Attempts.take_replays
    monkeypatch.setattr(Attempts, "take_replays", lambda *a, **kw: looks.append(None) or take(*a, **kw))  # type: ignore[func-returns-value]
    reads = watched_reads(type(open_store(database.url, database.tables)), monkeypatch)
    broker = f"plans-{uuid.uuid4().hex}"
    billing = Billing(database.url, f"memory://{broker}")
    work = Work(database)
    fill(database, {name: min(rows, MANY[name]) for name in BIG})
    analyze(database)
    with watched(database, monkeypatch) as statements:
        others = 5000 if rows > 1 else 0
        await work.relay(work.ids[0], others, reads, peers=1)
        await work.relay(work.ids[1], others, reads)
        await consume_everything(billing, watched_url(database), looks)
    billing.close()
    memory.forget(broker)
    were_seen(statements)
    found = too_much(statements, rows)
    assert not found, "\n".join(found)


def test_the_age_of_the_oldest_message_is_found_without_looking_at_all(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(database, {"message": 100_000, "parked": 100_000})
    analyze(database)
    with watched(database, monkeypatch) as statements:
        engine = sync_engine_for(watched_url(database))
        with engine.connect() as connection:
            assert status(connection, database.tables).pending == 100_000
        engine.dispose()
    ages = [statement for statement in statements if "min(" in statement.text and "created_at" in statement.text]
    assert len(ages) == 2
    assert all(statement.work < 50_000 for statement in ages)
    assert all((scan.looked_at or 0) < 5000 for statement in ages for scan in statement.scans)


async def test_a_plan_made_for_an_almost_empty_table_is_not_kept_for_a_full_one(
    on_postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a prepared statement's would be, until the next ANALYZE: 33 s for each settle of 2,000 among a million."""
    database = on_postgresql
    database.execute(sa.text("alter table outbox_message set (autovacuum_enabled = off)"))
    database.add("k")
    analyze(database)
    with watched(database, monkeypatch) as statements:
        store = open_store(watched_url(database), database.tables)
        for _ in range(15):  # psycopg prepares a statement after five times, PostgreSQL keeps its plan after five more
            rows = await store.read(None, (), (), 2000)
            assert await store.settle(rows) == 1
            database.add("k")
        fill(database, {"message": 100_000})
        statements.clear()
        for _ in range(3):
            rows = await store.read(None, (), (), 2000)
            assert await store.settle(rows) == 2000
        await store.close()
    assert len(statements) >= 6
    found = too_much(statements, MOST)
    assert not found, "\n".join(found)
