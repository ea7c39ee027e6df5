"""Messages of others: without our id, or from a broker that has no place for a key."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any

import pytest
from sqlalchemy.orm import Session

from outbox import Message
from outbox._message import new_id
from outbox.transport import Delivery
from outbox.transports import open_transport
from tests.consumer.billing import Billing, charge, outbox, placed, running, until_finished
from tests.consumer.wrapped import WrappedTransport, foreign, without_offsets


async def test_a_handler_gets_the_message_with_its_headers_as_fields(sqlite_billing: Billing) -> None:
    consumer = sqlite_billing.consumer()
    seen: list[Message] = []

    @consumer.on("orders")
    def see(message: Message, also: Message) -> None:
        assert message is also
        seen.append(message)

    id = new_id()
    async with running(consumer):
        await sqlite_billing.publish(placed(1, id=id, key="k", headers='{"traceparent": "00-ab", "tenant": "é"}'))
        await until_finished(consumer, 1)
    (message,) = seen
    assert (message.id, message.topic, message.key, message.type) == (id, "orders", "k", "order.placed")
    assert (message.content_type, message.payload) == ("application/json", b'{"order_id": 1, "total": "1.50"}')
    assert message.headers == {"traceparent": "00-ab", "tenant": "é"}
    assert message.created_at is not None


async def test_bytes_and_text_come_as_what_they_are(billing: Billing) -> None:
    """From `add` to a handler that says nothing of its payload."""
    consumer = billing.consumer()
    seen: list[Any] = []

    @consumer.on("orders")
    def see(payload):  # type: ignore[no-untyped-def]
        seen.append(payload)

    given: list[tuple[Any, str | None]] = [
        (b"\xff{", None),
        ("Größe", "text/plain"),
        ("Größe", "text/plain; charset=latin-1"),
        ("Größe", None),
        (b'{"n": 1}', "application/json"),
    ]
    messages = []
    with Session(billing.engine) as session:
        for payload, content_type in given:
            message = outbox.add(session, "orders", payload, key="k", content_type=content_type)
            messages.append(placed(0, id=message.id, payload=message.payload, content_type=message.content_type))
    async with running(consumer):
        await billing.publish(*messages)
        await until_finished(consumer, 5)
    assert seen == [b"\xff{", "Größe", "Größe", "Größe", {"n": 1}]
    assert billing.dead() == []


async def test_debeziums_id_header_is_the_messages_id(sqlite_billing: Billing) -> None:
    billing = sqlite_billing
    consumer = billing.consumer(transport=WrappedTransport(open_transport(billing.transport_url), change=foreign))
    consumer.on("orders")(charge)
    id = new_id()
    async with running(consumer):
        await billing.publish(placed(1, headers=f'{{"id": "{id}"}}'))
        await until_finished(consumer, 1)
    assert [row["message_id"] for row in billing.rows("inbox")] == [id]


async def test_foreign_messages_are_known_by_topic_partition_and_offset(sqlite_billing: Billing) -> None:
    billing = sqlite_billing
    deliveries: list[Delivery] = []

    def note(delivery: Delivery) -> Delivery:
        deliveries.append(delivery)
        return foreign(delivery)

    consumer = billing.consumer(transport=WrappedTransport(open_transport(billing.transport_url), change=note))
    consumer.on("orders")(charge)
    async with running(consumer):
        await billing.publish(placed(1), placed(2), placed(3, key="other"))
        await until_finished(consumer, 3)
    assert sorted(billing.charges()) == [1, 2, 3]
    namespace = uuid.UUID("5c0b7a3e-7f0e-5d0c-9a55-6f7574626f78")
    expected = {uuid.uuid5(namespace, f"{d.topic_id}/{d.partition}/{d.offset}") for d in deliveries}
    assert len(expected) == 3
    assert {row["message_id"] for row in billing.rows("inbox")} == expected


@pytest.mark.parametrize("change", [foreign, without_offsets])
async def test_a_function_of_the_users_names_foreign_messages(sqlite_billing: Billing, change: Any) -> None:
    billing = sqlite_billing

    def number(delivery: Delivery) -> str:
        assert delivery.payload is not None
        return f"order {delivery.payload[13:14].decode()}"

    transport = WrappedTransport(open_transport(billing.transport_url), change=change)
    consumer = billing.consumer(transport=transport, message_id=number)
    consumer.on("orders")(charge)
    async with running(consumer):
        await billing.publish(placed(1), placed(1, key="other"), placed(2))
        await until_finished(consumer, 3)
    assert sorted(billing.charges()) == [1, 2]


async def test_a_message_that_nothing_names_is_a_dead_letter_that_says_what_is_needed(sqlite_billing: Billing) -> None:
    billing = sqlite_billing
    transport = WrappedTransport(open_transport(billing.transport_url), change=without_offsets)
    consumer = billing.consumer(transport=transport)
    consumer.on("orders")(charge)
    async with running(consumer):
        await billing.publish(placed(1))
        await until_finished(consumer, 1)
    (letter,) = billing.dead()
    assert letter.reason == "undeserializable"
    assert "Consumer(message_id=…)" in str(letter.exception_message)
    assert letter.payload == b'{"order_id": 1, "total": "1.50"}'


async def test_a_key_that_travelled_as_a_header_orders_too(sqlite_billing: Billing) -> None:
    billing = sqlite_billing

    def as_a_header(delivery: Delivery) -> Delivery:
        headers = [*delivery.headers, ("outbox-key", delivery.key or b"")]
        return dataclasses.replace(delivery, key=None, headers=headers)

    consumer = billing.consumer(transport=WrappedTransport(open_transport(billing.transport_url), change=as_a_header))
    seen: list[tuple[str | None, int]] = []

    @consumer.on("orders")
    def see(event: dict[str, Any], message: Message) -> None:
        seen.append((message.key, event["order_id"]))

    async with running(consumer):
        await billing.publish(*(placed(number, key="k") for number in range(20)))
        await until_finished(consumer, 20)
    assert seen == [("k", number) for number in range(20)]
