"""What consumers have before them, as far as this database knows: those whose inbox is here.

A consumer that runs leaves no heartbeat. What is due and has been for a while is all that tells of one that does not.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from outbox.observe.words import duration, some, word
from outbox.tables import Tables

LATE: Final = 60.0  # seconds past due after which a retry asks whether its consumer runs: a handler may take a while
REPLAY_LATE: Final = 10.0  # a replay is looked for twice a second
NAMED: Final = 3  # consumers in the sentence


@dataclass(frozen=True, slots=True)
class ConsumerStatus:
    """One consumer. Counts are messages, times are seconds from now, negative where they are past.

    ``waiting``: failed, and tried again at ``next_attempt_in`` (the earliest); ``attempts``: the most that any of them has
    behind it. ``blocked_keys``: keys with such a message: where the consumer keeps order, what follows waits in the broker.
    ``replays``: dead letters that were handed back and are not handled yet, the earliest since or in ``replay_in``.
    """

    consumer: str
    waiting: int = 0
    next_attempt_in: float | None = None
    attempts: int | None = None
    blocked_keys: int = 0
    replays: int = 0
    replay_in: float | None = None
    dead_letters: int = 0
    last_error: str | None = None


def consumers(connection: sa.Connection, tables: Tables, now: dt.datetime) -> list[ConsumerStatus]:
    """All consumers that left anything here, by name."""
    found: dict[str, dict[str, Any]] = {name: {} for name in _in_inbox(connection, tables)}
    attempt, letter = tables.attempt, tables.dead_letter
    by_state = sa.select(
        attempt.c.consumer,
        attempt.c.state,
        sa.func.count(),
        sa.func.min(attempt.c.next_attempt_at),
        sa.func.max(attempt.c.attempts),
    ).group_by(attempt.c.consumer, attempt.c.state)
    for consumer, state, number, due, most in connection.execute(by_state).all():
        mine = found.setdefault(consumer, {})
        seconds = 0.0 if due is None else (due - now).total_seconds()
        if state == "replay":
            mine |= {"replays": number, "replay_in": seconds}
        else:
            mine |= {"waiting": number, "next_attempt_in": seconds}
        mine["attempts"] = max(most, mine.get("attempts", 0))
        mine["last_error"] = _last_error(connection, tables, consumer)
    failing = sa.select(attempt.c.consumer, attempt.c.topic, attempt.c.key).where(
        attempt.c.state != "replay", attempt.c.key.is_not(None)
    )
    keys = failing.distinct().subquery()
    for consumer, number in connection.execute(
        sa.select(keys.c.consumer, sa.func.count()).group_by(keys.c.consumer)
    ).all():
        found[consumer]["blocked_keys"] = number
    dead = (
        sa.select(letter.c.consumer, sa.func.count())
        .where(letter.c.state == "open", letter.c.consumer != "")
        .group_by(letter.c.consumer)
    )
    for consumer, number in connection.execute(dead).all():
        found.setdefault(consumer, {})["dead_letters"] = number
    return [ConsumerStatus(name, **values) for name, values in sorted(found.items())]


def _in_inbox(connection: sa.Connection, tables: Tables) -> list[str]:
    """From one name to the next by the primary key: a DISTINCT would read the whole inbox."""
    names: list[str] = []
    column = tables.inbox.c.consumer
    query = sa.select(sa.func.min(column))
    while (name := connection.scalar(query.where(column > names[-1]) if names else query)) is not None:
        names.append(name)
    return names


def _last_error(connection: sa.Connection, tables: Tables, consumer: str) -> str | None:
    """That of the message whose turn is next, one line."""
    attempt = tables.attempt
    query = (
        sa.select(attempt.c.last_error)
        .where(attempt.c.consumer == consumer, attempt.c.last_error.is_not(None))
        .order_by(attempt.c.next_attempt_at)
        .limit(1)
    )
    error = connection.scalar(query)
    return None if error is None else error.partition("\n")[0].strip().rstrip(":")


def sentences(found: list[ConsumerStatus]) -> list[str]:
    """What there is to say of consumers, those with most before them first: clauses without a full stop."""
    said = []
    for one in sorted(found, key=lambda c: (-c.waiting, -c.replays, c.consumer)):
        said += [text for text in (_waiting(one), _replays(one)) if text]
    return said if len(said) <= NAMED else [*said[:NAMED], "and other consumers wait too"]


def _waiting(one: ConsumerStatus) -> str:
    if not one.waiting or one.next_attempt_in is None:
        return ""
    messages = some(one.waiting, "message")
    if one.next_attempt_in < -LATE:
        since = duration(-one.next_attempt_in)
        return f"consumer {one.consumer} has {messages} to try again, due for {since}: is it running?"
    when = f"in {duration(one.next_attempt_in)}" if one.next_attempt_in > 0 else "now"
    which = "the next " if one.waiting > 1 else ""
    error = f" ({one.last_error})" if one.last_error else ""
    up_to = "up to " if one.waiting > 1 else ""
    return (
        f"consumer {one.consumer} tries {messages} again, {which}{when}, after {up_to}"
        f"{some(one.attempts or 0, 'failed attempt')}{error}"
    )


def _replays(one: ConsumerStatus) -> str:
    if not one.replays or one.replay_in is None:
        return ""
    text = f"{some(one.replays, 'replay')} {word(one.replays, 'waits', 'wait')} for consumer {one.consumer}"
    if one.replay_in < -REPLAY_LATE:
        return f"{text}, for {duration(-one.replay_in)}: is it running?"
    return text
