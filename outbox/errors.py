"""Everything that this library raises on purpose. Each docstring is the promise of its message: what happened, to which
message or setting, what to do next."""

from __future__ import annotations


class OutboxError(Exception):
    """The root: ``except OutboxError`` catches whatever pyoutbox raises on purpose, and nothing else."""


class ConfigurationError(OutboxError, ValueError):
    """A setting, URL or argument is wrong. Names it, says what was found and what is accepted. Nothing was started."""


class MissingExtra(ConfigurationError, ImportError):
    """A driver is not installed. Names the ``pip install pyoutbox[…]`` that brings it."""


class EncodingError(OutboxError, ValueError):
    """A payload, key or header cannot be written as bytes. Raised inside the application's transaction, by ``add``:
    nothing was staged. Names the topic and the part that is at fault, never its content."""


class DecodingError(OutboxError, ValueError):
    """Bytes cannot be read as the type that the handler's annotation names. Says which field. A consumer turns it into a
    dead letter with the raw bytes (reason ``undeserializable``) and goes on."""


class MessageTooLarge(EncodingError):
    """A message is larger than its transport accepts. Names both sizes in bytes. The relay makes it a dead letter, so
    that its successors are not held up."""


class TransactionError(OutboxError, RuntimeError):
    """There is no open transaction that the message could belong to, so the guarantee would be a lie: the session is
    closed, its transaction failed or ended, the connection is in autocommit mode, or the data went to another database
    than the message would. Nothing was staged."""


class SchemaMismatch(OutboxError, RuntimeError):
    """The database has no outbox tables, or those of another version, or of another schema or prefix than asked for.
    Names what was found and the command that mends it. Nothing was read or written."""


class StoreUnavailable(OutboxError, RuntimeError):
    """The database cannot be reached, or refuses us. The driver's error is its ``__cause__``. Passwords are not shown.
    The relay and the consumer go on trying; nothing is lost meanwhile."""


class LeaseLost(OutboxError, RuntimeError):
    """Another relay owns the bucket now. The transaction that found out was rolled back; nothing was changed by it."""


class TransportError(OutboxError):
    """A broker refused something or could not be asked. The driver's error is its ``__cause__``."""


class Unavailable(TransportError):
    """The broker, or all of a topic, cannot be used now: down, no authorisation, quota. No attempt is spent on messages
    because of it; they stay where they are until it ends."""


class Refused(TransportError):
    """The broker will never take this message as it is. The relay makes it a dead letter."""


class Retry(OutboxError):
    """Raised by a handler: try this message again, after ``after`` seconds (None: by the consumer's back-off). The
    transaction is rolled back; it counts as an attempt."""

    def __init__(self, why: str = "the handler asked for a retry", *, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


class Drop(OutboxError):
    """Raised by a handler: never try this message again. The transaction is rolled back, the message becomes a dead
    letter (reason ``rejected``) that can be seen and replayed."""
