"""A member of a group that reads a log without a broker."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Coroutine, Sequence
from typing import Final

from outbox.errors import ConfigurationError, OutboxError, Unavailable
from outbox.transport import Delivery, Revoked
from outbox.transports._group import Group, Member, Owned, Replaced, TopicPartition
from outbox.transports._log import Log, Stored, Topic, unpack_headers
from outbox.transports._offsets import Offsets, Progress
from outbox.transports._revoking import ask_to_let_go
from outbox.transports._waiting import wait

logger = logging.getLogger("outbox.transports")

POLL: Final = (0.005, 0.05)
"""Seconds between looks for new messages: the first after one was found, doubling up to the second. A look costs some
20 µs in the log's thread; messages of the same process ring and are not waited for."""

TEND: Final = 0.2
"""Seconds between commits and beats, at the most."""

CLOSE: Final = 5.0
"""Seconds for the last commit."""


class Held:
    """One partition in one assignment; the token of its deliveries."""

    __slots__ = ("epoch", "offsets", "topic_id")

    def __init__(self, owned: Owned, topic_id: str) -> None:
        self.epoch = owned.epoch
        self.offsets = Offsets(owned.position)
        self.topic_id = topic_id


class LogSubscription:
    def __init__(
        self,
        log: Log,
        topics: Sequence[str],
        group: str,
        *,
        window: int,
        member: str | None,
        revoked: Revoked | None,
        session: float,
        create: int | None,
    ) -> None:
        if window < 1 or not topics or not group:
            raise ConfigurationError("a subscription needs topics, a group and a window of at least one message")
        self._log = log
        self._topics = sorted(set(topics))
        self._group = group
        self._window = window
        life = uuid.uuid4().hex
        self._static = member is not None
        self._name = member or life
        self._member = Member(life, frozenset(topics), session)
        self._revoked = revoked
        self._create = create
        self._held: dict[TopicPartition, Held] = {}
        self._leaving: set[TopicPartition] = set()
        """The consumer is being told to let go of these; nothing is fetched from them until it has."""
        self._release: set[TopicPartition] = set()
        """The consumer has let go of these."""
        self._paused: frozenset[TopicPartition] = frozenset()
        self._first = 0
        """Where the next read begins among the partitions, so that none is always last."""
        self._failure: OutboxError | None = None
        self._awake = asyncio.Event()
        self._tend_now = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed = False

    async def join(self) -> None:
        """Become a member; what it owns is known when this returns. Raises `Unavailable`, also for a topic that does not
        exist."""
        try:
            await self._log.run(self._log.open)
            known = await self._log.run(self._log.topics, self._topics, self._create)
            for topic in self._topics:
                if topic not in known:
                    raise Unavailable(f"topic {topic!r} does not exist; declare it first")
            await self._log.run(
                self._log.with_group, self._group, lambda group, now: group.join(self._name, self._member, now)
            )
            await self._tend()
        except BaseException:
            await self._log.close(abort=True)
            raise
        self._log.bell.listen(self._awake)
        self._spawn(self._keep())

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- reading

    async def fetch(self, limit: int, timeout: float) -> list[Delivery]:
        if self.closed:
            raise RuntimeError("this subscription is closed")
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout
        pause = POLL[0]
        while not self._ended():
            if self._failure is not None:
                raise self._failure
            self._awake.clear()
            wanted, room = self._wanted(limit)
            if wanted:
                try:
                    found = await self._log.run(self._log.read, wanted, room)
                except Unavailable:
                    if self._ended():
                        break
                    raise
                deliveries = self._hand_out(found)
                if deliveries:
                    return deliveries
            left = deadline - clock()
            if left <= 0:
                break
            await wait(self._awake, min(left, pause))
            pause = min(2 * pause, POLL[1])
        return []

    def _ended(self) -> bool:
        """`closed`, in a form that a type checker does not take for constant across an await."""
        return self.closed

    def _wanted(self, limit: int) -> tuple[list[tuple[TopicPartition, int, int]], int]:
        """What to read: (partition, offset, at most), and how much in all."""
        room = min(limit, self._window - sum(held.offsets.unacked for held in self._held.values()))
        if room <= 0:
            return [], 0
        wanted = []
        for place, held in self._held.items():
            # Bounded by what is not committed, not by what is not acked: a crash must not redeliver more than a window,
            # because that is what the next owner takes for suspect.
            most = self._window - held.offsets.uncommitted
            if 2 * most < self._window:
                self._tend_now.set()
            if most > 0 and place not in self._paused and place not in self._leaving:
                wanted.append((place, held.offsets.end, most))
        if len(wanted) > 1:
            self._first = (self._first + 1) % len(wanted)
            wanted = wanted[self._first :] + wanted[: self._first]
        return wanted, room

    def _hand_out(self, found: dict[TopicPartition, list[Stored]]) -> list[Delivery]:
        deliveries = []
        window = self._window
        for place, rows in found.items():
            held = self._held.get(place)
            # While the log was read the partition may have been lost, paused, or lost and owned again.
            if held is None or not rows or held.offsets.end > rows[0][0] or place in self._leaving:
                continue
            topic, partition = place
            topic_id, hand_out = held.topic_id, held.offsets.hand_out
            for offset, key, payload, headers, timestamp in rows:
                deliveries.append(
                    Delivery(
                        topic=topic,
                        payload=payload,
                        key=key,
                        headers=unpack_headers(headers),
                        partition=partition,
                        offset=offset,
                        topic_id=topic_id,
                        timestamp=timestamp,
                        suspect=hand_out(offset) < window,
                        token=held,
                    )
                )
        return deliveries

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
        raise NotImplementedError("this transport cannot deliver later: capabilities.delayed is False")

    async def reject(self, delivery: Delivery) -> None:
        raise NotImplementedError("this transport has no dead letters of its own")

    def pause(self, topics_partitions: frozenset[TopicPartition]) -> None:
        self._paused |= topics_partitions

    def resume(self, topics_partitions: frozenset[TopicPartition]) -> None:
        self._paused -= topics_partitions
        self._awake.set()

    # ---- membership

    async def _keep(self) -> None:
        trouble = ""
        while not self.closed:
            await wait(self._tend_now, min(TEND, self._member.session / 4))
            self._tend_now.clear()
            try:
                await self._tend()
                trouble = ""
            except Replaced:
                self._failure = ConfigurationError(
                    f"another process joined group {self._group!r} as member {self._name!r}; "
                    "each process needs a member name of its own"
                )
                self._lose(frozenset(self._held))
                self._awake.set()
                return
            except OutboxError as error:
                # What is not committed stays so, and `fetch` will say that the log cannot be used.
                if str(error) != trouble:
                    logger.warning("group %s: cannot commit or renew: %s", self._group, error)
                trouble = str(error)

    async def _tend(self) -> None:
        """Commit what is done, release what was let go of, say that we live, and see what we own."""
        progress = {place: held.offsets.progress for place, held in self._held.items()}
        done = self._to_commit(progress)
        release = frozenset(self._release)
        ids = {place: held.topic_id for place, held in self._held.items()}
        partitions, owned, give_up, refused = await self._log.run(self._tend_group, done, release, ids)
        self._release -= release
        for place in release:
            self._leaving.discard(place)
            self._held.pop(place, None)
        for place in done.keys() - refused:
            if place in self._held:
                self._held[place].offsets.committed = progress[place]
        lost = {
            place
            for place, held in self._held.items()
            if place not in owned or owned[place].epoch != held.epoch or partitions[place[0]].id != held.topic_id
        } - release
        if lost:
            logger.warning("group %s: partitions went to another member meanwhile: %s", self._group, sorted(lost))
            self._lose(frozenset(lost))
        for place, state in owned.items():
            if place not in self._held and place not in self._leaving:
                self._held[place] = Held(state, partitions[place[0]].id)
        self._paused &= owned.keys()
        self._give_up(give_up - self._leaving)
        self._awake.set()

    def _to_commit(self, progress: dict[TopicPartition, Progress]) -> dict[TopicPartition, Owned]:
        return {
            place: Owned(held.epoch, progress[place].position)
            for place, held in self._held.items()
            if progress[place] != held.offsets.committed
        }

    def _tend_group(
        self, done: dict[TopicPartition, Owned], release: frozenset[TopicPartition], ids: dict[TopicPartition, str]
    ) -> tuple[dict[str, Topic], dict[TopicPartition, Owned], frozenset[TopicPartition], frozenset[TopicPartition]]:
        """In the log's thread. ``ids``: of the topics as they were, since a position in a former one says nothing about
        one that was made anew."""
        topics = self._log.topics(self._topics, self._create)
        former = {place for place in done if place[0] not in topics or topics[place[0]].id != ids[place]}
        done = {place: state for place, state in done.items() if place not in former}
        counts = {name: topic.partitions for name, topic in topics.items()}

        def change(
            group: Group, now: float
        ) -> tuple[dict[TopicPartition, Owned], frozenset[TopicPartition], frozenset[TopicPartition]]:
            refused = group.commit(self._name, self._member.life, done, release)
            return *group.beat(self._name, self._member, now, counts), refused

        owned, give_up, refused = self._log.with_group(self._group, change)
        return topics, owned, give_up, refused | former

    def _give_up(self, places: frozenset[TopicPartition]) -> None:
        if places:
            self._leaving |= places
            self._spawn(self._let_go(places, lost=False))

    def _lose(self, places: frozenset[TopicPartition]) -> None:
        for place in places:
            self._held.pop(place, None)
        places -= self._leaving  # of those the consumer is being told already
        if places:
            self._leaving |= places
            self._spawn(self._let_go(places, lost=True))

    async def _let_go(self, places: frozenset[TopicPartition], *, lost: bool) -> None:
        await ask_to_let_go(self._revoked, places, self._group)
        if lost:
            self._leaving -= places
        else:
            self._release |= places
        self._tend_now.set()

    # ---- the end

    async def close(self) -> None:
        await self._close(abort=False)

    async def abandon(self) -> None:
        """End as a killed process would: nothing is committed, the group is not left."""
        await self._close(abort=True)

    async def _close(self, *, abort: bool) -> None:
        if self.closed:
            return
        self.closed = True
        self._awake.set()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._log.bell.forget(self._awake)
        if not abort and self._failure is None:
            done = self._to_commit({place: held.offsets.progress for place, held in self._held.items()})

            def leave(group: Group, now: float) -> None:
                group.commit(self._name, self._member.life, done)
                if not self._static:
                    group.leave(self._name, self._member.life)

            try:
                async with asyncio.timeout(CLOSE):
                    await self._log.run(self._log.with_group, self._group, leave)
            except (OutboxError, TimeoutError) as error:
                logger.warning("group %s: the last commit failed: %s", self._group, str(error) or "timed out")
        await self._log.close(abort=True)
