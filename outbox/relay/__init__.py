"""The relay: from the outbox table to a broker. `Relay` is its face; one file for each of its concerns."""

from outbox.relay._relay import Drained, Relay
from outbox.relay.flow import Counts, Limits

__all__ = ["Counts", "Drained", "Limits", "Relay"]
