"""What may be removed, and what not yet: one rule a table.

**``message``, ``scheduled``, ``parked``, ``attempt``, ``lease`` and ``checkpoint`` have no rule**: their rows are what still
has to happen. They end by being sent, handled or given up, and never by age.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import sqlalchemy as sa

from outbox.cleanup.retention import DAY, Retention
from outbox.dead_letters.record import RELAY
from outbox.dialects import clock
from outbox.tables import Tables

SILENT: Final = DAY  # seconds without a heartbeat; a relay that runs removes others' rows much sooner

UNSENT: Final = "a message of that id is still to be sent, again"


@dataclass(frozen=True)
class Rule:
    """Rows of ``table`` that are older than ``seconds`` by the time in ``at`` and meet ``candidate`` are removed, unless they
    are ``needed``: pairs of why, in words, and the condition."""

    name: str
    table: sa.Table
    at: sa.Column[Any]
    seconds: float
    candidate: sa.ColumnElement[bool]
    needed: tuple[tuple[str, sa.ColumnElement[bool]], ...] = ()

    @property
    def key(self) -> tuple[sa.Column[Any], ...]:
        return tuple(self.table.primary_key.columns)

    def removable(self) -> sa.ColumnElement[bool]:
        """All but the age."""
        return sa.and_(self.candidate, *(~condition for _, condition in self.needed))


def rules_for(tables: Tables, retention: Retention) -> list[Rule]:
    """In the order in which they are applied: inbox rows outlive the dead letters of their messages."""
    letter, audit, sent, relay = tables.dead_letter, tables.audit, tables.sent, tables.relay
    everything = sa.true()
    return [
        Rule("sent", sent, sent.c.sent_at, retention.sent, everything),
        Rule(
            "dead_letter",
            letter,
            letter.c.closed_at,
            retention.dead_letter,
            letter.c.state != "open",
            (("it was replayed, and its consumer has still to handle it", _in_attempt(tables, letter)),),
        ),
        inbox_rule(tables, retention.inbox),
        Rule("audit", audit, audit.c.at, retention.audit, everything),
        Rule(
            "relay",
            relay,
            relay.c.heartbeat_at,
            SILENT,
            ~_there(tables.lease, tables.lease.c.owner == relay.c.owner, tables.lease.c.expires_at > clock()),
        ),
    ]


def inbox_rule(tables: Tables, seconds: float, table: sa.Table | None = None) -> Rule:
    """A row stays as long as the message can come again for a reason that this database knows. ``table``: one of the
    inbox's partitions, instead of all of it.

    Each condition is one look-up by a unique key. None of them can come true of a row between the look and the delete:
    a message that has an inbox row gets no new attempt or dead letter but by a replay, and a replay needs a dead letter.
    """
    inbox, letter = tables.inbox if table is None else table, tables.dead_letter

    def letter_of(consumer: Any) -> sa.ColumnElement[bool]:
        return _there(letter, letter.c.consumer == consumer, letter.c.message_id == inbox.c.message_id)

    return Rule(
        "inbox",
        inbox,
        inbox.c.processed_at,
        seconds,
        sa.true(),
        (
            ("their message is tried again or replayed", _in_attempt(tables, inbox)),
            # closed ones too: what the relay has sent again a moment ago is skipped by the row that it finds here
            ("their dead letter is kept", letter_of(inbox.c.consumer)),
            ("the relay's dead letter of their message is kept", letter_of(RELAY)),
        ),
    )


def _in_attempt(tables: Tables, table: sa.Table) -> sa.ColumnElement[bool]:
    attempt = tables.attempt
    return _there(attempt, attempt.c.consumer == table.c.consumer, attempt.c.message_id == table.c.message_id)


def _there(table: sa.Table, *conditions: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """EXISTS, asked row by row, by the index: PostgreSQL turns an EXISTS into a join, and may read all dead letters for each
    batch (20–50 ms where there are 100,000, instead of 3). A scalar subquery it leaves alone."""
    return (
        sa.select(sa.literal_column("1")).select_from(table).where(*conditions).limit(1).scalar_subquery().is_not(None)
    )


def unsent_beyond(connection: sa.Connection, tables: Tables, seconds: float) -> bool:
    """Whether a message has waited for longer than that. The first by position is the oldest, give or take a transaction:
    no index has the time, and none is needed for what is normally empty."""
    for table in (tables.message, tables.parked):
        first = sa.select(table.c.created_at).order_by(table.c.position).limit(1).subquery()
        older = sa.select(sa.literal(1)).select_from(first).where(first.c.created_at < clock(-seconds))
        if connection.execute(older).first() is not None:
            return True
    return False


def sparing_unsent(rule: Rule, tables: Tables) -> Rule:
    """The rule where messages have waited for so long that rows of theirs could be old enough to go: what was sent and could
    not be settled comes again. These look-ups have no index, so they are made in that case only."""
    if rule.name not in ("inbox", "dead_letter"):
        return rule
    id = rule.table.c.message_id
    waits = sa.or_(*(sa.exists().where(table.c.id == id) for table in (tables.message, tables.parked)))
    return replace(rule, needed=(*rule.needed, (UNSENT, waits)))
