"""Another process: charges for orders. `flask --app shop outbox consume shop.billing:billing`"""

from __future__ import annotations

from outbox_flask import Consumer
from shop.messaging import OrderPlaced, outbox
from shop.models import Charge, db

billing = Consumer("billing", outbox)


@billing.on(OrderPlaced)
def charge(placed: OrderPlaced) -> None:
    """Happens once, however often the message comes: `db.session` is in the transaction that holds the inbox row too."""
    db.session.add(Charge(order_id=placed.order_id, amount=placed.total))
