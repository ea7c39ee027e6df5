"""A disk that is full at the server is no message's fault, however often it is tried. (SQLite's: tests/acceptance.)"""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox.backoff import Backoff
from outbox.consumer.processing import Database
from tests.consumer.billing import Billing, OrderPlaced, charge, placed, running, until, until_finished
from tests.consumer.conftest import MARIADB

# What PostgreSQL and MariaDB say of their own disks; raised by a trigger, as long as `full` has a row.
FULL: dict[str, list[str]] = {
    "postgresql": [
        "create table full_disk (n int)",
        "create function no_room() returns trigger language plpgsql as $$ begin if exists (select from full_disk) then"
        " raise exception 'could not extend file: No space left on device' using errcode = '53100'; end if;"
        " return new; end $$",
        "create trigger no_room before insert on charges for each row execute function no_room()",
    ],
    "mysql": [
        "create table full_disk (n int)",
        "create trigger no_room before insert on charges for each row begin if exists (select 1 from full_disk) then"
        " signal sqlstate 'HY000' set mysql_errno = {errno}, message_text = 'The table ''charges'' is full'; end if; end",
    ],
}


def fill(billing: Billing, errno: int) -> None:
    with billing.engine.begin() as connection:
        for statement in FULL["postgresql" if billing.engine.dialect.name == "postgresql" else "mysql"]:
            connection.exec_driver_sql(statement.replace("{errno}", str(errno)))
        connection.exec_driver_sql("insert into full_disk values (1)")


@pytest.mark.parametrize("errno", [1114, 1021])
@pytest.mark.parametrize("database_url", ["postgresql", MARIADB], indirect=True)
async def test_no_attempt_is_spent_while_the_disk_is_full(
    billing: Billing, errno: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Database, "PROBE", Backoff(first=0.05, factor=2.0, most=0.2))
    fill(billing, errno)
    consumer = billing.consumer()
    tries = 0

    @consumer.on(OrderPlaced)
    def counted(event: OrderPlaced, session: Session) -> None:
        nonlocal tries
        tries += 1
        charge(event, session)

    async with running(consumer):
        await billing.publish(placed(1), placed(2))
        await until(lambda: tries > 6)  # twice what the message would be given
        assert billing.dead() == []
        assert billing.charges() == []
        assert all(row["attempts"] == 0 for row in billing.rows("attempt"))
        with billing.engine.begin() as connection:
            connection.execute(sa.text("delete from full_disk"))
        await until_finished(consumer, 2)
    assert billing.charges() == [1, 2]
    assert billing.dead() == []
