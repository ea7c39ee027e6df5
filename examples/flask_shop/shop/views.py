"""The HTTP side: an order and its message commit together."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from flask import Blueprint, abort, request
from flask.typing import ResponseReturnValue

from shop.messaging import OrderPlaced, outbox
from shop.models import Charge, Order, db

views = Blueprint("shop", __name__)


@views.post("/orders")
def place() -> ResponseReturnValue:
    try:
        customer, total = str(request.json["customer"]), Decimal(request.json["total"])
    except (KeyError, TypeError, InvalidOperation):
        abort(400, "an order has a customer, and a total in text")
    order = Order(customer=customer, total=total)
    db.session.add(order)
    db.session.flush()  # order.id exists from here on
    outbox.add(OrderPlaced(order.id, customer, total))
    db.session.commit()
    return {"id": order.id, "charged": None}, 201


@views.get("/orders/<int:id>")
def show(id: int) -> ResponseReturnValue:
    order = db.get_or_404(Order, id)
    charge = db.session.get(Charge, order.id)
    return {"id": order.id, "charged": None if charge is None else str(charge.amount)}
