"""Threads that never keep a process alive: a handler that hangs must not outlast the deadline of a stop."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

T = TypeVar("T")

_numbers: Final = itertools.count(1)


class Threads:
    """Up to ``size`` daemon threads, started when they are needed. `concurrent.futures` joins its threads when the
    interpreter ends; these end with it, which to the database is a crash: what was not committed did not happen."""

    def __init__(self, size: int, name: str) -> None:
        self._size, self._name = size, name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._started = 0
        self._under_way: set[Future[Any]] = set()
        self._lock = threading.Lock()

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call ``work(*arguments)`` in a thread, with a copy of the caller's context. Cancelled while it waits for a thread,
        it is not called; once it runs it goes on, whatever becomes of the caller."""
        future: Future[T] = Future()
        context = contextvars.copy_context()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = context.run(work, *arguments)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            self._under_way.add(future)
            if len(self._under_way) > self._started and self._started < self._size:
                self._started += 1
                threading.Thread(target=self._work, name=f"{self._name}-{next(_numbers)}", daemon=True).start()
        future.add_done_callback(self._is_done)
        self._jobs.put(job)
        return await asyncio.wrap_future(future)

    async def close(self, timeout: float) -> None:
        """Wait for what is under way, ``timeout`` seconds at the most, and let the threads end when they are idle."""
        with self._lock:
            waiting = [asyncio.wrap_future(future) for future in self._under_way]
        if waiting:
            await asyncio.wait(waiting, timeout=timeout)
        for _ in range(self._started):
            self._jobs.put(None)
        self._started = 0

    def _is_done(self, future: Future[Any]) -> None:
        with self._lock:
            self._under_way.discard(future)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # what it holds ends with it, not with the next one
