"""The tables, in their final shape: `docs/table.md` describes them for people who write to them from elsewhere.

Types are chosen so that PostgreSQL, SQLite, MySQL and MariaDB take them without change. Every constraint and index has a
name of ours, so that a naming convention on the user's metadata makes no phantom difference in autogenerate.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.schema import conv

from outbox._message import BUCKETS, KEY_LENGTH, TOPIC_LENGTH, TYPE_LENGTH
from outbox.dialects import UtcDateTime, binary, long_text, now, number, text, unique_id
from outbox.errors import ConfigurationError
from outbox.storage import STORAGE, listed

SCHEMA_VERSION: Final = 2
PREFIX: Final = "outbox_"  # of the tables, where no other one is given
CONSUMER_LENGTH: Final = 128


def _body() -> list[sa.Column[Any]]:
    """The columns of a message, the same wherever it waits. The relay copies them and never parses them."""
    return [
        sa.Column("id", unique_id(), nullable=False),
        sa.Column("bucket", sa.SmallInteger(), nullable=False),
        sa.Column("topic", text(TOPIC_LENGTH), nullable=False),
        sa.Column("key", text(KEY_LENGTH)),
        sa.Column("type", text(TYPE_LENGTH)),
        sa.Column("payload", binary()),
        sa.Column("content_type", text(255)),
        sa.Column("headers", long_text()),
        sa.Column("created_at", UtcDateTime(), nullable=False, server_default=now()),
    ]


BODY: Final = ("id", "bucket", "topic", "key", "type", "payload", "content_type", "headers", "created_at")


@dataclass(frozen=True)
class Tables:
    """The tables of one outbox. ``prefix`` and ``schema`` are where they are."""

    metadata: sa.MetaData
    schema: str | None
    prefix: str
    message: sa.Table = field(init=False)
    scheduled: sa.Table = field(init=False)
    parked: sa.Table = field(init=False)
    dead_letter: sa.Table = field(init=False)
    audit: sa.Table = field(init=False)
    inbox: sa.Table = field(init=False)
    attempt: sa.Table = field(init=False)
    sent: sa.Table = field(init=False)
    lease: sa.Table = field(init=False)
    relay: sa.Table = field(init=False)
    checkpoint: sa.Table = field(init=False)

    def __post_init__(self) -> None:
        for name, make in _MAKERS.items():
            object.__setattr__(self, name, make(self))
        for name, settings in STORAGE.items():
            # not postgresql_with=…, which tables have from SQLAlchemy 2.1 on
            ddl = sa.DDL(f"ALTER TABLE %(fullname)s SET ({listed(settings)})")  # type: ignore[no-untyped-call]
            sa.event.listen(getattr(self, name), "after_create", ddl.execute_if(dialect="postgresql"), propagate=True)
        sa.event.listen(self.checkpoint, "after_create", self._seed_checkpoint, propagate=True)
        sa.event.listen(self.lease, "after_create", self._seed_leases, propagate=True)

    @property
    def all(self) -> tuple[sa.Table, ...]:
        return tuple(getattr(self, name) for name in _MAKERS)

    def table(self, name: str, *args: Any, **kw: Any) -> sa.Table:
        return sa.Table(self.prefix + name, self.metadata, *args, schema=self.schema, **kw)

    def primary_key(self, name: str, *columns: str) -> sa.PrimaryKeyConstraint:
        return sa.PrimaryKeyConstraint(*columns, name=self._name(f"{name}_pkey"))

    def unique(self, name: str, *columns: str) -> sa.UniqueConstraint:
        return sa.UniqueConstraint(*columns, name=self._name(f"{name}_key"))

    def bucket_check(self, name: str) -> sa.CheckConstraint:
        """No relay owns another bucket: a row in one, written by hand, would never be sent, so it is refused instead."""
        return sa.CheckConstraint(f"bucket BETWEEN 0 AND {BUCKETS - 1}", name=self._name(f"{name}_bucket_check"))

    def index(self, name: str, *columns: str, **kw: Any) -> sa.Index:
        return sa.Index(self._name(f"{name}_idx"), *columns, **kw)

    def _name(self, name: str) -> str:
        # conv: also a convention with %(constraint_name)s, which rewrites explicit names, leaves this one alone
        return conv(self.prefix + name)

    # The target, not self.checkpoint: propagate=True gives these listeners to copies by Table.to_metadata as well.
    def _seed_checkpoint(self, target: sa.Table, connection: sa.Connection, **kw: Any) -> None:
        connection.execute(target.insert(), self.seeds())

    def _seed_leases(self, target: sa.Table, connection: sa.Connection, **kw: Any) -> None:
        connection.execute(target.insert(), [{"bucket": bucket} for bucket in range(BUCKETS)])

    @staticmethod
    def seeds() -> list[dict[str, str]]:
        """What a fresh set of tables says of itself."""
        return [
            {"name": "schema_version", "value": str(SCHEMA_VERSION)},
            {"name": "outbox_id", "value": str(uuid.uuid4())},
            {"name": "buckets", "value": str(BUCKETS)},
        ]


def _message(t: Tables) -> sa.Table:
    # Insert and delete only, never updated: Debezium's Event Router takes it as it is, and vacuum has little to do.
    # No unique index on id: the position identifies, a replayed message comes back under its old id.
    return t.table(
        "message",
        # cache=1: with a larger one each session hands out positions of its own and insertion order is gone
        sa.Column("position", number(), sa.Identity(cache=1), autoincrement=True, nullable=False),
        *_body(),
        t.primary_key("message", "position"),
        t.bucket_check("message"),
        sqlite_autoincrement=True,  # without it SQLite gives a deleted position out again
    )


def _scheduled(t: Tables) -> sa.Table:
    return t.table(
        "scheduled",
        *_body(),
        sa.Column("deliver_at", UtcDateTime(), nullable=False),
        t.primary_key("scheduled", "id"),
        t.bucket_check("scheduled"),
        t.index("scheduled_deliver_at", "deliver_at"),
    )


def _parked(t: Tables) -> sa.Table:
    # position is the message's own, so order within a key is order by position. Exactly one row of a key is its head.
    return t.table(
        "parked",
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        *_body(),
        sa.Column("role", text(8), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("next_attempt_at", UtcDateTime()),
        sa.Column("first_failed_at", UtcDateTime()),
        sa.Column("last_failed_at", UtcDateTime()),
        sa.Column("last_error", long_text()),
        t.primary_key("parked", "position"),
        t.index("parked_key", "topic", "key", "position"),
        t.index("parked_due", "role", "next_attempt_at"),
    )


def _dead_letter(t: Tables) -> sa.Table:
    return t.table(
        "dead_letter",
        sa.Column("id", unique_id(), nullable=False),
        # '' is the relay; NULLs would be distinct in the unique key
        sa.Column("consumer", text(CONSUMER_LENGTH), nullable=False),
        sa.Column("message_id", unique_id(), nullable=False),
        sa.Column("cycle", sa.Integer(), nullable=False),
        sa.Column("topic", text(TOPIC_LENGTH), nullable=False),
        sa.Column("partition", sa.Integer()),
        sa.Column("offset", sa.BigInteger(), quote=True),
        sa.Column("bucket", sa.SmallInteger()),
        sa.Column("key", text(KEY_LENGTH)),
        sa.Column("raw_key", binary()),  # only where the key is not text of our length: a foreign producer's
        sa.Column("type", text(TYPE_LENGTH)),
        sa.Column("payload", binary()),
        sa.Column("content_type", text(255)),
        sa.Column("headers", long_text()),
        sa.Column("created_at", UtcDateTime()),
        sa.Column("reason", text(32), nullable=False),
        sa.Column("exception_type", text(255)),
        sa.Column("exception_message", long_text()),
        sa.Column("stack", long_text()),
        sa.Column("fingerprint", text(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("first_failed_at", UtcDateTime()),
        sa.Column("dead_at", UtcDateTime(), nullable=False, server_default=now()),
        sa.Column("app_version", text(64)),
        sa.Column("state", text(16), nullable=False),
        sa.Column("closed_at", UtcDateTime()),
        sa.Column("edited_from", unique_id()),
        t.primary_key("dead_letter", "id"),
        t.unique("dead_letter", "consumer", "message_id", "cycle"),
        t.index("dead_letter_state", "state", "fingerprint", "dead_at"),
        t.index("dead_letter_closed_at", "closed_at"),  # what cleanup removes by age
    )


def _audit(t: Tables) -> sa.Table:
    return t.table(
        "audit",
        sa.Column("id", number(), sa.Identity(), autoincrement=True, nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False, server_default=now()),
        sa.Column("action", text(32), nullable=False),
        sa.Column("who", text(255), nullable=False),
        sa.Column("why", long_text()),
        sa.Column("target", long_text(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        t.primary_key("audit", "id"),
        sqlite_autoincrement=True,
    )


def _inbox(t: Tables) -> sa.Table:
    # The consumer's hottest insert. Cleanup goes by the time, a slice of it after the other: a B-tree, since a range of BRIN
    # never shrinks once vacuum has given pages back and newer rows are in them (docs/decisions/0011).
    return t.table(
        "inbox",
        sa.Column("consumer", text(CONSUMER_LENGTH), nullable=False),
        sa.Column("message_id", unique_id(), nullable=False),
        sa.Column("outcome", text(8), nullable=False),
        sa.Column("cycle", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("processed_at", UtcDateTime(), nullable=False, server_default=now()),
        t.primary_key("inbox", "consumer", "message_id"),
        t.index("inbox_processed_at", "processed_at"),
    )


def _attempt(t: Tables) -> sa.Table:
    return t.table(
        "attempt",
        sa.Column("consumer", text(CONSUMER_LENGTH), nullable=False),
        sa.Column("message_id", unique_id(), nullable=False),
        sa.Column("cycle", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("topic", text(TOPIC_LENGTH), nullable=False),
        sa.Column("partition", sa.Integer()),
        sa.Column("offset", sa.BigInteger(), quote=True),
        sa.Column("key", text(KEY_LENGTH)),
        sa.Column("sequence", sa.BigInteger()),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("state", text(16), nullable=False),
        sa.Column("next_attempt_at", UtcDateTime()),
        sa.Column("first_failed_at", UtcDateTime()),
        sa.Column("last_failed_at", UtcDateTime()),
        sa.Column("last_error", long_text()),
        # the message itself, where it waits in the database
        sa.Column("type", text(TYPE_LENGTH)),
        sa.Column("payload", binary()),
        sa.Column("content_type", text(255)),
        sa.Column("headers", long_text()),
        sa.Column("created_at", UtcDateTime()),
        t.primary_key("attempt", "consumer", "message_id"),
        t.index("attempt_sequence", "consumer", "key", "sequence"),
        t.index("attempt_due", "consumer", "state", "next_attempt_at"),
    )


def _sent(t: Tables) -> sa.Table:
    return t.table(
        "sent",
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", unique_id(), nullable=False),
        sa.Column("topic", text(TOPIC_LENGTH), nullable=False),
        sa.Column("partition", sa.Integer()),
        sa.Column("offset", sa.BigInteger(), quote=True),
        sa.Column("sent_at", UtcDateTime(), nullable=False, server_default=now()),
        t.primary_key("sent", "position"),
        t.index("sent_id", "id"),
        t.index("sent_sent_at", "sent_at"),
    )


def _lease(t: Tables) -> sa.Table:
    return t.table(
        "lease",
        sa.Column("bucket", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("owner", text(128)),
        sa.Column("epoch", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
        sa.Column("expires_at", UtcDateTime()),
        sa.Column("transactional_id", text(255)),
        sa.Column("fence_pending", long_text()),  # JSON list: transactional ids of previous owners not yet fenced
        t.primary_key("lease", "bucket"),
    )


def _relay(t: Tables) -> sa.Table:
    return t.table(
        "relay",
        sa.Column("owner", text(128), nullable=False),
        sa.Column("host", text(255), nullable=False),
        sa.Column("version", text(64), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=False, server_default=now()),
        sa.Column("heartbeat_at", UtcDateTime(), nullable=False, server_default=now()),
        sa.Column("state", long_text()),  # JSON: open circuits and since when, for `outbox status` in another process
        t.primary_key("relay", "owner"),
    )


def _checkpoint(t: Tables) -> sa.Table:
    return t.table(
        "checkpoint",
        sa.Column("name", text(128), nullable=False),
        sa.Column("value", long_text(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False, server_default=now()),
        t.primary_key("checkpoint", "name"),
    )


_MAKERS: Final = {
    "message": _message,
    "scheduled": _scheduled,
    "parked": _parked,
    "dead_letter": _dead_letter,
    "audit": _audit,
    "inbox": _inbox,
    "attempt": _attempt,
    "sent": _sent,
    "lease": _lease,
    "relay": _relay,
    "checkpoint": _checkpoint,
}


def is_prefix(prefix: object) -> bool:
    """Whether tables may be called so: an identifier that no database quotes, so that none reads it as SQL."""
    return isinstance(prefix, str) and re.fullmatch(r"[a-z_][a-z0-9_]{0,30}", prefix) is not None


def tables_for(metadata: sa.MetaData, schema: str | None, prefix: str) -> Tables:
    """The tables of that schema and prefix on that metadata; asked twice, the same ones. Raises `ConfigurationError`."""
    if not is_prefix(prefix):
        raise ConfigurationError(f"prefix {prefix!r}: it must match [a-z_][a-z0-9_]* and be at most 31 characters long")
    if schema is not None and (
        not isinstance(schema, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$]{0,62}", schema)
    ):
        raise ConfigurationError(f"schema {schema!r}: it must be an SQL identifier")
    schema = schema or metadata.schema
    mine: dict[tuple[str | None, str], Tables] = metadata.info.setdefault("pyoutbox", {})
    known = mine.get((schema, prefix))
    if known is None or known.message.key not in metadata.tables:  # metadata.clear() drops tables, not info
        names = [f"{schema}.{prefix}{name}" if schema else prefix + name for name in _MAKERS]
        taken = [name for name in names if name in metadata.tables]
        if taken:
            raise ConfigurationError(
                f"the metadata has a table {taken[0]!r} already, which is not pyoutbox's: choose another prefix, "
                "or create the Outbox before metadata.reflect()"
            )
        known = mine[schema, prefix] = Tables(metadata, schema, prefix)
    return known
