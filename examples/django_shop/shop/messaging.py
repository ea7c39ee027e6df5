"""The shop's outbox, and the messages that it sends."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from outbox import Outbox, event

outbox = Outbox()


@event("shop-orders", type="order.placed", key="order_id")
@dataclass
class OrderPlaced:
    order_id: int
    customer: str
    total: Decimal
