"""A TCP proxy that cuts connections: after so many bytes, or at bytes that matter."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

Direction = Literal["up", "down"]

Plan = Callable[[random.Random], tuple[Direction, int | bytes]]
"""Where to cut the next connection: after so many bytes in a direction, or before the piece that holds these bytes."""


class Cuts:
    def __init__(self, url: str, plan: Plan, seed: int, cuts: int) -> None:
        self._parts = urlsplit(url)
        self._plan = plan
        self._random = random.Random(seed)
        self.left = cuts
        """Connections that will still be cut; those after them are left alone."""
        self.done = 0
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        netloc = self._parts.netloc.rpartition("@")[0] + f"@127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self.url = urlunsplit(self._parts._replace(netloc=netloc))

    async def close(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        where = None
        if self.left:
            self.left -= 1
            where = self._plan(self._random)
        up_reader, up_writer = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        pumps = [
            asyncio.create_task(self._pump(reader, up_writer, "up", where)),
            asyncio.create_task(self._pump(up_reader, writer, "down", where)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass  # the end of the test
        finally:
            for pump in pumps:
                pump.cancel()
            for end in (writer, up_writer):
                with contextlib.suppress(OSError):  # closed already
                    linger = struct.pack("ii", 1, 0)  # a reset, not an orderly end
                    end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                end.transport.abort()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._tasks.discard(task)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        direction: Direction,
        where: tuple[Direction, int | bytes] | None,
    ) -> None:
        budget = where[1] if where is not None and where[0] == direction else None
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if isinstance(budget, bytes) and budget in data:
                    self.done += 1
                    return
                if isinstance(budget, int):
                    if len(data) >= budget:
                        sink.write(data[:budget])
                        await sink.drain()
                        self.done += 1
                        return
                    budget -= len(data)
                sink.write(data)
                await sink.drain()


@asynccontextmanager
async def cutting(url: str, plan: Plan, *, seed: int, cuts: int) -> AsyncIterator[Cuts]:
    found = Cuts(url, plan, seed, cuts)
    await found.start()
    try:
        yield found
    finally:
        await found.close()
