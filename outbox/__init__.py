"""Transactional outbox and inbox for SQLAlchemy.

A message committed with your data reaches the broker at least once, and its effect in a consumer's database happens
exactly once, for as long as the inbox remembers it. Start with `Outbox`, `event`, `Relay` and `Consumer`.
"""

from typing import TYPE_CHECKING

from outbox._message import Message, event
from outbox._outbox import Outbox
from outbox._version import __version__
from outbox.errors import (
    ConfigurationError,
    DecodingError,
    Drop,
    EncodingError,
    LeaseLost,
    MessageTooLarge,
    MissingExtra,
    OutboxError,
    Refused,
    Retry,
    SchemaMismatch,
    StoreUnavailable,
    TransactionError,
    TransportError,
    Unavailable,
)

if TYPE_CHECKING:
    from outbox.consumer import Consumer
    from outbox.dead_letters import DeadLetters
    from outbox.relay import Relay
    from outbox.transport import Transport

# Loaded when first asked for: an application that only writes messages pays for nothing else.
_LATER = {
    "Consumer": "outbox.consumer",
    "DeadLetters": "outbox.dead_letters",
    "Relay": "outbox.relay",
    "Transport": "outbox.transport",
}


def __getattr__(name: str) -> object:
    if name in _LATER:
        from importlib import import_module

        value = getattr(import_module(_LATER[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'outbox' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "ConfigurationError",
    "Consumer",
    "DeadLetters",
    "DecodingError",
    "Drop",
    "EncodingError",
    "LeaseLost",
    "Message",
    "MessageTooLarge",
    "MissingExtra",
    "Outbox",
    "OutboxError",
    "Refused",
    "Relay",
    "Retry",
    "SchemaMismatch",
    "StoreUnavailable",
    "TransactionError",
    "Transport",
    "TransportError",
    "Unavailable",
    "__version__",
    "event",
]
