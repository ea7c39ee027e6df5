"""Another process: charges for orders. `outbox consume shop.billing:billing`"""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.orm import Session

from outbox import Consumer
from shop.messaging import OrderPlaced, outbox

billing = Consumer("billing", outbox)


@billing.on(OrderPlaced)
def charge(placed: OrderPlaced, session: Session) -> None:
    """Happens once, however often the message comes: the session's transaction holds the inbox row too."""
    session.execute(
        text("INSERT INTO shop_charge (order_id, amount) VALUES (:id, :amount)"),
        {"id": placed.order_id, "amount": str(placed.total)},
    )
