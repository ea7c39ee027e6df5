"""A TCP proxy before a database that cuts at the very bytes: before a statement reaches the server, or when it answers.

It runs in a thread of its own, so that sync and async code can be behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

When = Literal["before it arrives", "at its answer"]

WHENS: tuple[When, When] = ("before it arrives", "at its answer")


class Cutter:
    """`url` is the database's, through it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._upstream = (parts.hostname, parts.port)
        self._loop = asyncio.new_event_loop()
        self._armed: list[tuple[re.Pattern[bytes], When]] = []
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.cut = threading.Event()
        """Set once what was armed has come."""
        self.seen = 0
        """Statements that were armed and came."""
        started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="cutter", daemon=True)
        self._thread.start()
        user = f"{parts.username}@" if parts.username else ""
        self.url = urlunsplit(parts._replace(netloc=f"{user}127.0.0.1:{started.result(10)}"))

    def arm(self, statement: str, when: When, times: int = 1) -> None:
        """Cut at each of the next ``times`` statements that match this pattern somewhere, in any case (``commit`` is not in
        ``set autocommit``). The text must be short enough to come in one piece."""
        with self._lock:
            self.cut.clear()
            self._armed = [(re.compile(rb"(?<!auto)" + statement.encode(), re.IGNORECASE), when)] * times

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    # ------------------------------------------------------------ in the thread

    def _run(self, started: Future[int]) -> None:
        asyncio.set_event_loop(self._loop)

        async def listen() -> int:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            port: int = self._server.sockets[0].getsockname()[1]
            return port

        started.set_result(self._loop.run_until_complete(listen()))
        self._loop.run_forever()

    async def _end(self) -> None:
        self._server.close()
        await asyncio.sleep(0)  # who was accepted just now has begun
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _due(self, data: bytes) -> When | None:
        with self._lock:
            if not self._armed or not self._armed[0][0].search(data):
                return None
            self.seen += 1
            when = self._armed.pop(0)[1]
            if not self._armed:
                self.cut.set()
            return when

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [writer]
        pumps: list[asyncio.Future[None]] = []
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
            ends.append(up_writer)
            swallow = asyncio.Event()
            pumps.append(asyncio.ensure_future(self._up(reader, up_writer, swallow)))
            pumps.append(asyncio.ensure_future(self._down(up_reader, writer, swallow)))
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, asyncio.CancelledError):
            pass  # the database is away: so are we; or this is the end
        finally:
            for pump in pumps:
                pump.cancel()
            for end in ends:
                _reset(end)
            await asyncio.gather(*pumps, return_exceptions=True)
            self._tasks.discard(task)

    async def _up(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, swallow: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                when = self._due(data)
                if when == "before it arrives":
                    return
                if when == "at its answer":
                    swallow.set()
                sink.write(data)
                await sink.drain()

    async def _down(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, swallow: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if swallow.is_set():
                    return
                sink.write(data)
                await sink.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    linger = struct.pack("ii", 1, 0)  # a reset, not an orderly end
    with contextlib.suppress(OSError):  # closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


@contextlib.contextmanager
def cutting(url: str) -> Iterator[Cutter]:
    found = Cutter(url)
    try:
        yield found
    finally:
        found.close()
