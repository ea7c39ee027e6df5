"""A database that fails when a test says so: before a statement, or after its commit, when nobody knows the outcome."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from outbox._outgoing import Outgoing
from outbox.errors import StoreUnavailable
from outbox.relay import _relay
from outbox.store import Store
from outbox.stores import open_store

Fault = Callable[[str], BaseException | None]
"""From ``read``, ``settle`` or the name of the transaction's function to what is raised instead of, or after, it."""


def gone(what: str) -> StoreUnavailable:
    return StoreUnavailable(f"the test's fault: {what}")


class Faulty:
    """A `Store` around another."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.tables, self.dialect = store.tables, store.dialect
        self.before: Fault = lambda what: None
        self.after: Fault = lambda what: None
        self.seen: list[str] = []
        self.rewind = store.rewind
        self.close = store.close

    async def read(
        self, buckets: Collection[int] | None, in_flight: Collection[int], without_topics: Collection[str], limit: int
    ) -> list[Outgoing]:
        return await self._do("read", lambda: self.store.read(buckets, in_flight, without_topics, limit))

    async def settle(self, rows: Sequence[Outgoing]) -> int:
        return await self._do("settle", lambda: self.store.settle(rows))

    async def run(self, work: Callable[[sa.Connection], Any]) -> Any:
        # the work of a transaction is mostly a lambda, here named for the function that it calls
        names = [name for name in work.__code__.co_names if name != "parking"]
        return await self._do(names[0] if work.__name__ == "<lambda>" else work.__name__, lambda: self.store.run(work))

    async def _do(self, what: str, call: Callable[[], Any]) -> Any:
        self.seen.append(what)
        if (error := self.before(what)) is not None:
            raise error
        result = await call()
        if (error := self.after(what)) is not None:
            raise error
        return result


@contextmanager
def faulty_stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Faulty]]:
    """Each relay that starts in this block has its store wrapped, and added to the list."""
    made: list[Faulty] = []

    def wrapped(*args: Any) -> Faulty:
        made.append(Faulty(open_store(*args)))
        return made[-1]

    monkeypatch.setattr(_relay, "open_store", wrapped)
    yield made
