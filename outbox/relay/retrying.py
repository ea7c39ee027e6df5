"""The relay's second stream: messages that failed, their keys' successors behind them, and what becomes of them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from outbox._outgoing import Outgoing
from outbox.dead_letters.exception_text import stack_of
from outbox.dead_letters.record import Failure
from outbox.errors import LeaseLost, StoreUnavailable
from outbox.relay import parking
from outbox.relay.parking import Due, ParkedKey, key_of
from outbox.transport import Outcome

if TYPE_CHECKING:
    from outbox.relay.flow import Flow
    from outbox.relay.routes import Route

log = logging.getLogger("outbox.relay")

HEADS_AT_ONCE = 50
BEHIND_AT_ONCE = 200


class Retrying:
    """Parks failed messages, tries them again when they are due, gives up on them when their budget is spent."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.keys: set[ParkedKey] = set()
        """Parked keys of our buckets: what is read of them goes behind, not out."""
        self.loaded: dict[int, int] = {}
        """Bucket to epoch, of those whose parked keys are known. Nothing else may be read or tried."""
        # Keys of which a message failed that is not parked yet, or that may have successors in flight: the publish calls
        # that were under way then. What is parked of a key must have no predecessor that is not parked, also after a crash.
        self._failing: dict[ParkedKey, list[asyncio.Task[None]]] = {}
        self._tries: dict[ParkedKey | int, asyncio.Task[None]] = {}  # key, or position without one, to what tries it
        self._tried: set[ParkedKey | int] = set()  # what ended since the last look for what is due began
        self._trying: Counter[int] = Counter()  # buckets of those
        # Parking a successor and releasing its key exclude each other: else the key could be released in between, and the
        # successor would wait behind nothing.
        self._lock = asyncio.Lock()

    # ------------------------------------------------------------ which keys are parked

    async def load(self, epochs: Mapping[int, int]) -> None:
        """Learn the parked keys of buckets that are new, after their leases have committed and before anything of them is
        read: a successor of a parked message must not overtake it. Raises `LeaseLost` and `StoreUnavailable`."""
        if all(self.loaded.get(bucket) == epoch for bucket, epoch in epochs.items()):
            return
        async with self._lock:
            leases, tables = self.flow.leases, self.flow.store.tables
            new = sorted(bucket for bucket, epoch in leases.epochs.items() if self.loaded.get(bucket) != epoch)
            if new:
                found = await leases.begin(new, lambda c: parking.load_keys(c, tables, new))
                epochs = leases.epochs
                self.keys = {key for key in self.keys if key[0] in epochs and key[0] not in new} | found
                # what was lost and won again while this was asked has another epoch, and is asked for once more
                known = {bucket: epoch for bucket, epoch in self.loaded.items() if bucket in epochs}
                self.loaded = known | {bucket: epochs[bucket] for bucket in new if bucket in epochs}

    def unload(self) -> None:
        """What is known of parked keys may be wrong, since a commit's outcome is unknown: ask again before reading on."""
        self.loaded = {}

    def forget(self) -> None:
        """The flow has forgotten all that was in flight."""
        self.unload()
        self._failing.clear()

    @property
    def trying(self) -> bool:
        return bool(self._tries)

    def busy(self, buckets: Collection[int]) -> bool:
        """Whether a parked message of these is being tried."""
        return any(self._trying[bucket] for bucket in buckets)

    # ------------------------------------------------------------ what the flow finds

    def fails(self, rows: Iterable[Outgoing], under_way: list[asyncio.Task[None]]) -> None:
        """The broker did not take these. What is read of their keys waits until these publish calls are dealt with."""
        for key in {key for row in rows if (key := key_of(row)) is not None}:
            self._failing[key] = under_way

    def _fails(self, row: Outgoing) -> bool:
        key = key_of(row)
        calls = self._failing.get(key) if key is not None else None
        if key is None or calls is None:
            return False
        if all(call.done() for call in calls):
            del self._failing[key]
            return False
        return True

    async def hold_back(self, route: Route, rows: list[Outgoing], generation: int) -> list[Outgoing]:
        """Of a route's rows just read, park those whose key is parked; returns the others, in order, and between that and
        their publishing nothing may be awaited."""
        flow = self.flow
        while flow.current(generation, route):
            if self._failing and any(self._fails(row) for row in rows):
                route.quiet = True  # they are read again when the calls under way are dealt with
                break
            if not self.keys or not any(key_of(row) in self.keys for row in rows):
                break
            async with self._lock:
                if not flow.current(generation, route):
                    break  # with all the rows: the flow drops them, to be read again
                behind = [row for row in rows if key_of(row) in self.keys]
                if behind:
                    await flow.guarded(self._park(None, behind), behind, generation)
            held = {row.position for row in behind}
            rows = [row for row in rows if row.position not in held]
        return rows

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
                successors.setdefault(key_of(row), []).append(row)
            done: set[ParkedKey] = set()
            for row, outcome in sorted(retries, key=lambda pair: pair[0].position):
                key = key_of(row)
                if key is not None and key in done:
                    continue
                behind: list[Outgoing] = []
                if key is not None:
                    done.add(key)
                    behind = [r for r, _ in retries if key_of(r) == key and r is not row]
                    behind = sorted([*behind, *successors.get(key, ())], key=lambda r: r.position)
                if key is not None and key in self.keys:  # its predecessor was parked while this was in flight
                    await self._park(None, [row, *behind])
                elif self.flow.limits.attempts <= 1:
                    await self._dead(row, Failure.of_outcome("retries-exhausted", outcome))
                    if behind:
                        await self._park(None, behind)  # the first of them is due at once
                else:
                    await self._park(row, behind, outcome.reason)

    async def _park(self, head: Outgoing | None, behind: Sequence[Outgoing], error: str = "") -> None:
        flow = self.flow
        tables, fence, delay = flow.store.tables, flow.leases.fence, flow.limits.backoff.delay(1)
        await flow.store.run(lambda c: parking.park(c, tables, fence, head, behind, error, delay))
        # only now: a key that is not parked after all would let its messages wait behind nothing
        self.keys.update(key for row in [head, *behind] if row is not None and (key := key_of(row)) is not None)
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
        if not parked and (key := key_of(row)) is not None:
            self.keys.discard(key)
        why = failure.exception_message or failure.exception_type or "no reason was given"
        log.error("message %s for %s is a dead letter (%s): %s", row.id, row.topic, failure.reason, why.splitlines()[0])
        return parked

    # ------------------------------------------------------------ what is due

    def wanted(self) -> tuple[list[int], list[str], int]:
        """What `parking.due` should look for: buckets, topics to leave out, how many heads. No buckets: nothing now."""
        flow = self.flow
        self._tried.clear()
        room = HEADS_AT_ONCE - len(self._tries)
        reachable = [route for route in flow.routes if route.reachable]
        if not flow.ready or not reachable or room <= 0:
            return [], [], 0
        if flow.routes.all_down:
            room = 1  # a probe: where all that is left is parked, no one else tries whether the broker is back
        return flow.owned(), flow.routes.without(reachable), room + len(self._tries)

    def try_due(self, heads: Sequence[Due]) -> None:
        """Begin to try each of these. Not those that are being tried, or were since they were looked for."""
        owned = self.flow.owned() if heads else []
        for head in heads:
            name = _name(head.row)
            if head.row.bucket not in owned or not self.flow.routes.of(head.row.topic).reachable:
                continue
            if self._fails(head.row):
                continue  # a call that may hold its successors is under way: what it would tell is about them, too
            if name not in self._tries and name not in self._tried and len(self._tries) < HEADS_AT_ONCE:
                self._trying[head.row.bucket] += 1
                task = self._tries[name] = asyncio.create_task(self._try(head))
                task.add_done_callback(lambda _, row=head.row: self._ended(row))  # type: ignore[misc]

    def _ended(self, row: Outgoing) -> None:
        self._tried.add(_name(row))
        self._tries.pop(_name(row), None)
        self._trying[row.bucket] -= 1
        self.flow.progress()

    async def finish(self) -> None:
        """Wait for what is being tried."""
        while self._tries:
            await asyncio.wait(list(self._tries.values()))

    async def cancel(self) -> None:
        for task in list(self._tries.values()):
            task.cancel()
        await self.finish()

    async def _try(self, head: Due) -> None:
        flow = self.flow
        try:
            await self._try_key(head)
        except LeaseLost as error:
            log.warning("%s: its parked messages are left to the new owner", error)
            self.unload()
        except StoreUnavailable as error:
            log.error("cannot store the fate of a parked message, it is tried again: %s", error)
            flow.troubles.rest("try", error)
            self.unload()
        except Exception as error:
            log.error("trying a parked message failed in an unforeseen way; it is tried again:\n%s", stack_of(error))
            flow.troubles.rest("try", error)
            self.unload()

    async def _try_key(self, head: Due) -> None:
        """The head, and where it succeeds what waits behind it, as long as that succeeds too."""
        rows, attempts = [head.row], head.attempts
        route = self.flow.routes.of(head.row.topic)
        while rows:
            generation = self.flow.generation
            outcomes = await self.flow.publish(route, rows, parked=True)
            good, parked, stopped = [], True, False
            for row, outcome in zip(rows, outcomes, strict=True):
                if outcome.kind == "sent":
                    good.append(row)
                    continue
                if good:
                    parked, good = await self._release(good), []
                parked = await self._failed(row, attempts if row is head.row else 0, outcome)
                if outcome.kind in ("unavailable", "retry"):
                    stopped = True
                    break
            if good:
                parked = await self._release(good)
            if stopped or not parked or head.row.key is None or generation != self.flow.generation:
                return
            rows = await self._following(route, head.row)

    async def _following(self, route: Route, row: Outgoing) -> list[Outgoing]:
        """The next messages of a key whose former head is gone: the new head and what may be sent in one go with it."""
        flow = self.flow
        key = key_of(row)
        if key is None or not flow.ready or not route.reachable or row.bucket not in flow.owned():
            return []
        tables = flow.store.tables
        at_once = BEHIND_AT_ONCE if route.transport.capabilities.ordered_pipeline else 1
        return await flow.store.run(lambda c: parking.next_of_key(c, tables, key, at_once))

    async def _release(self, rows: Sequence[Outgoing]) -> bool:
        """Acknowledged: gone from the table. Returns whether the key is still parked."""
        flow = self.flow
        tables, fence = flow.store.tables, flow.leases.fence
        async with self._lock:
            parked = await flow.store.run(lambda c: parking.sent(c, tables, fence, rows))
            flow.troubles.works("try")
            flow.counts.sent += len(rows)
            if not parked and (key := key_of(rows[0])) is not None:
                self.keys.discard(key)
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


def _name(row: Outgoing) -> ParkedKey | int:
    return key_of(row) or row.position
