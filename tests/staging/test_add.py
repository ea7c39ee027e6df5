"""What is written for a message, many at once, later, and taken back."""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import EncodingError, Message, event, staging
from outbox._message import bucket_of
from tests.staging.shop import Order, Shop, outbox, place


@event("orders", type="order.placed", key="order_id", version=2)
@dataclass
class OrderPlaced:
    order_id: int | None
    total: Decimal


def rows(shop: Shop, table: sa.Table) -> list[dict[str, Any]]:
    with shop.engine.connect() as connection:
        first = table.c.position if "position" in table.c else table.c.created_at
        return [dict(row._mapping) for row in connection.execute(sa.select(table).order_by(first))]


def in_table(shop: Shop) -> list[dict[str, Any]]:
    return rows(shop, outbox.tables.message)


def scheduled(shop: Shop) -> list[dict[str, Any]]:
    return rows(shop, outbox.tables.scheduled)


class TestTheRow:
    def test_holds_what_was_given(self, shop: Shop) -> None:
        id = uuid.uuid4()
        before = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
        with Session(shop.engine) as session, session.begin():
            message = outbox.add(
                session,
                "orders",
                {"order": 7, "note": "für Zoë"},
                key="7",
                type="order.placed",
                headers={"tenant": "ü"},
                content_type="application/vnd.shop+json",
                id=id,
            )
        (row,) = in_table(shop)
        assert row.pop("position") == 1
        assert before < row.pop("created_at") < before + dt.timedelta(minutes=1)
        assert row == {
            "id": id,
            "bucket": bucket_of("7", id),
            "topic": "orders",
            "key": "7",
            "type": "order.placed",
            "payload": '{"order":7,"note":"für Zoë"}'.encode(),
            "content_type": "application/vnd.shop+json",
            "headers": '{"tenant":"ü"}',
        }
        assert (message.id, message.key, message.headers) == (id, "7", {"tenant": "ü"})
        assert message.position is None

    def test_of_a_tombstone_has_no_payload_and_no_content_type(self, shop: Shop) -> None:
        with Session(shop.engine) as session, session.begin():
            outbox.add(session, "orders", None, key=uuid.UUID(int=5))
        (row,) = in_table(shop)
        assert (row["payload"], row["content_type"], row["headers"]) == (None, None, None)
        assert row["key"] == "00000000-0000-0000-0000-000000000005"

    def test_of_bytes_holds_them_as_they_are(self, shop: Shop) -> None:
        with Session(shop.engine) as session, session.begin():
            for payload in (b"\x00\xff", bytearray(b"\x01"), memoryview(b"\x02"), b""):
                outbox.add(session, "orders", payload)
        assert [row["payload"] for row in in_table(shop)] == [b"\x00\xff", b"\x01", b"\x02", b""]
        assert {row["content_type"] for row in in_table(shop)} == {"application/octet-stream"}

    def test_of_an_event_is_what_its_class_declares(self, shop: Shop) -> None:
        with Session(shop.engine) as session, session.begin():
            outbox.add(session, OrderPlaced(7, Decimal("1.50")), headers={"tenant": "a"})
        (row,) = in_table(shop)
        assert (row["topic"], row["type"], row["key"]) == ("orders", "order.placed", "7")
        assert row["payload"] == b'{"order_id":7,"total":"1.50"}'
        assert row["headers"] == '{"tenant":"a","outbox-version":"2"}'

    def test_of_an_event_to_another_topic_keeps_what_its_class_declares(self, shop: Shop) -> None:
        """Its key most of all: without one there is no order. What is said wins."""
        event = OrderPlaced(7, Decimal("1.50"))
        with Session(shop.engine) as session, session.begin():
            outbox.add(session, "audit", event)
            outbox.add(session, "audit", event, key="a", type="order.seen")
            outbox.add_all(session, [{"topic": "audit", "payload": event}])
        rows = in_table(shop)
        assert [(row["topic"], row["type"], row["key"]) for row in rows] == [
            ("audit", "order.placed", "7"),
            ("audit", "order.seen", "a"),
            ("audit", "order.placed", "7"),
        ]
        assert {row["headers"] for row in rows} == {'{"outbox-version":"2"}'}

    def test_of_an_event_whose_entity_is_not_flushed_yet_is_refused(self, shop: Shop) -> None:
        with Session(shop.engine) as session:
            order = Order(name="a")
            session.add(order)
            with pytest.raises(EncodingError, match="key is None; flush the entity first"):
                outbox.add(session, OrderPlaced(order.id, Decimal(1)))
            session.flush()
            outbox.add(session, OrderPlaced(order.id, Decimal(1)))
            session.commit()
        assert [row["key"] for row in in_table(shop)] == ["1"]

    def test_of_a_text_or_name_of_a_str_enum_holds_its_value(self, shop: Shop) -> None:
        """psycopg writes an Enum's name, other drivers its value."""
        from enum import StrEnum

        class Name(StrEnum):
            ORDERS = "orders"
            PLACED = "order.placed"
            SEVEN = "7"

        with Session(shop.engine) as session, session.begin():
            outbox.add(session, Name.ORDERS, b"", key=Name.SEVEN, type=Name.PLACED, headers={Name.SEVEN: Name.PLACED})
        (row,) = in_table(shop)
        assert (row["topic"], row["key"], row["type"]) == ("orders", "7", "order.placed")
        assert row["headers"] == '{"7":"order.placed"}'


class TestAddAll:
    def test_takes_events_messages_and_mappings(self, shop: Shop) -> None:
        ready = Message(id=uuid.uuid4(), topic="orders", payload=b"ready", key="8", headers={"a": "b"})
        with Session(shop.engine) as session, session.begin():
            added = outbox.add_all(
                session,
                [OrderPlaced(7, Decimal(1)), ready, {"topic": "orders", "payload": None, "key": 9}],
            )
            assert outbox.staged(session) == added
        assert [row["id"] for row in in_table(shop)] == [message.id for message in added]
        assert [row["key"] for row in in_table(shop)] == ["7", "8", "9"]
        assert added[1] == ready

    def test_adds_none_if_one_cannot_be_encoded(self, shop: Shop) -> None:
        with Session(shop.engine) as session:
            with pytest.raises(EncodingError):
                outbox.add_all(session, [{"topic": "a", "payload": 1}, {"topic": "a", "payload": object()}])
            assert outbox.staged(session) == []
            session.commit()
        assert in_table(shop) == []

    def test_of_nothing_does_nothing(self, shop: Shop) -> None:
        with Session(shop.engine) as session:
            assert outbox.add_all(session, []) == []
            assert not session.in_transaction()

    def test_of_many_on_a_connection(self, shop: Shop) -> None:
        with shop.engine.begin() as connection:
            outbox.add_all(connection, ({"topic": "orders", "payload": number} for number in range(1000)))
        assert [int(row["payload"]) for row in in_table(shop)] == list(range(1000))

    @pytest.mark.parametrize(
        "message",
        [
            {"topic": "orders"},
            {"payload": 1},
            {"topic": "orders", "payload": 1, "kee": 1},
            {"topic": "orders", "payload": 1, 5: 1},
            OrderPlaced,
            "orders",
            object(),
            None,
        ],
    )
    def test_of_something_else_says_so(self, message: object, two_shops: tuple[Shop, Shop]) -> None:
        with Session(two_shops[0].engine) as session, pytest.raises(TypeError):
            outbox.add_all(session, [message])

    @pytest.mark.parametrize(
        "fault",
        [
            {"topic": ""},
            {"payload": "text"},
            {"key": ""},
            {"key": "\x00"},
            {"id": "not a UUID"},
            {"headers": {"a": 1}},
            {"type": 1},
            {"content_type": "x" * 256},
            {"deliver_at": dt.datetime(2026, 1, 1)},  # noqa: DTZ001 - naive, on purpose
        ],
    )
    def test_checks_messages_like_anything_else(self, fault: dict[str, Any], two_shops: tuple[Shop, Shop]) -> None:
        message = Message(**{"id": uuid.uuid4(), "topic": "orders", "payload": b"", **fault})
        with Session(two_shops[0].engine) as session, pytest.raises(EncodingError):
            outbox.add_all(session, [message])


def test_who_watches_inserts_sees_them_before_the_commit(shop: Shop) -> None:
    seen: list[bytes | None] = []
    staging.inserted.append(lambda rows: seen.extend(row.message.payload for row in rows))
    try:
        with Session(shop.engine) as session:
            place(session, "a")
            session.rollback()
            place(session, "b")
            outbox.add(session, "orders", b"later", deliver_at=dt.timedelta(hours=1))
            staging.insert_now(session)
            assert seen == [b"b", b"later"]
            session.commit()
            assert seen == [b"b", b"later"]
    finally:
        staging.inserted.pop()
    assert shop.holds("b")


class TestStaged:
    def test_lists_what_waits_in_the_order_of_add(self, shop: Shop) -> None:
        with Session(shop.engine) as session:
            assert outbox.staged(session) == []
            first = outbox.add(session, "orders", b"a")
            place(session, "b")
            session.flush()
            with session.begin_nested():
                last = outbox.add(session, "orders", b"c")
            assert [message.payload for message in outbox.staged(session)] == [b"a", b"b", b"c"]
            assert (outbox.staged(session)[0], outbox.staged(session)[-1]) == (first, last)
            session.commit()
            assert outbox.staged(session) == []

    def test_is_empty_on_a_connection_where_they_are_rows(self, shop: Shop) -> None:
        with shop.engine.begin() as connection:
            outbox.add(connection, "orders", b"a")
            assert outbox.staged(connection) == []


class TestDeliverAt:
    def test_puts_the_message_among_the_scheduled(self, shop: Shop) -> None:
        due = dt.datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=dt.timezone(dt.timedelta(hours=2)))
        with Session(shop.engine) as session, session.begin():
            message = outbox.add(session, "orders", b"a", key=1, deliver_at=due)
        (row,) = scheduled(shop)
        assert (row["id"], row["deliver_at"], row["bucket"]) == (message.id, due, bucket_of("1", message.id))
        assert row["deliver_at"].tzinfo is dt.UTC or row["deliver_at"].utcoffset() == dt.timedelta()
        assert message.deliver_at == due
        assert in_table(shop) == []

    def test_takes_a_timedelta_from_now(self, shop: Shop) -> None:
        with shop.engine.begin() as connection:
            message = outbox.add(connection, "orders", b"a", deliver_at=dt.timedelta(hours=1))
        (row,) = scheduled(shop)
        assert row["deliver_at"] == message.deliver_at
        left = row["deliver_at"] - dt.datetime.now(dt.UTC)
        assert dt.timedelta(minutes=59) < left <= dt.timedelta(hours=1)

    def test_may_be_in_the_past(self, shop: Shop) -> None:
        with Session(shop.engine) as session, session.begin():
            outbox.add(session, "orders", b"a", deliver_at=dt.timedelta(hours=-1))
        assert len(scheduled(shop)) == 1

    @pytest.mark.parametrize(
        "value",
        [
            dt.datetime(2030, 1, 1),  # noqa: DTZ001 - naive, on purpose
            dt.timedelta.max,
            dt.datetime.max.replace(tzinfo=dt.timezone(-dt.timedelta(hours=1))),
            dt.date(2030, 1, 1),
            60,
            "2030-01-01",
        ],
    )
    def test_refuses_what_is_no_instant(self, value: Any, two_shops: tuple[Shop, Shop]) -> None:
        with Session(two_shops[0].engine) as session:
            with pytest.raises(EncodingError, match="deliver_at"):
                outbox.add(session, "orders", b"a", deliver_at=value)
            assert outbox.staged(session) == []


class TestCancel:
    def test_takes_back_a_scheduled_message_once(self, shop: Shop) -> None:
        with Session(shop.engine) as session, session.begin():
            message, other = (outbox.add(session, "orders", b"a", deliver_at=dt.timedelta(hours=1)) for _ in "ab")
        with Session(shop.engine) as session, session.begin():
            assert outbox.cancel(session, message.id)
            assert not outbox.cancel(session, message.id)
        with shop.engine.begin() as connection:
            assert not outbox.cancel(connection, message.id)
        assert [row["id"] for row in scheduled(shop)] == [other.id]

    def test_is_undone_by_a_rollback(self, shop: Shop) -> None:
        with Session(shop.engine) as session, session.begin():
            message = outbox.add(session, "orders", b"a", deliver_at=dt.timedelta(hours=1))
        with Session(shop.engine) as session:
            assert outbox.cancel(session, message.id)
            session.rollback()
        assert len(scheduled(shop)) == 1

    @pytest.mark.parametrize("deliver_at", [None, dt.timedelta(hours=1)])
    @pytest.mark.parametrize("connected", [True, False])
    def test_takes_back_a_staged_message(self, shop: Shop, deliver_at: dt.timedelta | None, connected: bool) -> None:
        with Session(shop.engine) as session, session.begin():
            if connected:
                session.connection()
            message = outbox.add(session, "orders", b"a", deliver_at=deliver_at)
            place(session, "b")
            assert outbox.cancel(session, message.id)
            assert len(outbox.staged(session)) == 1
        assert shop.holds("b")
        assert scheduled(shop) == []

    def test_leaves_a_message_that_is_due_alone(self, shop: Shop) -> None:
        with Session(shop.engine) as session, session.begin():
            message = outbox.add(session, "orders", b"a")
        with Session(shop.engine) as session, session.begin():
            assert not outbox.cancel(session, message.id)
        assert shop.messages() == ["a"]

    def test_wants_the_id(self, shop: Shop) -> None:
        with Session(shop.engine) as session, pytest.raises(TypeError, match="a UUID, not str"):
            outbox.cancel(session, str(uuid.uuid4()))  # type: ignore[arg-type]
