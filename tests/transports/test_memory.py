"""The memory transport between threads and event loops."""

from __future__ import annotations

import asyncio
import threading
import uuid

from outbox.testing.conformance import ids, numbered
from outbox.transports import open_transport


def test_messages_go_from_one_event_loop_to_another() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    sent = numbered("t", 2000)
    found: list[str] = []

    async def publish(part: int) -> None:
        transport = open_transport(url)
        for at in range(part * 1000, part * 1000 + 1000, 50):
            assert {o.kind for o in await transport.publish(sent[at : at + 50])} == {"sent"}

    async def consume() -> None:
        subscription = await open_transport(url).subscribe(["t"], "g", window=100)
        ready.set()
        while len(found) < len(sent):
            batch = await subscription.fetch(100, 5)
            assert batch, "a publisher's thread did not wake this one"
            found.extend(ids(batch))
            await subscription.ack(batch)
        await subscription.close()

    ready = threading.Event()
    threads = [threading.Thread(target=lambda: asyncio.run(consume()))]
    threads[0].start()
    assert ready.wait(10)
    threads += [threading.Thread(target=lambda part=part: asyncio.run(publish(part))) for part in range(2)]
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == sorted(m.id for m in sent)


def test_a_consumer_whose_loop_ended_without_a_word_is_no_trouble() -> None:
    url = f"memory://{uuid.uuid4().hex}?session=0.2"

    async def subscribe() -> None:
        await open_transport(url).subscribe(["t"], "g", window=10)

    asyncio.run(subscribe())

    async def go_on() -> list[str]:
        transport = open_transport(url)
        await transport.publish(numbered("t", 10))
        subscription = await transport.subscribe(["t"], "g", window=10)
        found: list[str] = []
        while len(found) < 10:
            found += ids(await subscription.fetch(10, 1))
        await transport.close()
        return found

    assert len(asyncio.run(asyncio.wait_for(go_on(), 10))) == 10


async def test_a_reader_that_always_finds_something_leaves_the_loop_to_others() -> None:
    transport = open_transport(f"memory://{uuid.uuid4().hex}")
    await transport.publish(numbered("t", 5000))
    subscription = await transport.subscribe(["t"], "g", window=100)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    count = 0
    while count < 5000:
        batch = await subscription.fetch(10, 1)
        count += len(batch)
        await subscription.ack(batch)
    task.cancel()
    assert turns > 400
    await transport.close()
