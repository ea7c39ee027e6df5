"""A broker by script: it stores, fails, holds and delays as a test says, and keeps what it stored, in order."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from outbox._outgoing import Outgoing
from outbox.errors import Unavailable
from outbox.transport import SENT, Capabilities, Outcome
from outbox.transports._pipeline import Pipeline

Script = Callable[[Outgoing, int], Outcome | Exception | None]
"""From a message and how often it was tried before to what becomes of it: None is ``sent``, an exception is raised."""


class Scripted:
    """A `Transport` that keeps the contract's promises: calls are stored in their order, and what is handed over behind a
    message of its key that was not sent, before the caller could know, is not stored either."""

    name = "scripted"

    def __init__(self, script: Script | None = None, *, pipeline: bool = True) -> None:
        self.capabilities = Capabilities(ordered_pipeline=pipeline)
        self.script: Script = script or (lambda row, tries: None)
        self.behind: Callable[[Outgoing], Outcome] = lambda row: Outcome.retry("behind a message that failed")
        """What is said of a message that is not stored because of its predecessor."""
        self.stored: list[Outgoing] = []
        self.acked: list[str] = []
        """Ids whose ``sent`` a caller was given."""
        self.tries: Counter[str] = Counter()
        self.calls: list[list[Outgoing]] = []
        self.log: list[str] = []
        self.open = asyncio.Event()
        """While clear, calls wait before anything is stored."""
        self.open.set()
        self.answering = asyncio.Event()
        """While clear, what is stored is not answered."""
        self.answering.set()
        self.delay: Callable[[], float] = lambda: 0.0
        """Seconds between storing and answering, for each call."""
        self.connects: Callable[[int], Exception | None] = lambda times: None
        self.connected = asyncio.Event()
        self.may_connect = asyncio.Event()
        self.may_connect.set()
        self.closed = False
        self._connects = 0
        self._pipeline = Pipeline()
        self._turn = asyncio.Lock()

    # ------------------------------------------------------------ what a test looks at

    def keys(self) -> list[str | None]:
        return [row.key for row in self.stored]

    def ids(self) -> list[str]:
        return [row.id for row in self.stored]

    def first_ids(self) -> list[str]:
        """Each id once, where it was stored first."""
        return list(dict.fromkeys(self.ids()))

    # ------------------------------------------------------------ the contract

    async def connect(self) -> None:
        self._connects += 1
        error = self.connects(self._connects)
        await self.may_connect.wait()
        if error is not None:
            raise error
        self.closed = False
        self.connected.set()
        self.log.append("connect")

    async def publish(self, batch: Sequence[Outgoing]) -> list[Outcome]:
        call = self._pipeline.enter()
        failed: set[str] = set()
        rows = list(batch)
        self.calls.append(rows)
        try:
            async with self._turn:  # one call after the other, in order
                await self.open.wait()
                if self.closed:
                    raise Unavailable("closed")
                outcomes = self._store(rows, call, failed)
            await self.answering.wait()
            if seconds := self.delay():
                await asyncio.sleep(seconds)
            self.acked += [row.id for row, outcome in zip(rows, outcomes, strict=True) if outcome.kind == "sent"]
            return outcomes
        except Unavailable as error:
            return [Outcome.unavailable(str(error))] * len(rows)
        finally:
            self._pipeline.leave(failed)

    def _store(self, rows: list[Outgoing], call: int, failed: set[str]) -> list[Outcome]:
        wanted: list[Outcome | None] = []
        for row in rows:
            name = f"{row.topic}\0{row.key}"
            if row.key is not None and (name in failed or self._pipeline.blocked(call, name)):
                wanted.append(self.behind(row))
            else:
                tries = self.tries[row.id]
                self.tries[row.id] += 1
                said = self.script(row, tries)
                if isinstance(said, Exception):
                    raise said
                wanted.append(said)
            said = wanted[-1]
            if (
                said is not None
                and said.kind in ("retry", "unavailable")
                and row.key is not None
                and name not in failed
            ):
                failed.add(name)
                self._pipeline.fail(name)
        self.stored += [row for row, said in zip(rows, wanted, strict=True) if said is None]
        return [said or SENT for said in wanted]

    async def close(self, *, abort: bool = False) -> None:
        self.closed = True
        self.log.append("abort" if abort else "close")

    async def subscribe(self, *args: Any, **kw: Any) -> Any:
        raise NotImplementedError

    async def declare(self, topics: Sequence[str], *, partitions: int | None = None) -> None:
        raise NotImplementedError

    async def check(self, topics: Sequence[str]) -> list[str]:
        return []
