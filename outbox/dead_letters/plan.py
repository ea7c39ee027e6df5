"""What a replay would do, and whether it is safe: to whom dead letters go, what may happen twice, what comes too late.

The inbox keeps ids and no keys, so that which later messages of a key were handled meanwhile cannot be counted. It can be
bounded from both sides: at least those whose own dead letters tell their key, at most all that the consumer has handled.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Final

import sqlalchemy as sa

from outbox import encoding
from outbox.dead_letters.letter import Filter
from outbox.dead_letters.record import RELAY
from outbox.dead_letters.replay import in_order
from outbox.errors import DecodingError
from outbox.observe.words import some, word
from outbox.tables import Tables

NO_HANDLER_RAN: Final = ("undeserializable", "no-handler")

STREAM: Final = {"yield_per": 1000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where some of the letters go: to one consumer, or ('') back to the relay. Counts are messages.

    ``through``: the table that they go into. ``queued``: for a consumer its replays that wait already, for the relay the
    messages of these keys that wait and go first. ``handler_ran``: letters whose handler was reached at all.
    ``handled_later``: later messages of these keys that are known to be handled; ``handled_later_at_most``: more than so
    many they cannot be, None where that cannot be known. ``later_open``: later dead letters of these keys that stay open.
    ``unreadable``: letters that stay open, since their headers cannot be read.
    """

    consumer: str
    through: str
    count: int
    keys: int
    queued: int = 0
    handler_ran: int = 0
    handled_later: int = 0
    handled_later_at_most: int | None = None
    later_open: int = 0
    unreadable: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """``count``: dead letters in all."""

    count: int
    to: tuple[Destination, ...]

    def notes(self) -> list[str]:
        """A few lines for an operator who is about to do it."""
        return [line for one in self.to for line in (_relay_notes(one) if one.consumer == RELAY else _notes(one))]

    def as_dict(self) -> dict[str, Any]:
        return {"to": [asdict(one) for one in self.to], "notes": self.notes()}


def plan(connection: sa.Connection, tables: Tables, wanted: Filter, limit: int | None) -> Plan:
    """The same letters as `replay` would take. Reads, and locks nothing."""
    letter = tables.dead_letter
    conditions = wanted.conditions(tables)
    taken: set[uuid.UUID] = set()
    query = sa.select(letter).where(*conditions)
    if limit is not None:
        query = query.order_by(*in_order(letter)).limit(limit)
        taken.update(connection.scalars(sa.select(query.subquery("taken").c.id)))
        conditions = [sa.false()]  # of the others none is among these; those that are go by their ids
    chosen = query.subquery("chosen")
    columns = (
        sa.func.count().label("number"),
        sa.func.sum(sa.case((chosen.c.reason.in_(NO_HANDLER_RAN), 0), else_=1)).label("ran"),
    )
    rows = connection.execute(
        sa.select(chosen.c.consumer, *columns).group_by(chosen.c.consumer).order_by(chosen.c.consumer)
    ).all()
    to = []
    for consumer, number, ran in rows:
        of_it = sa.select(chosen).where(chosen.c.consumer == consumer).subquery("of_it")
        firsts = _firsts(connection, of_it)
        known: dict[str, Any] = {"consumer": consumer, "count": number, "keys": len(firsts)}
        if firsts:
            known["later_open"] = _later(connection, _left_open(letter, consumer, conditions), firsts, taken)
        if consumer == RELAY:
            known["through"] = tables.message.name
            known["unreadable"] = _unreadable(connection, of_it)
            known["queued"] = _waiting(connection, tables, firsts)
        else:
            known["through"] = tables.attempt.name
            known["handler_ran"] = ran
            known["queued"] = _replays(connection, tables, consumer)
            if firsts:
                known["handled_later"] = _later(connection, _handled(tables, consumer), firsts)
                known["handled_later_at_most"] = _handled_since(connection, tables, of_it, consumer)
        to.append(Destination(**known))
    return Plan(sum(one.count for one in to), tuple(to))


_First = tuple[int | None, int | None, dt.datetime]
"""Of one key and partition: partition, the lowest offset, the earliest time."""


_Firsts = dict[tuple[str, str], list[_First]]
"""By topic and key."""


def _firsts(connection: sa.Connection, mine: sa.Subquery) -> _Firsts:
    """Where each key's letters begin."""
    place = (mine.c.topic, mine.c.key, mine.c.partition)
    query = (
        sa.select(*place, sa.func.min(mine.c.offset), sa.func.min(_age(mine)))
        .where(mine.c.key.is_not(None))
        .group_by(*place)
    )
    found: _Firsts = {}
    for topic, key, partition, offset, age in connection.execute(query):
        found.setdefault((topic, key), []).append((partition, offset, age))
    return found


def _later(
    connection: sa.Connection, letters: sa.Select[Any], firsts: _Firsts, without: Collection[uuid.UUID] = ()
) -> int:
    """How many messages of ``letters`` (of `_places`) came after the first one of their key. Compared here: a join on all
    this is what databases plan worst, and a key may have thousands."""
    found = set()
    for id, message, topic, key, partition, offset, age in connection.execute(letters, execution_options=STREAM):
        if id in without:
            continue
        for first_partition, first_offset, first_age in firsts.get((topic, key), ()):
            if partition == first_partition and offset is not None and first_offset is not None:
                is_later = offset > first_offset
            else:
                is_later = age > first_age
            if is_later:
                found.add(message)
                break
    return len(found)


def _places(letter: sa.Table, consumer: str) -> sa.Select[Any]:
    names = ("id", "message_id", "topic", "key", "partition", "offset")
    return sa.select(*(letter.c[name] for name in names), _age(letter)).where(
        letter.c.consumer == consumer, letter.c.key.is_not(None)
    )


def _left_open(letter: sa.Table, consumer: str, conditions: list[sa.ColumnElement[bool]]) -> sa.Select[Any]:
    """Open letters that do not meet the conditions; those that NULL leaves undecided do not."""
    not_these = ~sa.func.coalesce(sa.and_(*conditions), sa.false())
    return _places(letter, consumer).where(letter.c.state == "open", not_these)


def _handled(tables: Tables, consumer: str) -> sa.Select[Any]:
    """Letters whose message has been handled since."""
    letter, inbox = tables.dead_letter, tables.inbox
    done = sa.and_(
        inbox.c.consumer == letter.c.consumer, inbox.c.message_id == letter.c.message_id, inbox.c.outcome == "done"
    )
    return _places(letter, consumer).where(letter.c.state != "open").join(inbox, done)


def _age(letter: Any) -> sa.ColumnElement[Any]:
    return sa.func.coalesce(letter.c.created_at, letter.c.first_failed_at, letter.c.dead_at)


def _handled_since(connection: sa.Connection, tables: Tables, mine: sa.Subquery, consumer: str) -> int:
    """All that the consumer has handled since the first of these failed, of any key. By the index on the time."""
    inbox = tables.inbox
    failed = sa.select(sa.func.min(sa.func.coalesce(mine.c.first_failed_at, mine.c.dead_at)))
    since = connection.scalar(failed.where(mine.c.key.is_not(None)))
    query = (
        sa.select(sa.func.count())
        .select_from(inbox)
        .where(inbox.c.consumer == consumer, inbox.c.outcome == "done", inbox.c.processed_at >= since)
    )
    return connection.scalar(query) or 0


def _replays(connection: sa.Connection, tables: Tables, consumer: str) -> int:
    attempt = tables.attempt
    query = sa.select(sa.func.count()).select_from(attempt)
    return connection.scalar(query.where(attempt.c.consumer == consumer, attempt.c.state == "replay")) or 0


def _waiting(connection: sa.Connection, tables: Tables, firsts: _Firsts) -> int:
    """Messages of these keys in the outbox: a replay comes behind them."""
    number = 0
    for table in (tables.message, tables.parked) if firsts else ():
        query = sa.select(table.c.topic, table.c.key, sa.func.count()).group_by(table.c.topic, table.c.key)
        for topic, key, waiting in connection.execute(query, execution_options=STREAM):
            number += waiting if (topic, key) in firsts else 0
    return number


def _unreadable(connection: sa.Connection, mine: sa.Subquery) -> int:
    number = 0
    query = sa.select(mine.c.headers).where(mine.c.headers.is_not(None))
    for (text,) in connection.execute(query, execution_options=STREAM):
        try:
            encoding.load_headers(text)
        except DecodingError:
            number += 1
    return number


# ---------------------------------------------------------------- in words


def _notes(one: Destination) -> list[str]:
    waits = f" ({some(one.queued, 'replay')} {word(one.queued, 'does', 'do')} already)" if one.queued else ""
    return [
        f"{one.count:,} to consumer {one.consumer} alone, through {one.through}: handled while it runs (`outbox consume`), "
        f"waiting there until then{waits}.",
        _effects(one),
        _order(one),
    ]


def _effects(one: Destination) -> str:
    if not one.handler_ran:
        return f"  Safe: no handler has run with {word(one.count, 'it', 'them')}."
    some_ran = f" Of {one.handler_ran:,} of them a handler ran." if one.handler_ran < one.count else ""
    return (
        "  Its database is safe: what the failed attempts wrote was rolled back. What they did elsewhere (HTTP calls, mail) "
        f"can happen again.{some_ran}"
    )


def _order(one: Destination) -> str:
    if not one.keys:
        return _no_key(one)
    if not one.handled_later_at_most and not one.handled_later:
        text = f"{one.consumer} has handled nothing since they failed, so no later message came before them"
    else:
        text = (
            f"later messages may have been handled already: at least {one.handled_later:,} (as far as dead letters of "
            f"these keys tell), at most {one.handled_later_at_most:,} (all that {one.consumer} has handled since; the "
            "inbox keeps no keys)"
        )
    return f"  Order of {_their_keys(one)}: {text}{_still_open(one)}."


def _relay_notes(one: Destination) -> list[str]:
    it, has, ids = (
        word(one.count, "it", "them"),
        word(one.count, "it", "one"),
        word(one.count, "its old id", "their old ids"),
    )
    lines = [
        f"{one.count:,} to the relay's queue, {one.through}, under {ids}: sent while a relay runs (`outbox relay`).",
        f"  The broker never acknowledged {it}; a consumer that has {has} all the same skips it by its id.",
        _relay_order(one),
    ]
    if one.unreadable:
        stay, their = word(one.unreadable, "stays", "stay"), word(one.unreadable, "its", "their")
        lines.append(f"  {one.unreadable:,} {stay} open: {their} headers cannot be read.")
    return lines


def _relay_order(one: Destination) -> str:
    if not one.keys:
        return _no_key(one)
    wait, go = word(one.queued, "waits", "wait"), word(one.queued, "goes", "go")
    first = f"; {one.queued:,} that {wait} now {go} first" if one.queued else ""
    return (
        f"  Order of {_their_keys(one)}: later messages may have been sent meanwhile, and how many cannot be known (what is "
        f"sent leaves no row){first}{_still_open(one)}."
    )


def _their_keys(one: Destination) -> str:
    return f"{word(one.count, 'its', 'their')} {some(one.keys, 'key')}"


def _no_key(one: Destination) -> str:
    return f"  Order: {word(one.count, 'it has no key', 'none of these has a key')}."


def _still_open(one: Destination) -> str:
    if not one.later_open:
        return ""
    letters = some(one.later_open, "later dead letter")
    return f"; {letters} of {word(one.keys, 'it', 'them')} {word(one.later_open, 'stays', 'stay')} open"
