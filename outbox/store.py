"""The store contract: what the relay asks of a database on its hot path. Everything else is SQLAlchemy Core, through
`Store.run`, written once for all databases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol, TypeVar

import sqlalchemy as sa

from outbox._outgoing import Outgoing
from outbox.tables import Tables

T = TypeVar("T")


class Store(Protocol):
    """One outbox in one database. Every method raises `StoreUnavailable` when the database cannot be asked; then the
    connections are made anew by the next call, and the caller forgets what it read."""

    @property
    def tables(self) -> Tables: ...

    @property
    def dialect(self) -> str: ...

    async def read(
        self, buckets: Collection[int] | None, in_flight: Collection[int], without_topics: Collection[str], limit: int
    ) -> list[Outgoing]:
        """Up to ``limit`` rows of these buckets (None: all) in position order, in one statement, without those whose
        positions are in flight and without some topics.

        **Never inverts a key**: a row that was committed late, below positions read before, comes in the same page as, or
        an earlier one than, any row whose transaction began after that commit. A store may start above positions that
        can no longer appear, and forgets that at `rewind`.
        """
        ...

    def rewind(self) -> None:
        """Read from the first row again: buckets changed hands, or a connection was lost."""
        ...

    async def settle(self, rows: Sequence[Outgoing]) -> int:
        """Delete rows that the broker acknowledged; returns how many were still there. Never repeated after an error:
        after a fail-over a position can be another message. A store whose connections may survive a fail-over (behind a
        pooler) therefore names rows by position **and** id."""
        ...

    async def run(self, work: Callable[[sa.Connection], T]) -> T:
        """Run ``work`` in one transaction on a connection of its own, and commit. It must not touch the event loop."""
        ...

    async def close(self) -> None: ...
