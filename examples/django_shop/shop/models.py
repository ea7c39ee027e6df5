"""The shop's own tables."""

from __future__ import annotations

from django.db import models


class Order(models.Model):
    customer = models.CharField(max_length=100)
    total = models.DecimalField(max_digits=12, decimal_places=2)

    def __str__(self) -> str:
        return f"order {self.pk} of {self.customer}"


class Charge(models.Model):
    order = models.OneToOneField(Order, models.CASCADE, primary_key=True)
    amount = models.DecimalField(max_digits=12, decimal_places=2)

    def __str__(self) -> str:
        return f"charge for order {self.pk}"
