"""The shop of the demo: what a user of this library writes. Its two services run as processes of their own."""

from __future__ import annotations

import os
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox import Consumer, Outbox, event
from outbox.backoff import Backoff
from outbox.consumer import Retries


class Base(DeclarativeBase):
    metadata = sa.MetaData(schema=os.environ.get("OUTBOX_DEMO_SCHEMA") or None)


class Customer(Base):
    __tablename__ = "shop_customer"
    id: Mapped[int] = mapped_column(primary_key=True)
    orders: Mapped[int] = mapped_column(default=0)


class Order(Base):
    __tablename__ = "shop_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int]
    number: Mapped[int]
    """1, 2, 3, … of this customer, given out under the lock of the customer's row: the true order."""


class Charge(Base):
    """The effect, in the consumer's database. Nothing here forbids a second charge for an order, on purpose."""

    __tablename__ = "billing_charge"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(index=True)
    customer_id: Mapped[int]
    number: Mapped[int]


outbox = Outbox(Base.metadata)
TOPIC = os.environ.get("OUTBOX_DEMO_TOPIC", "orders")


@event(TOPIC, type="order.placed", key="customer_id")
@dataclass
class OrderPlaced:
    order_id: int
    customer_id: int
    number: int
    voucher: str = ""


class CannotRollBack(Exception):
    """Raised after the message was added: neither the order nor its message may be seen by anyone."""


def place_order(session: Session, customer_id: int, *, voucher: str = "", fail: bool = False) -> None:
    """One transaction: the order and its message, both or neither."""
    customer = session.get(Customer, customer_id, with_for_update=True)
    assert customer is not None
    customer.orders += 1
    order = Order(customer_id=customer_id, number=customer.orders)
    session.add(order)
    session.flush()
    outbox.add(session, OrderPlaced(order.id, customer_id, order.number, voucher))
    if fail:
        raise CannotRollBack


billing = Consumer("billing", outbox, retries=Retries(attempts=3, backoff=Backoff(first=0.05, most=0.2)))


@billing.on(OrderPlaced)
def charge(event: OrderPlaced, session: Session) -> None:
    if event.voucher and not os.environ.get("OUTBOX_DEMO_FIXED"):
        raise ValueError("percent sign in a voucher")  # the bug that is mended before the replay
    session.add(Charge(order_id=event.order_id, customer_id=event.customer_id, number=event.number))
