"""The shop's outbox, and the messages that it sends."""

from __future__ import annotations

import os
from dataclasses import dataclass
from decimal import Decimal

from outbox import Outbox, event
from shop.models import Base

outbox = Outbox(Base.metadata)  # its tables join ours


@event(os.environ.get("SHOP_TOPIC", "shop-orders"), type="order.placed", key="order_id")
@dataclass
class OrderPlaced:
    order_id: int
    customer: str
    total: Decimal
