"""Waiting for a condition until a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable

POLL_INTERVAL = 0.05  # seconds


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Return True as soon as `condition()` does, False when `timeout` seconds have passed without it."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_INTERVAL)
    return True
