"""The pytest plugin: `outbox.testing` as fixtures. Loaded in every pytest run where pyoutbox is installed, so it imports
next to nothing until a test asks for one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from outbox._outbox import Outbox
    from outbox.testing._capture import Captured
    from outbox.testing._drain import Drained


@pytest.fixture
def outbox_capture() -> Iterator[Callable[[Outbox], Captured]]:
    """``sent = outbox_capture(outbox)``: what is added from here to the end of the test, as `outbox.testing.capture`."""
    from outbox.testing import capture

    with ExitStack() as stack:
        yield lambda outbox: stack.enter_context(capture(outbox))


@pytest.fixture
def outbox_drain() -> Callable[..., Drained]:
    """`outbox.testing.drain`: deliver what the test's transaction holds to a consumer's handlers."""
    from outbox.testing import drain

    return drain
