"""The connection is cut in the middle of a migration: run again, it ends where an undisturbed one does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

import outbox_migrations
from outbox import Outbox, OutboxError
from outbox._message import BUCKETS
from outbox.observe.schema import check_schema
from outbox.stores.engine import sync_engine_for
from tests.outages.cutter import WHENS, When, cutting
from tests.services import DatabaseServer

# Server, the version before, and where it is cut.
EVERYWHERE = [
    (0, "create table outbox_message"),
    (0, "create table outbox_relay"),
    (0, "insert into outbox_lease"),
    (0, "commit"),
    (1, "create index"),
    (1, "delete from outbox_checkpoint"),
    (1, "insert into outbox_checkpoint"),
]
STEPS = [
    *(("postgresql", *step) for step in [*EVERYWHERE, (1, "alter table"), (1, "commit")]),
    *(("mariadb", *step) for step in EVERYWHERE),
]


@pytest.fixture
def url(request: pytest.FixtureRequest, server: str) -> Iterator[str]:
    found: DatabaseServer = request.getfixturevalue(server)
    url = found.create_database()
    yield url
    found.drop_database(url)


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize(("server", "start", "statement"), STEPS)
def test_a_migration_that_was_cut_off_is_run_again(url: str, start: int, statement: str, when: When) -> None:
    tables = Outbox().tables
    direct = sync_engine_for(url)
    if start:
        outbox_migrations.migrate(direct, to=start)
        with direct.begin() as connection:
            connection.execute(sa.insert(tables.relay).values(owner="o", host="h", version="1"))
    with cutting(url) as cutter:
        engine = sync_engine_for(cutter.url)
        cutter.arm(statement, when)
        with pytest.raises((sa.exc.DBAPIError, OutboxError)):
            outbox_migrations.migrate(engine)
        engine.dispose()
        assert cutter.seen == 1
    outbox_migrations.migrate(direct)
    with direct.connect() as connection:
        check_schema(connection, tables)
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.lease)) == BUCKETS
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.relay)) == start
        indexes = {index["name"] for index in sa.inspect(connection).get_indexes("outbox_dead_letter")}
    assert "outbox_dead_letter_closed_at_idx" in indexes
    assert outbox_migrations.migrate(direct) == []
    direct.dispose()
