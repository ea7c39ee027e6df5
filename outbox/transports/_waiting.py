from __future__ import annotations

import asyncio
import contextlib


async def wait(event: asyncio.Event, seconds: float) -> None:
    """Until the event is set, for so many seconds at the most."""
    # Not asyncio.wait_for: in Python 3.11 that can swallow a cancellation.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
