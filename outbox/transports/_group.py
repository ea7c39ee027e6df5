"""Consumer groups for the logs that have no broker: who reads which partition. Pure: no clock, no storage, no waiting.

A log keeps a `Group` in memory or in rows, and lets every member call these methods on it, one at a time. A member that
does not `beat` within its session is forgotten, and its partitions go to the others; what it commits later is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

TopicPartition: TypeAlias = tuple[str, int]


@dataclass(slots=True)
class Member:
    life: str
    """Unique to one start of the member, so that a static member's former life cannot commit any more."""
    topics: frozenset[str]
    session: float
    """Seconds without a beat after which it counts as dead."""
    expires: float = 0.0
    """Seconds, by a clock that all members share."""

    def dead(self, now: float) -> bool:
        # A clock that was set back (or another machine's) would otherwise keep a dead member for as long.
        return now >= self.expires or self.expires > now + 2 * self.session


@dataclass(slots=True)
class Share:
    """One partition in one group."""

    owner: str | None = None
    """The member's name."""
    epoch: int = 0
    """Grows with each new owner: a member that lost a partition and has it again must notice."""
    position: int = 0
    """The offset of the first message that is not known to be done."""


@dataclass(frozen=True, slots=True)
class Owned:
    """What a member has of a partition."""

    epoch: int
    position: int


class Replaced(Exception):
    """The member joined again elsewhere under this name."""


@dataclass(slots=True)
class Group:
    members: dict[str, Member] = field(default_factory=dict)
    shares: dict[TopicPartition, Share] = field(default_factory=dict)

    def join(self, name: str, member: Member, now: float) -> None:
        """Be a member from now on. Under the name of a member that is there (a static one that was killed): be that one,
        and have its partitions at once. They count as newly owned."""
        member.expires = now + member.session
        self.members[name] = member
        for share in self.shares.values():
            if share.owner == name:
                share.epoch += 1

    def beat(
        self, name: str, member: Member, now: float, partitions: Mapping[str, int]
    ) -> tuple[dict[TopicPartition, Owned], frozenset[TopicPartition]]:
        """Stay a member. ``partitions``: how many each topic has.

        Returns what the member owns now, and which of that it should give up, by `commit`, so that all have even shares.
        A member that had been forgotten is one again. Raises `Replaced`.
        """
        known = self.members.setdefault(name, member)
        if known.life != member.life:
            raise Replaced
        if known.expires - now < known.session * 2 / 3 or known.dead(now):
            known.expires = now + known.session  # not each time: it is a write
        for other in [other for other, found in self.members.items() if found.dead(now)]:
            del self.members[other]
        for topic, count in partitions.items():
            for partition in range(count):
                self.shares.setdefault((topic, partition), Share())
        for share in self.shares.values():
            if share.owner not in self.members:
                share.owner = None
        wanted = even_shares(
            {other: found.topics for other, found in self.members.items()},
            {place: share.owner for place, share in self.shares.items()},
        )
        owned, give_up = {}, set()
        for place, share in self.shares.items():
            if share.owner is None and wanted.get(place) == name:
                share.owner = name
                share.epoch += 1
            if share.owner == name:
                owned[place] = Owned(share.epoch, share.position)
                if wanted.get(place) != name:
                    give_up.add(place)
        return owned, frozenset(give_up)

    def commit(
        self, name: str, life: str, done: Mapping[TopicPartition, Owned], release: Iterable[TopicPartition] = ()
    ) -> frozenset[TopicPartition]:
        """Store positions of partitions that the member owns, then give ``release`` up. Returns those that were not
        stored, because it does not own them any more."""
        member = self.members.get(name)
        if member is None or member.life != life:
            return frozenset(done)
        refused = set()
        for place, state in done.items():
            share = self.shares.get(place)
            if share is None or share.owner != name or share.epoch != state.epoch:
                refused.add(place)
            else:
                share.position = state.position
        for place in release:
            share = self.shares.get(place)
            if share is not None and share.owner == name:
                share.owner = None
        return frozenset(refused)

    def leave(self, name: str, life: str) -> None:
        """Be no member any more; the partitions are free at once."""
        member = self.members.get(name)
        if member is not None and member.life == life:
            del self.members[name]
            for share in self.shares.values():
                if share.owner == name:
                    share.owner = None


def even_shares(
    members: Mapping[str, frozenset[str]], owners: Mapping[TopicPartition, str | None]
) -> dict[TopicPartition, str]:
    """Who should own which partition: counts that differ by one at most (as far as the members' topics allow), with as
    few changes as that takes. The same for whoever computes it."""
    owned: dict[str, list[TopicPartition]] = {name: [] for name in sorted(members)}
    free = []
    for place in sorted(owners):
        owner = owners[place]
        if owner is not None and place[0] in members.get(owner, ()):
            owned[owner].append(place)
        else:
            free.append(place)

    def poorest(place: TopicPartition) -> str | None:
        takers = [name for name in owned if place[0] in members[name]]
        return min(takers, key=lambda name: len(owned[name]), default=None)

    for place in free:
        taker = poorest(place)
        if taker is not None:
            owned[taker].append(place)
    while _move_one(owned, poorest):
        pass
    return {place: name for name, places in owned.items() for place in places}


def _move_one(owned: dict[str, list[TopicPartition]], poorest: Callable[[TopicPartition], str | None]) -> bool:
    for rich in sorted(owned, key=lambda name: -len(owned[name])):
        for place in reversed(owned[rich]):
            taker = poorest(place)
            if taker is not None and len(owned[taker]) + 1 < len(owned[rich]):
                owned[rich].remove(place)
                owned[taker].append(place)
                return True
    return False
