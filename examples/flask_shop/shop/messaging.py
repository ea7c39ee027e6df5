"""The shop's outbox, and the messages that it sends."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from outbox import event
from outbox_flask import Outbox
from shop.models import db

outbox = Outbox(db)  # its tables join ours


@event("shop-orders", type="order.placed", key="order_id")
@dataclass
class OrderPlaced:
    order_id: int
    customer: str
    total: Decimal
