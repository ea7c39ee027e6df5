"""What a consumer's database remembers of messages that fail, are replayed, or are given up. Every function here works in
the transaction of the connection it is given."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from outbox import encoding
from outbox.consumer.incoming import Incoming
from outbox.dead_letters import record as dead_letter
from outbox.dead_letters.record import Failure
from outbox.dialects import UtcDateTime, clock, insert_if_absent, was_absent
from outbox.tables import Tables

WAITING: Final = "waiting"
REPLAY: Final = "replay"

ERROR_LENGTH: Final = 500  # characters of an error that the attempt row shows


class Waiting(NamedTuple):
    """What is known of a message from before: attempts that failed, and seconds until the next one is due."""

    attempts: int
    seconds: float


class Attempts:
    """The ``attempt``, ``inbox`` and ``dead_letter`` rows of one consumer."""

    def __init__(self, tables: Tables, consumer: str) -> None:
        self.tables = tables
        self.consumer = consumer

    # ------------------------------------------------------------ messages that fail

    def known(self, connection: sa.Connection, ids: Collection[uuid.UUID]) -> dict[uuid.UUID, Waiting]:
        """What is known of these messages; those that never failed are not in it. By the primary key."""
        attempt = self.tables.attempt
        rows = connection.execute(
            sa.select(
                attempt.c.message_id,
                attempt.c.attempts,
                attempt.c.next_attempt_at,
                sa.type_coerce(clock(), UtcDateTime()).label("now"),
            ).where(attempt.c.consumer == self.consumer, attempt.c.message_id.in_(ids), attempt.c.state == WAITING)
        )
        return {
            row.message_id: Waiting(
                row.attempts,
                0.0 if row.next_attempt_at is None else max(0.0, (row.next_attempt_at - row.now).total_seconds()),
            )
            for row in rows
        }

    def failed(
        self,
        connection: sa.Connection,
        incoming: Incoming,
        failure: Failure,
        budget: int,
        delay: Callable[[int], float],
    ) -> tuple[int, bool]:
        """An attempt failed: count it or, if it was the last of ``budget``, make the message a dead letter, in this one
        transaction. Returns how many have failed, and whether it is given up.

        Counted in the table, so that neither the handler's rollback nor a killed process forgets it.
        """
        attempt = self.tables.attempt
        mine = self._mine(incoming)
        counted = sa.select(attempt.c.attempts).where(mine)
        before = connection.execute(counted).scalar_one_or_none()
        if before is not None:  # to lock a row that is not there would keep others from theirs (MySQL)
            before = connection.execute(counted.with_for_update()).scalar_one_or_none()
        attempts = (before or 0) + 1
        if attempts >= budget:
            self.dead(connection, incoming, failure, tried=1)
            return attempts, True
        values = {
            "attempts": attempts,
            "next_attempt_at": clock(delay(attempts)),
            "last_failed_at": clock(),
            "last_error": _summary(failure),
        }
        if before is not None:
            values["first_failed_at"] = sa.func.coalesce(attempt.c.first_failed_at, clock())
            connection.execute(sa.update(attempt).where(mine).values(values))
        elif not incoming.replay:  # a replay whose row is gone was finished by another process
            message, delivery = incoming.message, incoming.delivery
            connection.execute(
                insert_if_absent(attempt, connection.dialect.name).values(
                    consumer=self.consumer,
                    message_id=message.id,
                    cycle=incoming.cycle,
                    topic=message.topic,
                    partition=delivery.partition if delivery else None,
                    offset=delivery.offset if delivery else None,
                    key=message.key,
                    sequence=delivery.offset if delivery else None,
                    type=message.type,
                    state=WAITING,
                    first_failed_at=clock(),
                    **values,
                )
            )
        return attempts, False

    def handled_now(self, connection: sa.Connection, incoming: Incoming) -> None:
        """Of a replay, whose inbox row is as old as its first life: it happened now, and is remembered from now on."""
        inbox = self.tables.inbox
        mine = sa.and_(inbox.c.consumer == self.consumer, inbox.c.message_id == incoming.message.id)
        connection.execute(sa.update(inbox).where(mine).values(processed_at=clock()))

    def forget(self, connection: sa.Connection, incoming: Incoming) -> None:
        """Delete the attempt row, if there is one: the message is done, or a dead letter."""
        connection.execute(sa.delete(self.tables.attempt).where(self._mine(incoming)))

    def dead(self, connection: sa.Connection, incoming: Incoming, failure: Failure, *, tried: int) -> bool:
        """Give a message up: inbox outcome ``dead``, the dead letter, and the end of its attempt row. False: it is done,
        or was given up before; then only the attempt row goes.

        The inbox row decides, so a message that is redelivered after a crash between this and its acknowledgement does
        not become a second dead letter. ``tried``: attempts that are not in the attempt row yet.
        """
        attempt = self.tables.attempt
        story = connection.execute(
            sa.select(attempt.c.attempts, attempt.c.first_failed_at, attempt.c.partition, attempt.c.offset).where(
                self._mine(incoming)
            )
        ).one_or_none()
        mine = self._take_inbox_row(connection, incoming)
        if mine:
            message = incoming.message
            # of a replay: where the message first came from
            origin: Any = incoming.delivery or story
            row = dead_letter.record(
                failure,
                consumer=self.consumer,
                message_id=message.id,
                cycle=incoming.cycle,
                topic=message.topic,
                key=message.key,
                raw_key=incoming.raw_key,
                type=message.type,
                payload=message.payload,
                content_type=message.content_type,
                headers=encoding.dump_headers(message.headers) if message.headers else None,
                attempts=tried + (story.attempts if story else 0),
                partition=origin.partition if origin else None,
                offset=origin.offset if origin else None,
                created_at=message.created_at,
                first_failed_at=(story.first_failed_at if story else None) or dead_letter.now(connection),
            )
            mine = dead_letter.write(connection, self.tables, row)
        self.forget(connection, incoming)
        return mine

    def _take_inbox_row(self, connection: sa.Connection, incoming: Incoming) -> bool:
        inbox = self.tables.inbox
        id = incoming.message.id
        if incoming.replay:
            # it stays as it is: dead, of this cycle; locked, so that the claim of another process waits
            outcome = connection.execute(
                sa.select(inbox.c.outcome)
                .where(
                    inbox.c.consumer == self.consumer,
                    inbox.c.message_id == id,
                    inbox.c.outcome == "dead",
                    inbox.c.cycle == incoming.cycle,
                )
                .with_for_update()
            ).scalar_one_or_none()
            return outcome is not None
        result = connection.execute(
            insert_if_absent(inbox, connection.dialect.name),
            {"consumer": self.consumer, "message_id": id, "outcome": "dead", "cycle": incoming.cycle},
        )
        return was_absent(result, connection.dialect.name)

    def _mine(self, incoming: Incoming) -> sa.ColumnElement[bool]:
        """The attempt row of this message, in this role: a message that is delivered again by the broker never touches the
        row of its replay, nor the other way round."""
        attempt = self.tables.attempt
        same = sa.and_(attempt.c.consumer == self.consumer, attempt.c.message_id == incoming.message.id)
        if incoming.replay:
            return sa.and_(same, attempt.c.state == REPLAY, attempt.c.cycle == incoming.cycle)
        return sa.and_(same, attempt.c.state != REPLAY)

    # ------------------------------------------------------------ replays

    def take_replays(
        self, connection: sa.Connection, limit: int, lease: float, *, keep_order: bool
    ) -> list[sa.RowMapping]:
        """Up to ``limit`` replays (rows) that are due and the oldest of their key. They are this process's for ``lease``
        seconds: until then no other one sees them, and after a crash the next one takes them.

        By the index (consumer, state, next attempt); the rows before one of its key by (consumer, key, sequence).
        """
        attempt = self.tables.attempt
        due = sa.and_(
            attempt.c.consumer == self.consumer, attempt.c.state == REPLAY, attempt.c.next_attempt_at <= clock()
        )
        query = sa.select(attempt).where(due).order_by(attempt.c.sequence, attempt.c.message_id).limit(limit)
        if keep_order:
            earlier = attempt.alias("earlier")
            query = query.where(
                ~sa.exists().where(
                    earlier.c.consumer == attempt.c.consumer,
                    earlier.c.state == REPLAY,
                    earlier.c.topic == attempt.c.topic,
                    earlier.c.key == attempt.c.key,  # not true of NULLs: without a key there is no order
                    sa.or_(
                        earlier.c.sequence < attempt.c.sequence,
                        sa.and_(earlier.c.sequence == attempt.c.sequence, earlier.c.message_id < attempt.c.message_id),
                    ),
                )
            )
        taken: list[sa.RowMapping] = []
        for row in connection.execute(query).all():
            # asked again in the update: of two processes that saw the row, one takes it
            mine = connection.execute(
                sa.update(attempt)
                .where(due, attempt.c.message_id == row.message_id, attempt.c.cycle == row.cycle)
                .values(next_attempt_at=clock(lease))
            )
            if mine.rowcount == 1:
                taken.append(row._mapping)
        return taken

    def keep_replays(self, connection: sa.Connection, ids: Collection[uuid.UUID], lease: float) -> None:
        """Hold replays that are still being handled for another ``lease`` seconds."""
        attempt = self.tables.attempt
        connection.execute(
            sa.update(attempt)
            .where(attempt.c.consumer == self.consumer, attempt.c.message_id.in_(ids), attempt.c.state == REPLAY)
            .values(next_attempt_at=clock(lease))
        )

    def release_replays(self, connection: sa.Connection, ids: Collection[uuid.UUID]) -> None:
        """Give replays back that were taken and not begun."""
        self.keep_replays(connection, ids, 0.0)


def _summary(failure: Failure) -> str:
    """One line that says what went wrong, for `outbox status`."""
    text = (failure.exception_message or "").strip().splitlines()
    return f"{failure.exception_type}: {text[0] if text else ''}"[:ERROR_LENGTH]
