"""The relay's second stream: messages that failed, their keys' successors behind them, and what becomes of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from outbox._message import Outgoing
from outbox.dead_letters.record import Failure
from outbox.errors import LeaseLost
from outbox.relay import parking
from outbox.relay.circuit import EVERYTHING
from outbox.relay.parking import Due, ParkedKey
from outbox.transport import Outcome

if TYPE_CHECKING:
    from outbox.relay.flow import Flow

log = logging.getLogger("outbox.relay")

HEADS_AT_ONCE = 50
BEHIND_AT_ONCE = 200


class Retrying:
    """Parks failed messages, tries them again when they are due, gives up on them when their budget is spent."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.keys: set[ParkedKey] = set()
        """Parked keys of our buckets: what is read of them goes behind, not out."""
        # Parking a successor and releasing its key exclude each other: else the key could be released in between, and the
        # successor would wait behind nothing.
        self._lock = asyncio.Lock()

    async def load(self, buckets: Sequence[int]) -> None:
        """After these buckets became ours, before anything of them is read."""
        tables = self.flow.store.tables
        self.keys |= await self.flow.store.run(lambda c: parking.load_keys(c, tables, buckets))

    async def hold_back(self, rows: list[Outgoing], generation: int) -> list[Outgoing]:
        """Of rows just read, park those whose key is parked; returns the others, in order."""
        if not any((row.topic, row.key) in self.keys for row in rows):
            return rows
        async with self._lock:
            behind = [row for row in rows if (row.topic, row.key) in self.keys]
            if behind:
                await self.flow.guarded(self._park(None, behind), behind, generation)
            held = {row.position for row in behind}
        return [row for row in rows if row.position not in held]

    async def failed(self, failed: Sequence[tuple[Outgoing, Outcome]], waiting: Sequence[Outgoing]) -> None:
        """Messages came back with ``retry`` or ``reject``, ``waiting`` are successors that were held in memory. One
        transaction a key; raises what the store raises, and then some are parked and some are not: all are read again."""
        async with self._lock:
            for row, outcome in failed:
                if outcome.kind == "reject":
                    await self._dead(row, Failure.of_outcome("rejected", outcome))
            retries = [(row, outcome) for row, outcome in failed if outcome.kind == "retry"]
            successors: dict[ParkedKey | None, list[Outgoing]] = {}
            for row in waiting:
                successors.setdefault((row.topic, row.key or ""), []).append(row)
            done: set[ParkedKey] = set()
            for row, outcome in sorted(retries, key=lambda pair: pair[0].position):
                key = None if row.key is None else (row.topic, row.key)
                if key is not None and key in done:
                    continue
                behind: list[Outgoing] = []
                if key is not None:
                    done.add(key)
                    behind = [r for r, _ in retries if (r.topic, r.key) == key and r is not row]
                    behind = sorted([*behind, *successors.get(key, ())], key=lambda r: r.position)
                if key is not None and key in self.keys:  # its predecessor was parked while this was in flight
                    await self._park(None, [row, *behind])
                else:
                    await self._park(row, behind, outcome.reason)

    async def _park(self, head: Outgoing | None, behind: Sequence[Outgoing], error: str = "") -> None:
        flow = self.flow
        tables, fence, delay = flow.store.tables, flow.leases.fence, flow.limits.backoff.delay(1)
        if head is not None and head.key is not None:
            self.keys.add((head.topic, head.key))
        await flow.store.run(lambda c: parking.park(c, tables, fence, head, behind, error, delay))
        flow.counts.parked += len(behind) + (head is not None)
        if head is not None:
            log.warning(
                "message %s for %s (key %s) failed and is parked with %d behind it, next attempt in %.1f s: %s",
                head.id, head.topic, "set" if head.key is not None else "none", len(behind), delay, error,
            )  # fmt: skip

    async def _dead(self, row: Outgoing, failure: Failure) -> bool:
        """Returns whether its key is still parked."""
        flow = self.flow
        tables, fence = flow.store.tables, flow.leases.fence
        parked = await flow.store.run(lambda c: parking.dead(c, tables, fence, row, failure))
        flow.counts.dead += 1
        if not parked and row.key is not None:
            self.keys.discard((row.topic, row.key))
        log.error("message %s for %s is a dead letter (%s)", row.id, row.topic, failure.reason)
        return parked

    # ------------------------------------------------------------ what is due

    async def try_due(self, buckets: Collection[int]) -> None:
        """Try every head whose time has come. Raises `StoreUnavailable`."""
        flow = self.flow
        if EVERYTHING in flow.circuits or not buckets:
            return
        tables, owned = flow.store.tables, list(buckets)
        heads = await flow.store.run(lambda c: parking.due(c, tables, owned, HEADS_AT_ONCE))
        heads = [head for head in heads if head.row.topic not in flow.circuits]
        await asyncio.gather(*(self._try(head) for head in heads))

    async def _try(self, head: Due) -> None:
        try:
            await self._try_key(head)
        except LeaseLost as error:
            log.warning("%s: its parked messages are left to the new owner", error)

    async def _try_key(self, head: Due) -> None:
        """The head, and where it succeeds what waits behind it, as long as that succeeds too."""
        row, attempts = head.row, head.attempts
        rows = [row]
        while rows:
            outcomes = await self.flow.publish(rows)
            good = 0
            while good < len(rows) and outcomes[good].kind == "sent":
                good += 1
            parked = True
            if good:
                self.flow.counts.sent += good
                parked = await self._release(rows[:good])
            if good < len(rows):
                parked = await self._failed(rows[good], attempts if rows[good] is row else 0, outcomes[good])
                if outcomes[good].kind in ("unavailable", "retry"):
                    return
            if not parked or row.key is None:
                return
            rows = await self._following(row)

    async def _following(self, row: Outgoing) -> list[Outgoing]:
        """The next messages of a key whose former head is gone: the new head and what may be sent in one go with it."""
        assert row.key is not None
        flow = self.flow
        tables, key = flow.store.tables, (row.topic, row.key)
        at_once = BEHIND_AT_ONCE if flow.transport.capabilities.ordered_pipeline else 1
        return await flow.store.run(lambda c: parking.next_of_key(c, tables, key, at_once))

    async def _release(self, rows: Sequence[Outgoing]) -> bool:
        """Acknowledged: gone from the table. Returns whether the key is still parked."""
        flow = self.flow
        tables, fence = flow.store.tables, flow.leases.fence
        async with self._lock:
            parked = await flow.store.run(lambda c: parking.sent(c, tables, fence, rows))
            if not parked and rows[0].key is not None:
                self.keys.discard((rows[0].topic, rows[0].key))
        return parked

    async def _failed(self, row: Outgoing, attempts: int, outcome: Outcome) -> bool:
        flow = self.flow
        if outcome.kind == "unavailable":
            return True
        if outcome.kind == "reject":
            async with self._lock:
                return await self._dead(row, Failure.of_outcome("rejected", outcome))
        if attempts + 1 >= flow.limits.attempts:
            async with self._lock:
                return await self._dead(row, Failure.of_outcome("retries-exhausted", outcome))
        tables, fence = flow.store.tables, flow.leases.fence
        delay = flow.limits.backoff.delay(attempts + 1)
        await flow.store.run(lambda c: parking.failed_again(c, tables, fence, row, outcome.reason, delay))
        return True
