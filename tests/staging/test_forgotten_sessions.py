"""A session that its owner forgot must be collected, staged messages or not: else its connection is never returned."""

from __future__ import annotations

import gc
import weakref

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox._rows import on_session, on_transaction
from tests.staging.shop import Shop, outbox, place, tell


@pytest.mark.parametrize("connected", [True, False])
def test_a_session_with_staged_messages_in_a_savepoint_is_collected(shop: Shop, connected: bool) -> None:
    engine = sa.create_engine(shop.engine.url, pool_size=1, max_overflow=0, pool_timeout=0.1, poolclass=sa.QueuePool)
    session = Session(engine)
    if connected:
        session.connection()
    session.begin_nested()
    tell(session, "a")
    forgotten = weakref.ref(session)
    del session
    gc.collect()
    assert forgotten() is None
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
    engine.dispose()


def test_nothing_is_remembered_of_sessions_that_ended(shop: Shop) -> None:
    gc.collect()
    before = len(on_session), len(on_transaction)
    for _ in range(20):
        with Session(shop.engine) as session:
            place(session, "a")
            with session.begin_nested():
                outbox.add(session, "orders", b"b")
            session.rollback()
    gc.collect()
    assert (len(on_session), len(on_transaction)) == before
