"""What the order of positions means on each database, and what it does not (docs/table.md, Positions)."""

from __future__ import annotations

import threading
from collections import defaultdict

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import staging
from tests.services import MariadbServer, PostgresqlServer
from tests.staging.conftest import server_engine
from tests.staging.shop import TABLES, Base, Shop, outbox, place, tell

message = outbox.tables.message


def positions(shop: Shop) -> list[int]:
    with shop.engine.connect() as connection:
        return list(connection.scalars(sa.select(message.c.position).order_by(message.c.position)))


def settle_all(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        connection.execute(sa.delete(message))


def add(shop: Shop, name: str) -> None:
    with Session(shop.engine) as session, session.begin():
        tell(session, name)


# ---------------------------------------------------------------- on all of them


def test_a_position_that_was_committed_is_never_given_again_though_its_row_is_gone(shop: Shop) -> None:
    seen: list[int] = []
    for name in "abc":
        add(shop, name)
        seen += positions(shop)
        settle_all(shop)
    assert seen == sorted(set(seen))


def test_a_rollback_leaves_a_gap_or_none(shop: Shop) -> None:
    """SQLite gives the position again, which nobody has seen; the others leave it out. So no gap says that a message is
    missing, or is still to come."""
    add(shop, "a")
    with Session(shop.engine) as session:
        tell(session, "b")
        staging.insert_now(session)
        session.rollback()
    add(shop, "c")
    assert positions(shop) == ([1, 2] if shop.engine.name == "sqlite" else [1, 3])


def test_messages_of_one_transaction_keep_the_order_of_add_beside_others_that_add_many(server_shop: Shop) -> None:
    """Theirs may lie in between: with MySQL's innodb_autoinc_lock_mode 2 also within one statement."""
    transactions, many = 6, 400
    engine = server_engine(server_shop.engine.url, pool_size=transactions)
    together = threading.Barrier(transactions)

    def write(number: int) -> None:
        with Session(engine) as session, session.begin():
            session.connection()
            outbox.add_all(session, [{"topic": "orders", "payload": b"%d %d" % (number, n)} for n in range(many)])
            together.wait(30)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(transactions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    engine.dispose()
    found: dict[int, list[int]] = defaultdict(list)
    for name in server_shop.messages():
        number, n = map(int, name.split())
        found[number].append(n)
    assert found == {number: list(range(many)) for number in range(transactions)}


def test_a_position_that_was_taken_early_may_be_committed_late(server_shop: Shop) -> None:
    """So neither a cursor nor a highest position says what was read: `tests/relay/test_floor.py`."""
    with Session(server_shop.engine) as early:
        place(early, "early")
        staging.insert_now(early)
        add(server_shop, "late")
        assert server_shop.messages() == ["late"]
        early.commit()
    assert server_shop.messages() == ["early", "late"]


# ---------------------------------------------------------------- one by one


def test_postgresqls_identity_has_no_cache_since_with_one_the_order_is_gone(postgresql_shop: Shop) -> None:
    """Each session would hand out positions of its own."""
    engine = postgresql_shop.engine
    with engine.begin() as connection:
        cache = "SELECT cache_size FROM pg_sequences WHERE sequencename = 'outbox_message_position_seq'"
        assert connection.exec_driver_sql(cache).scalar() == 1

    def alternate() -> list[str]:
        settle_all(postgresql_shop)
        with engine.connect() as first, engine.connect() as second:
            for number in range(3):
                for connection in (first, second):
                    tell(connection, f"{number}")
                    connection.commit()
        return postgresql_shop.messages()

    assert alternate() == ["0", "0", "1", "1", "2", "2"]
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE outbox_message ALTER position SET CACHE 10")
    assert alternate() == ["0", "1", "2", "0", "1", "2"]
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE outbox_message ALTER position SET CACHE 1")


def test_sqlites_autoincrement_is_what_keeps_positions_from_being_given_again(two_shops: tuple[Shop, Shop]) -> None:
    shop, _ = two_shops
    with shop.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE plain (position INTEGER PRIMARY KEY)")
        for _ in range(2):
            connection.exec_driver_sql("INSERT INTO plain DEFAULT VALUES")
            assert connection.exec_driver_sql("SELECT position FROM plain").scalars().all() == [1]
            connection.exec_driver_sql("DELETE FROM plain")
    add(shop, "a")
    settle_all(shop)
    with shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM")
    shop.engine.dispose()
    add(shop, "b")
    assert positions(shop) == [2]


@pytest.mark.parametrize("end", ["restart", "kill"])
@pytest.mark.parametrize("server", ["postgresql", "mariadb"])
def test_positions_go_on_after_the_server_has_ended(request: pytest.FixtureRequest, server: str, end: str) -> None:
    """MySQL before 8.0 and MariaDB before 10.2.4 forgot them, and began again after the highest row there was."""
    killable: PostgresqlServer | MariadbServer = request.getfixturevalue(f"killable_{server}")
    url = killable.create_database()
    engine = server_engine(url)
    Base.metadata.create_all(engine, tables=TABLES)
    shop = Shop(engine)
    for name in "abc":
        add(shop, name)
    before = positions(shop)
    settle_all(shop)
    engine.dispose()
    if end == "kill":
        killable.kill()
    killable.restart()
    add(shop, "d")
    assert before == [1, 2, 3]
    assert positions(shop)[0] > 3
    engine.dispose()
    killable.drop_database(url)
