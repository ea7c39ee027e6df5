"""An application that was started before its tables were made: the driver's error is raised as it is, and says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Outbox
from tests.raw.shops import RawShop
from tests.raw.test_async_connections import begin
from tests.raw.test_connections import execute

unmade = Outbox(prefix="unmade_")


def said(error: BaseException) -> bool:
    return any("`outbox migrate --database URL`" in note for note in getattr(error, "__notes__", ()))


def test_of_a_driver(shop: RawShop, connection: Any) -> None:
    with pytest.raises(Exception, match="unmade_message") as found:
        unmade.add(connection, "orders", b"a")
    assert said(found.value)
    connection.rollback()
    with pytest.raises(Exception, match="elsewhere") as found:
        execute(connection, "insert into elsewhere values (1)")
    assert not said(found.value)


async def test_of_an_async_driver(async_driver: str, async_shop: RawShop, async_connection: Any) -> None:
    await begin(async_driver, async_connection)
    with pytest.raises(Exception, match="unmade_message") as found:
        await unmade.aadd(async_connection, "orders", b"a")
    assert said(found.value)


@pytest.mark.parametrize("driver", ["psycopg", "pymysql", "sqlite3"], indirect=True)
def test_of_a_session(shop: RawShop) -> None:
    with Session(shop.engine) as session:
        unmade.add(session, "orders", b"a")
        with pytest.raises(sa.exc.DBAPIError, match="unmade_message") as found:
            session.commit()
    assert said(found.value)
