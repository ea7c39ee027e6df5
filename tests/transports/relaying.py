"""What the relay does with a transport, in few lines: several calls under way, and all that was not sent again, in order."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from outbox._outgoing import Outgoing
from outbox.testing.conformance import ids, numbered
from outbox.transport import Delivery, Outcome, Transport
from tests.services import Server
from tests.transports.tools import until


class Sending:
    """Sends messages until all are sent. ``waves``: how long each wave of calls took, in seconds."""

    def __init__(self, transport: Transport, messages: Sequence[Outgoing], *, batch: int = 100, calls: int = 4) -> None:
        self.transport = transport
        self.in_turn = not transport.capabilities.ordered_pipeline
        """Of a key only one message is under way."""
        self.left = list(messages)
        self.batch = batch
        self.calls = calls
        self.sent: list[Outgoing] = []
        self.rejected: list[tuple[Outgoing, Outcome]] = []
        self.unavailable: list[Outcome] = []
        self.waves: list[float] = []

    async def run(self, within: float = 60.0) -> None:
        deadline = time.monotonic() + within
        while self.left:
            assert time.monotonic() < deadline, f"{len(self.left)} are not sent: {self.unavailable[-1:]}"
            wave, rest = self._wave()
            parts = [wave[at * self.batch : (at + 1) * self.batch] for at in range(self.calls)]
            begun = time.monotonic()
            results = await asyncio.gather(*(self.transport.publish(part) for part in parts if part))
            self.waves.append(time.monotonic() - begun)
            again = []
            for message, outcome in zip(
                [m for part in parts for m in part], [o for r in results for o in r], strict=True
            ):
                if outcome.kind == "sent":
                    self.sent.append(message)
                elif outcome.kind == "reject":
                    self.rejected.append((message, outcome))
                else:
                    self.unavailable.append(outcome)
                    again.append(message)
            self.left = again + rest
            if again:
                await asyncio.sleep(0.1)  # the circuit is open for a moment

    def _wave(self) -> tuple[list[Outgoing], list[Outgoing]]:
        """What is sent next, and what after it."""
        most = self.batch * self.calls
        if not self.in_turn:
            return self.left[:most], self.left[most:]
        wave: list[Outgoing] = []
        rest: list[Outgoing] = []
        keys: set[str | None] = set()
        for message in self.left:
            first = len(wave) < most and message.key not in keys
            (wave if first else rest).append(message)
            keys.add(message.key)
        return wave, rest


class Rounds:
    """Rounds of messages whose numbers go on. ``sent``: their ids; ``unavailable``: how often one was not sent at first."""

    def __init__(self, transport: Transport, topic: str, *, keys: int) -> None:
        self.transport, self.topic, self.keys = transport, topic, keys
        self.count = self.unavailable = 0
        self.sent: set[str] = set()

    async def send(self, count: int) -> None:
        """So many more, of a key one at a time."""
        messages = numbered(self.topic, count, keys=self.keys, first=self.count)
        sending = Sending(self.transport, messages, batch=self.keys, calls=1)
        await sending.run(within=600)
        self.count += count
        self.sent |= {m.id for m in sending.sent}
        self.unavailable += len(sending.unavailable)

    def came(self, found: Sequence[Delivery]) -> Counter[str]:
        """How often each one came; fails where one is missing, or is none of these."""
        times = Counter(ids(found))
        assert len(self.sent) == self.count
        assert times.keys() == self.sent
        return times


async def send_through_an_outage(sending: Sending, server: Server, how: str) -> None:
    """Have the server go, by the method ``how``, when a quarter is sent, and come back when that was noticed."""
    quarter = len(sending.left) // 4
    running = asyncio.create_task(sending.run(within=90))
    await until(lambda: len(sending.sent) >= quarter)
    await asyncio.to_thread(getattr(server, how))
    await until(lambda: bool(sending.unavailable))
    assert not running.done()
    await asyncio.to_thread(server.resume if how == "pause" else server.restart)
    await running


def first_deliveries(found: Iterable[Delivery]) -> dict[bytes | None, list[int]]:
    """By key, the numbers in the payloads in the order in which they came first; duplicates may come late."""
    seen: set[str] = set()
    by_key: dict[bytes | None, list[int]] = defaultdict(list)
    for delivery in found:
        (id,) = ids([delivery])
        if id not in seen:
            seen.add(id)
            by_key[delivery.key].append(int(delivery.payload or b""))
    return dict(by_key)


def in_order(count: int, keys: int = 10) -> dict[bytes | None, list[int]]:
    """What `first_deliveries` must be for `numbered` messages."""
    return {b"key-%d" % key: [number for number in range(count) if number % keys == key] for key in range(keys)}
