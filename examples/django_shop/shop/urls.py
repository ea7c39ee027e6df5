"""The HTTP side: an order and its message commit together."""

from __future__ import annotations

import json
from decimal import Decimal, InvalidOperation

from django.db import connection, transaction
from django.http import HttpRequest, HttpResponseBadRequest, JsonResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404
from django.urls import path
from django.views.decorators.http import require_GET, require_POST

from shop.messaging import OrderPlaced, outbox
from shop.models import Charge, Order


@require_POST
def place(request: HttpRequest) -> HttpResponseBase:
    try:
        given = json.loads(request.body)
        customer, total = str(given["customer"]), Decimal(given["total"])
    except (ValueError, KeyError, TypeError, InvalidOperation):
        return HttpResponseBadRequest("an order has a customer, and a total in text")
    with transaction.atomic():
        order = Order.objects.create(customer=customer, total=total)
        outbox.add(connection, OrderPlaced(order.pk, customer, total))
    return JsonResponse({"id": order.pk, "charged": None}, status=201)


@require_GET
def show(request: HttpRequest, id: int) -> HttpResponseBase:
    order = get_object_or_404(Order, pk=id)
    charge = Charge.objects.filter(order=order).first()
    return JsonResponse({"id": order.pk, "charged": None if charge is None else str(charge.amount)})


urlpatterns = [path("orders", place), path("orders/<int:id>", show)]
