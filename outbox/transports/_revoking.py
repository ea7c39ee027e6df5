"""Asking a consumer to let go of partitions, the same in every transport that has them."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from outbox.transport import Revoked

logger = logging.getLogger("outbox.transports")

LET_GO: Final = 60.0
"""Seconds that a consumer may take over partitions it is asked to give up; meanwhile others wait for them."""


async def ask_to_let_go(revoked: Revoked | None, places: frozenset[tuple[str, int]], group: str) -> None:
    """Wait for the consumer's callback, but not for ever. What it raises is logged: the partitions go in any case."""
    if revoked is None or not places:
        return
    try:
        async with asyncio.timeout(LET_GO):
            await revoked(places)
    except TimeoutError:
        logger.warning("group %s: gave up %s with messages under way", group, sorted(places))
    except Exception:
        logger.exception("group %s: the callback for revoked partitions failed", group)
