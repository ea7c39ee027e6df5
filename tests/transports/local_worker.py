"""A process that publishes to, or consumes from, a local log until it is killed. It prints what it has achieved."""

from __future__ import annotations

import asyncio
import sys

from outbox.testing.conformance import ids, message
from outbox.transports import open_transport


async def publish(url: str, topic: str, name: str, size: int, count: int) -> None:
    """``count`` batches of ``size`` messages; prints a batch's number once it is acknowledged. Two calls are under way."""
    transport = open_transport(url)

    async def one(number: int) -> None:
        batch = [message(topic, f"{name}-{at % 5}", f"{name}:{number}:{at}".encode()) for at in range(size)]
        outcomes = await transport.publish(batch)
        assert {outcome.kind for outcome in outcomes} == {"sent"}, outcomes
        print(number, flush=True)

    print("ready", flush=True)
    for number in range(0, count, 2):
        await asyncio.gather(one(number), one(number + 1))
    await transport.close()


async def consume(url: str, topic: str, group: str, member: str) -> None:
    """Prints the id of each message when it is handed out."""
    transport = open_transport(url)
    subscription = await transport.subscribe([topic], group, window=50, member=member or None)
    print("ready", flush=True)
    while True:
        found = await subscription.fetch(10, 1.0)
        for id in ids(found):
            print(id, flush=True)
        await subscription.ack(found)


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    if verb == "publish":
        url, topic, name, size, count = arguments
        asyncio.run(publish(url, topic, name, int(size), int(count)))
    else:
        asyncio.run(consume(*arguments))
