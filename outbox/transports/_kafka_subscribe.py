"""A member of a Kafka consumer group."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, errors
from aiokafka.structs import TopicPartition

from outbox.errors import ConfigurationError, Unavailable
from outbox.transport import Delivery, Revoked
from outbox.transports._kafka_client import cancel, describe, diagnose, ended, hang_up, unavailable
from outbox.transports._kafka_settings import Settings
from outbox.transports._offsets import Offsets
from outbox.transports._revoking import LET_GO, ask_to_let_go
from outbox.transports._waiting import wait

logger = logging.getLogger("outbox.transports")

COMMIT: Final = 0.2
"""Seconds between commits, at the most."""

TAKEN_AWAY: Final = (3, 60.0)
"""A static member that lost its place so often in so many seconds has a namesake. aiokafka does not tell (it sends heartbeats
of a version that knows no static members): both would take the place from each other for ever and read everything twice."""

CLOSE: Final = 5.0
"""Seconds for the last commit, and again for leaving the group."""

FOREVER: Final = 2**31 - 1
"""Milliseconds. We do not always ask for more messages, and that says nothing about our health: `max.poll.interval` would
throw out a consumer whose window is full."""

_Place = tuple[str, int]


class Held:
    """One partition in one assignment; the token of its deliveries."""

    __slots__ = ("offsets", "records")

    def __init__(self) -> None:
        self.offsets = Offsets(0)
        self.records: deque[Any] = deque()
        """Read, and not handed out yet."""


class KafkaSubscription:
    def __init__(
        self,
        settings: Settings,
        topics: Sequence[str],
        group: str,
        *,
        window: int,
        member: str | None,
        revoked: Revoked | None,
    ) -> None:
        if window < 1 or not topics or not group:
            raise ConfigurationError("a subscription needs topics, a group and a window of at least one message")
        self._settings = settings
        self._topics = sorted(set(topics))
        self._group = group
        self._window = window
        self._member = member
        self._revoked = revoked
        self._consumer = self._make(member)
        self._held: dict[_Place, Held] = {}
        self._paused: set[_Place] = set()
        self._rebalancing = True
        self._first = 0
        self._awake = asyncio.Event()
        self._commit_now = asyncio.Event()
        self._committing = asyncio.Lock()
        self._letting_go: asyncio.Task[None] | None = None
        self._lost_at: deque[float] = deque(maxlen=TAKEN_AWAY[0])
        self._failure: ConfigurationError | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.closed = False

    def _make(self, member: str | None) -> Any:
        session = int(self._settings.session_timeout * 1000)
        return AIOKafkaConsumer(
            **self._settings.connection(),
            group_id=self._group,
            group_instance_id=member,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            isolation_level="read_committed",
            session_timeout_ms=session,
            heartbeat_interval_ms=max(1, session // 4),
            rebalance_timeout_ms=int((LET_GO + CLOSE) * 1000),
            max_poll_interval_ms=FOREVER,
        )

    async def join(self) -> None:
        """Raises `Unavailable`, also for a topic that does not exist."""
        consumer = self._consumer
        consumer.subscribe(topics=self._topics, listener=_Listener(self))
        try:
            async with asyncio.timeout(LET_GO + self._settings.delivery_timeout):
                async with asyncio.timeout(self._settings.delivery_timeout):
                    await consumer._client.bootstrap()
                    found = await describe(consumer._client, self._topics, self._settings)
                for error in found.values():
                    if isinstance(error, Exception):
                        raise error
                await consumer.start()  # may wait for other members to give up what they have
        except (errors.KafkaError, TimeoutError) as error:
            await self._cut()
            if isinstance(error, errors.KafkaConnectionError):
                await diagnose(self._settings)
            if isinstance(error, errors.InvalidSessionTimeoutError):
                raise ConfigurationError(
                    f"kafka: session_timeout_ms={self._settings.session_timeout * 1000:g} is not between the broker's "
                    "group.min.session.timeout.ms and group.max.session.timeout.ms (6000 and 1800000, unless set)"
                ) from error
            raise unavailable(error, f"cannot join group {self._group!r}") from error
        except BaseException:
            await self._cut()
            raise
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    # ---- reading

    async def fetch(self, limit: int, timeout: float) -> list[Delivery]:
        if self.closed:
            raise RuntimeError("this subscription is closed")
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout
        while not self._ended():
            if self._failure is not None:
                raise self._failure
            self._awake.clear()
            deliveries = self._hand_out(limit)
            if deliveries:
                return deliveries
            left = deadline - clock()
            wanted, room = self._wanted(limit)
            if wanted and room:
                if await self._read(wanted, room, max(0.0, left)):
                    continue
            elif left > 0:
                await wait(self._awake, left)
            if clock() >= deadline:
                break
        if not self._ended():
            self._require_connection()
        return []

    def _ended(self) -> bool:
        return self.closed  # in a form that a type checker does not take for constant across an await

    def _room(self, held: Held) -> int:
        """How much more of the partition may be handed out. Bounded by what is not committed, not by what is not acked: a
        crash must not redeliver more than a window, because that is what the next owner takes for suspect."""
        most = self._window - held.offsets.uncommitted
        if 2 * most < self._window:
            self._commit_now.set()
        return most

    def _wanted(self, limit: int) -> tuple[list[TopicPartition], int]:
        if self._rebalancing:
            return [], 0
        room = min(limit, self._window - sum(held.offsets.unacked for held in self._held.values()))
        wanted = [
            TopicPartition(*place)
            for place, held in self._held.items()
            if not held.records and place not in self._paused and self._room(held) > 0
        ]
        return wanted, max(0, room)

    async def _read(self, wanted: list[TopicPartition], room: int, left: float) -> bool:
        """Get records of these partitions; whether there were any. In slices, because meanwhile others may be wanted."""
        part = min(left, COMMIT)
        try:
            # aiokafka's own timeout does not count while the group rebalances.
            async with asyncio.timeout(part + COMMIT):
                found = await self._consumer.getmany(*wanted, timeout_ms=int(part * 1000), max_records=room)
        except (TimeoutError, errors.ConsumerStoppedError):
            return False
        except errors.KafkaError as error:
            raise unavailable(error) from error
        for place, records in found.items():
            held = self._held.get((place.topic, place.partition))
            if held is not None:
                held.records.extend(records)
        return bool(found)

    def _hand_out(self, limit: int) -> list[Delivery]:
        room = min(limit, self._window - sum(held.offsets.unacked for held in self._held.values()))
        deliveries: list[Delivery] = []
        if self._rebalancing or room <= 0:
            return deliveries
        places = list(self._held)
        self._first += 1
        for turn in range(len(places)):
            place = places[(self._first + turn) % len(places)]
            held = self._held[place]
            if held.records and place not in self._paused:
                count = min(room - len(deliveries), self._room(held), len(held.records))
                self._hand_out_of(place, held, count, deliveries)
        return deliveries

    def _hand_out_of(self, place: _Place, held: Held, count: int, deliveries: list[Delivery]) -> None:
        topic, partition = place
        last, when = -1, None
        for _ in range(count):
            record = held.records.popleft()
            offset = record.offset
            if offset < held.offsets.end or held.offsets.end == 0:
                # The first one; or the topic was made anew, or cut off, and its offsets began again.
                held = self._begin(place, held, offset)
            if record.timestamp != last:  # mostly the same for a whole batch
                last, when = record.timestamp, datetime.fromtimestamp(record.timestamp / 1000, UTC)
            headers = record.headers
            if any(value is None for _, value in headers):  # a foreign producer's
                headers = [(name, value or b"") for name, value in headers]
            deliveries.append(
                Delivery(
                    topic=topic,
                    payload=record.value,
                    key=record.key,
                    headers=headers,
                    partition=partition,
                    offset=offset,
                    timestamp=when,
                    suspect=held.offsets.hand_out(offset) < self._window,
                    token=held,
                )
            )

    def _begin(self, place: _Place, held: Held, offset: int) -> Held:
        if held.offsets.end:
            logger.warning("group %s: the offsets of %s began again at %d", self._group, place, offset)
            records, held = held.records, Held()
            held.records = records
            self._held[place] = held
        held.offsets = Offsets(offset)
        return held

    def _require_connection(self) -> None:
        """aiokafka goes on trying in silence; whoever watches the consumer wants to know."""
        coordination = self._consumer._coordinator._coordination_task
        if coordination.done():
            raise Unavailable(f"kafka: group {self._group!r} was lost for good; subscribe again")
        if not any(conn.connected() for conn in self._consumer._client._conns.values()):
            raise Unavailable(f"kafka: no connection to any of {', '.join(self._settings.servers)}")

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        done: dict[Held, list[int]] = {}
        for delivery in deliveries:
            held = delivery.token
            if isinstance(held, Held) and delivery.offset is not None:
                done.setdefault(held, []).append(delivery.offset)
        for held, offsets in done.items():
            held.offsets.ack(offsets)
        self._awake.set()

    async def retry(self, delivery: Delivery, after: float) -> None:
        raise NotImplementedError("Kafka cannot deliver later: capabilities.delayed is False")

    async def reject(self, delivery: Delivery) -> None:
        raise NotImplementedError("Kafka has no dead letters of its own")

    def pause(self, topics_partitions: frozenset[_Place]) -> None:
        self._paused |= topics_partitions
        if not self._rebalancing:
            self._consumer.pause(*self._assigned(topics_partitions))

    def resume(self, topics_partitions: frozenset[_Place]) -> None:
        self._paused -= topics_partitions
        if not self._rebalancing:
            self._consumer.resume(*self._assigned(topics_partitions))
        self._awake.set()

    def _assigned(self, places: Iterable[_Place]) -> list[TopicPartition]:
        return [TopicPartition(*place) for place in places if place in self._held]

    # ---- offsets

    async def _keep(self) -> None:
        while not self.closed:
            await wait(self._commit_now, COMMIT)
            self._commit_now.clear()
            await self._commit()

    async def _commit(self) -> bool:
        """Commit how far all is done. What cannot be committed is so at the next time, or comes again. Returns whether the
        broker answered, as far as it was asked."""
        async with self._committing:
            progress = {
                place: (held, held.offsets.progress) for place, held in self._held.items() if held.offsets.dirty
            }
            if not progress:
                return True
            try:
                async with asyncio.timeout(CLOSE):
                    await self._consumer.commit(
                        {TopicPartition(*place): p.position for place, (_, p) in progress.items()}
                    )
            except (errors.CommitFailedError, errors.IllegalStateError) as error:
                # The group went on without us: the partitions are others' now, who get the messages again.
                logger.warning("group %s: offsets are not committed, the group has rebalanced: %s", self._group, error)
            except (errors.KafkaError, TimeoutError) as error:
                logger.warning("group %s: cannot commit now: %s", self._group, str(error) or type(error).__name__)
                return False
            else:
                for held, reached in progress.values():
                    held.offsets.committed = reached
                self._awake.set()
            return True

    # ---- called by aiokafka while the group rebalances

    async def give_up(self, revoked: Iterable[TopicPartition]) -> None:
        self._rebalancing = True
        places = frozenset((place.topic, place.partition) for place in revoked) & self._held.keys()
        if self._member is not None and places and not self._consumer._coordinator.member_id:
            self._lost_at.append(time.monotonic())
        # As a task, so that `close` can end it.
        self._letting_go = asyncio.get_running_loop().create_task(ask_to_let_go(self._revoked, places, self._group))
        await asyncio.wait({self._letting_go})
        await self._commit()
        self._held.clear()
        times, seconds = TAKEN_AWAY
        if len(self._lost_at) == times and self._lost_at[-1] - self._lost_at[0] < seconds:
            self._failure = ConfigurationError(
                f"another process keeps joining group {self._group!r} as member {self._member!r}; "
                "each process needs a member name of its own"
            )
            self._awake.set()
            await asyncio.Event().wait()  # until `close`: to join again would take the place from the other once more

    def take(self, assigned: Iterable[TopicPartition]) -> None:
        self._held = {(place.topic, place.partition): Held() for place in assigned}
        self._paused &= self._held.keys()
        self._rebalancing = False
        if self._paused:
            self._consumer.pause(*self._assigned(self._paused))
        self._awake.set()

    # ---- the end

    async def close(self) -> None:
        if self.closed:
            return
        await self._stop_keeping()
        if self._failure is None and await self._commit():
            stopping = asyncio.get_running_loop().create_task(self._consumer.stop())
            # It waits for a rebalance to end, and for brokers that do not answer.
            await asyncio.wait({stopping}, timeout=CLOSE)
            await ended(cancel([stopping]))
        await self._cut()

    async def abandon(self) -> None:
        """End as a killed process would: nothing is committed, the group is not left."""
        if not self.closed:
            await self._stop_keeping()
            await self._cut()

    async def _stop_keeping(self) -> None:
        self.closed = True
        self._awake.set()
        await ended(cancel([self._keeper, self._letting_go]))

    async def _cut(self) -> None:
        consumer = self._consumer
        consumer._closed = True
        coordinator, fetcher, client = consumer._coordinator, consumer._fetcher, consumer._client
        tasks: list[asyncio.Task[Any] | None] = [client._sync_task]
        if coordinator is not None:
            tasks += [coordinator._coordination_task, coordinator._heartbeat_task, coordinator._commit_refresh_task]
        if fetcher is not None:
            tasks += [fetcher._fetch_task, *fetcher._pending_tasks]
            fetcher._closed = True
            for waiter in list(fetcher._fetch_waiters):
                fetcher._notify(waiter)
        stopped = cancel(tasks)
        hang_up(client)
        await ended(stopped)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    def __init__(self, subscription: KafkaSubscription) -> None:
        self._subscription = subscription

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        await self._subscription.give_up(revoked)

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._subscription.take(assigned)
