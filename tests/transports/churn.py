"""Members of a group that come, go and are killed while messages flow; who read what is kept in order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from outbox.errors import Unavailable
from outbox.testing.conformance import numbered
from outbox.transport import Delivery, Transport
from tests.transports.relaying import Sending
from tests.transports.tools import until


class Churn:
    """``log`` has each delivery with the number of the member that read it, in the order of reading."""

    def __init__(self, topic: str, group: str, keys: int) -> None:
        self.topic, self.group, self.keys = topic, group, keys
        self.log: list[tuple[int, Delivery]] = []
        self.count = 0
        self._enough = asyncio.Event()
        self._members: dict[int, tuple[asyncio.Task[None], asyncio.Event]] = {}
        self._producing: asyncio.Task[None] | None = None

    @property
    def found(self) -> list[Delivery]:
        return [delivery for _, delivery in self.log]

    def produce(self, transport: Transport) -> None:
        self._producing = asyncio.create_task(self._produce(transport))

    async def _produce(self, transport: Transport) -> None:
        while not self._enough.is_set():
            await Sending(transport, numbered(self.topic, self.keys, keys=self.keys, first=self.count)).run()
            self.count += self.keys
            await asyncio.sleep(0.01)  # or the backlog outgrows the handlers, which are to have one

    async def _work(self, number: int, transport: Transport, stop: asyncio.Event, member: str | None) -> None:
        held: list[Delivery] = []

        async def let_go(places: frozenset[tuple[str, int]]) -> None:
            """As the runtime does: what was handled is acknowledged, the rest is forgotten."""
            held[:] = [delivery for delivery in held if (delivery.topic, delivery.partition or 0) not in places]

        subscription = await transport.subscribe([self.topic], self.group, window=100, member=member, revoked=let_go)
        while not stop.is_set():
            try:
                held[:] = await subscription.fetch(20, 0.1)
            except Unavailable:
                continue
            await asyncio.sleep(0.01)  # handlers at work, while others ask for their share
            self.log.extend((number, delivery) for delivery in held)
            await subscription.ack(held)
        await subscription.close()

    def join(self, number: int, transport: Transport, member: str | None = None) -> None:
        stop = asyncio.Event()
        self._members[number] = asyncio.create_task(self._work(number, transport, stop, member)), stop

    async def leave(self, number: int) -> None:
        task, stop = self._members.pop(number)
        stop.set()
        await task

    async def kill(self, number: int, transport: Transport) -> None:
        """As a SIGKILL of its process would."""
        task, _ = self._members.pop(number)
        task.cancel()
        await asyncio.wait([task])
        await transport.close(abort=True)

    async def all_have_some(self, *numbers: int, within: float = 60) -> None:
        seen = len(self.log)
        await until(lambda: {who for who, _ in self.log[seen:]} >= {*numbers}, within=within)

    async def finish(self, members: Sequence[int]) -> None:
        """Send no more, read all that is there, and have these members leave."""
        assert self._producing is not None
        self._enough.set()
        await self._producing
        await until(lambda: len({d.payload for d in self.found}) >= self.count, within=60)
        for number in members:
            await self.leave(number)
