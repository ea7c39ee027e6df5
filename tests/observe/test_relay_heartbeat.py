"""What status reads out of what a relay writes: its lease time, and that it has fallen silent."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from outbox import Outbox
from outbox.dialects import clock
from outbox.observe.status import Status, status
from outbox.relay.leases import Leases
from outbox.stores import open_store


async def test_the_lease_time_of_a_relay_is_read_out_of_its_renewal(tmp_path: Path) -> None:
    outbox = Outbox()
    tables = outbox.tables
    url = f"sqlite:///{tmp_path}/shop.db"
    engine = sa.create_engine(url)
    outbox.metadata.create_all(engine)
    store = open_store(url, tables)
    leases = Leases(store, 30.0)

    async def look() -> Status:
        return await store.run(lambda connection: status(connection, tables))

    async def renewed(ago: float) -> None:
        """Everything that a renewal writes, so many seconds ago."""
        await leases.renew()
        with engine.begin() as connection:
            connection.execute(sa.update(tables.relay).values(heartbeat_at=clock(-ago)))
            connection.execute(sa.update(tables.lease).values(expires_at=clock(30 - ago)))

    try:
        await leases.renew()
        (relay,) = (await look()).relays
        assert relay.alive
        assert relay.lease is not None
        assert abs(relay.lease - 30) < 0.5
        await renewed(ago=12)
        assert (await look()).relays[0].alive
        await renewed(ago=20)
        found = await look()
        assert not found.relays[0].alive
        assert found.lease_until is not None
        assert 5 < found.lease_until <= 10
        assert found.lease_ends == found.relays[0].lease_ends
    finally:
        await leases.release(leave=True)
        await store.close()
        engine.dispose()
