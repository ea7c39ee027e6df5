"""What is not needed any more is removed: bounded batches, transactions of their own, pauses in between."""

from outbox.cleanup._cleanup import Cleaned, Cleanup
from outbox.cleanup.retention import Retention

__all__ = ["Cleaned", "Cleanup", "Retention"]
