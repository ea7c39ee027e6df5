"""`DeadLetters`: see, replay and discard, for code, for the CLI and for dashboards."""

from __future__ import annotations

import getpass
import os
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import sqlalchemy as sa

from outbox._message import message_id as named_message
from outbox._outbox import Outbox
from outbox.dead_letters import letter as letters
from outbox.dead_letters import plan as planning
from outbox.dead_letters import replay as replaying
from outbox.dead_letters.letter import DeadLetter, Filter, Group
from outbox.dead_letters.plan import Plan
from outbox.dead_letters.record import State, now
from outbox.errors import ConfigurationError
from outbox.observe.schema import check_schema
from outbox.stores._run import unavailable
from outbox.stores.engine import is_engine, sync_engine_for, transaction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Replayed:
    """What `DeadLetters.replay` did. ``skipped``: ids that stay open because their headers are unreadable."""

    count: int
    skipped: tuple[uuid.UUID, ...] = ()


class DeadLetters:
    """The dead letters of one outbox's database, the relay's and those of all consumers.

    ``database``: URL or `Engine`; None takes it from ``OUTBOX_DATABASE``. Sync: async code calls it in a thread
    (``await asyncio.to_thread(dead_letters.groups)``). An engine made here is disposed of by `close`, or at the end of
    ``with DeadLetters(…) as dead_letters``.

    Every method raises `StoreUnavailable` when the database cannot be asked, and `SchemaMismatch` when its tables are
    missing or of another version.
    """

    def __init__(self, outbox: Outbox, *, database: str | sa.URL | sa.Engine | AsyncEngine | None = None) -> None:
        self.outbox = outbox
        self._database = database
        self._engine: sa.Engine | None = None
        self._checked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections. Usable again afterwards."""
        engine, self._engine, self._checked = self._engine, None, False
        if engine is not None and not is_engine(self._database):
            engine.dispose()

    # ------------------------------------------------------------ see

    def groups(self, *, consumer: str | None = None, topic: str | None = None) -> list[Group]:
        """The open dead letters by cause, the largest group first."""
        wanted = Filter(consumer=consumer, topic=topic)
        return self._run(lambda connection: letters.groups(connection, self.outbox.tables, wanted))

    def find(
        self,
        *,
        group: str | None = None,
        consumer: str | None = None,
        topic: str | None = None,
        type: str | None = None,
        key: str | None = None,
        message_id: uuid.UUID | str | None = None,
        state: State | Literal["any"] = "open",
        limit: int = 100,
    ) -> list[DeadLetter]:
        """Up to ``limit`` dead letters (rows) that meet all conditions, oldest first. ``consumer=""`` is the relay."""
        wanted = Filter(
            message_id=None if message_id is None else named_message(message_id),
            group=group,
            consumer=consumer,
            topic=topic,
            type=type,
            key=key,
            state=state,
        )
        return self._run(lambda connection: letters.find(connection, self.outbox.tables, wanted, limit))

    def count(
        self,
        *,
        group: str | None = None,
        consumer: str | None = None,
        topic: str | None = None,
        type: str | None = None,
        key: str | None = None,
        state: State | Literal["any"] = "open",
    ) -> int:
        """How many dead letters meet all conditions."""
        wanted = Filter(group=group, consumer=consumer, topic=topic, type=type, key=key, state=state)
        return self._run(lambda connection: letters.count(connection, self.outbox.tables, wanted))

    def get(self, id: uuid.UUID | str) -> DeadLetter | None:
        """One dead letter, whatever its state; None if there is none of that id."""
        wanted = Filter(id=_id(id), state="any")
        found = self._run(lambda connection: letters.find(connection, self.outbox.tables, wanted, 1))
        return found[0] if found else None

    def named(self, id: uuid.UUID | str) -> list[DeadLetter]:
        """Those that an id from a log can mean, whatever their state: the dead letter of that id, or all of the message of
        that id (one a consumer and cycle; any text, as a foreign producer's id may be), those that died first first."""
        same = named_message(id)

        def look(connection: sa.Connection) -> list[DeadLetter]:
            own = letters.find(connection, self.outbox.tables, Filter(id=same, state="any"), 1)
            of_message = Filter(message_id=same, state="any")
            return own or letters.find(connection, self.outbox.tables, of_message, 1000)

        return self._run(look)

    def fingerprints(self, prefix: str = "", *, state: State | Literal["any"] = "open") -> dict[str, int]:
        """The groups whose fingerprint begins like this, with how many dead letters of that state they have."""
        wanted = Filter(state=state)
        return self._run(lambda connection: letters.fingerprints(connection, self.outbox.tables, prefix, wanted))

    # ------------------------------------------------------------ mend

    def plan(
        self,
        id: uuid.UUID | str | None = None,
        *,
        group: str | None = None,
        consumer: str | None = None,
        topic: str | None = None,
        type: str | None = None,
        key: str | None = None,
        limit: int | None = None,
    ) -> Plan:
        """What `replay` would do now, selected as it selects, and what is known of the risk: to whom the letters go, whether
        their handlers have run, which later messages of their keys have been handled. Changes nothing."""
        wanted = _wanted("plan", id, group, consumer, topic, type, key)
        return self._run(lambda connection: planning.plan(connection, self.outbox.tables, wanted, limit))

    def replay(
        self,
        id: uuid.UUID | str | None = None,
        *,
        group: str | None = None,
        consumer: str | None = None,
        topic: str | None = None,
        type: str | None = None,
        key: str | None = None,
        limit: int | None = None,
        who: str | None = None,
        why: str | None = None,
    ) -> Replayed:
        """Give open dead letters back: one by its id, or all that meet the conditions, at most ``limit`` (rows).

        A consumer's is handed to that consumer alone, through its ``attempt`` table, and handled while it runs; the
        relay's goes back into the outbox under the same id, with the header ``outbox-cycle``. Within a key the oldest
        comes first. What fails again becomes a new dead letter of the next cycle.

        Transactions of at most 500 rows, each with its line in the audit (``who``: by default this user and host).
        After a crash the finished ones are replayed, the others still open; calling it again does the rest. Raises
        `ConfigurationError` where nothing says which ones.
        """
        wanted = _wanted("replay", id, group, consumer, topic, type, key)
        by = replaying.Who(who or _somebody(), why)
        # what dies again while this goes on is not taken again
        until = self._run(now)
        count = 0
        skipped: list[uuid.UUID] = []
        while limit is None or count < limit:
            size = replaying.AT_ONCE if limit is None else min(replaying.AT_ONCE, limit - count)
            work = partial(
                replaying.replay,
                tables=self.outbox.tables,
                wanted=wanted,
                who=by,
                until=until,
                limit=size,
                without=skipped,
            )
            batch = self._run(work)
            count += batch.count
            skipped += batch.skipped
            if not batch.more:
                break
        return Replayed(count, tuple(skipped))

    def discard(
        self,
        id: uuid.UUID | str | None = None,
        *,
        group: str | None = None,
        consumer: str | None = None,
        topic: str | None = None,
        type: str | None = None,
        key: str | None = None,
        who: str | None = None,
        why: str | None = None,
    ) -> int:
        """Close open dead letters for good, without handling them; they can still be seen. Selected, audited and bounded
        as `replay` is. Returns how many."""
        wanted = _wanted("discard", id, group, consumer, topic, type, key)
        by = replaying.Who(who or _somebody(), why)
        until = self._run(now)
        count, more = 0, True
        while more:
            batch = self._run(lambda c: replaying.discard(c, self.outbox.tables, wanted, by, until=until))
            count += batch.count
            more = batch.more
        return count

    # ------------------------------------------------------------ the database

    def _run(self, work: Callable[[sa.Connection], T]) -> T:
        if self._engine is None:
            self._engine = sync_engine_for(self._database)
        try:
            with transaction(self._engine) as connection:
                if not self._checked:
                    check_schema(connection, self.outbox.tables)
                result = work(connection)
        except (sa.exc.IntegrityError, sa.exc.DataError):
            raise  # not the database's fault, but the statement's
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            raise unavailable(self._engine, error) from error
        self._checked = True
        return result


def _wanted(
    verb: str,
    id: uuid.UUID | str | None,
    group: str | None,
    consumer: str | None,
    topic: str | None,
    type: str | None,
    key: str | None,
) -> Filter:
    wanted = Filter(id=None if id is None else _id(id), group=group, consumer=consumer, topic=topic, type=type, key=key)
    if not wanted.narrow:
        raise ConfigurationError(
            f"{verb}: say which dead letters: an id, or group=…, consumer=…, topic=…, type=…, key=…"
        )
    return wanted


def _id(value: uuid.UUID | str) -> uuid.UUID:
    if isinstance(value, uuid.UUID):
        return value
    try:
        return uuid.UUID(value)
    except (ValueError, AttributeError, TypeError):
        raise ConfigurationError(f"dead letter {value!r}: its id is a UUID, as `find` shows it") from None


def _somebody() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user that no file knows
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
