"""Another process: charges for orders. `outbox consume shop.billing:billing`"""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from outbox import Consumer
from shop.messaging import OrderPlaced, outbox
from shop.models import Charge

billing = Consumer("billing", outbox)


@billing.on(OrderPlaced)
async def charge(placed: OrderPlaced, session: AsyncSession) -> None:
    """Happens once, however often the message comes: the session's transaction holds the inbox row too."""
    session.add(Charge(order_id=placed.order_id, amount=placed.total))
