"""Where messages go whose topic has no route: they wait, and it is told why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from outbox._outgoing import Outgoing
from outbox.transport import Capabilities, Outcome

_KNOWN: Final = 10  # patterns that are named


class Nowhere:
    """`outbox.transport.Publisher`. Nothing that it is given is sent, and no attempt is spent."""

    name = "no route"
    capabilities = Capabilities(ordered_pipeline=True)

    def __init__(self, patterns: Sequence[str]) -> None:
        known = ", ".join(patterns[:_KNOWN]) + (", …" if len(patterns) > _KNOWN else "")
        self._reason = f"no route fits this topic, known are {known}: add one for it, or for '*', and restart the relay"

    async def connect(self) -> None: ...

    async def publish(self, batch: Sequence[Outgoing]) -> list[Outcome]:
        return [Outcome.unavailable(self._reason, scope="topic")] * len(batch)

    async def close(self, *, abort: bool = False) -> None: ...
