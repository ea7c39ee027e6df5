"""Consumers: each message's effect once, in order per key, with retries and dead letters."""

from outbox.consumer._consumer import Consumer
from outbox.consumer.retries import Retries
from outbox.consumer.state import Counts, State

__all__ = ["Consumer", "Counts", "Retries", "State"]
