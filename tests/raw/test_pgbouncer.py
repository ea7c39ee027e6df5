"""Behind PgBouncer in transaction mode, with the settings that the user's own statements need there."""

from __future__ import annotations

import asyncpg
import psycopg
import pytest

from tests.raw.shops import RawShop
from tests.raw.test_connections import INSERT, place
from tests.services import PgbouncerServer
from tests.services.fixtures import INSTALL_TIMEOUT
from tests.staging.shop import outbox

pytestmark = pytest.mark.timeout(INSTALL_TIMEOUT)

NAMES = [f"{number:02}" for number in range(12)]  # more than it takes to prepare a statement


def test_psycopg(pgbouncer: PgbouncerServer, postgresql_shop: RawShop) -> None:
    with psycopg.connect(pgbouncer.through(postgresql_shop.dsn), prepare_threshold=None) as connection:
        for name in NAMES:
            assert outbox.claim(connection, "billing", name)
            place(connection, name)
            connection.commit()
    assert postgresql_shop.holds(*NAMES)


async def test_asyncpg(pgbouncer: PgbouncerServer, postgresql_shop: RawShop) -> None:
    connection = await asyncpg.connect(pgbouncer.through(postgresql_shop.dsn), statement_cache_size=0)
    for name in NAMES:
        async with connection.transaction():
            assert await outbox.aclaim(connection, "billing", name)
            await connection.execute(INSERT.format(name))
            await outbox.aadd_all(connection, [{"topic": "orders", "payload": name.encode()}])
    await connection.close()
    assert postgresql_shop.holds(*NAMES)
