"""What the tests of SQS share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from outbox.transport import Delivery, Subscription, Transport

QUICK = {"refresh_ms": 300, "visibility_timeout_ms": 2000, "wait_ms": 1000}

LONG = bool(os.environ.get("OUTBOX_TEST_LONG"))
# Of what is slow, every run has the kind of queue that promises more; the conformance suite has both.
STANDARD_OR_FIFO = pytest.mark.parametrize("fifo", ["no", "yes"] if LONG else ["yes"])

Open = Callable[..., Transport]


def with_parameters(url: str, **parameters: Any) -> str:
    return url + ("&" if "?" in url else "?") + "&".join(f"{name}={value}" for name, value in parameters.items())


def endpoint(url: str) -> str:
    return parse_qs(urlsplit(url).query)["endpoint_url"][0]


async def read_all(subscription: Subscription, count: int | None = None) -> list[Delivery]:
    """Fetch and acknowledge until that many have come, or none for a while."""
    found: list[Delivery] = []
    while count is None or len(found) < count:
        batch = await subscription.fetch(100, 20.0 if count is not None else 1.5)
        if not batch:
            break
        await subscription.ack(batch)
        found += batch
    return found
