from dataclasses import dataclass

from outbox import Outbox, event
from shop.models import Base

outbox = Outbox(Base.metadata)


@event("orders", type="order.placed", key="order_id")
@dataclass
class OrderPlaced:
    order_id: int
    total: int
