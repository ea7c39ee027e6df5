"""Version 1: the tables, as they were first released.

Frozen: a copy of what `outbox.tables` was then, so that a revision that says ``to=1`` makes in two years what it made at
first (tests/migrations holds its SQL). What came later is in the steps after this one; why a table is as it is, in
`outbox.tables`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import sqlalchemy as sa

from outbox.dialects import UtcDateTime, binary, long_text, now, number, text, unique_id
from outbox_migrations._operations import Operation, create_index, create_table, drop_table, seed
from outbox_migrations._step import Place, Step

BUCKETS: Final = 64

# The database makes this outbox's id: a script written once may be run on several.
_UUID: Final = {
    "postgresql": "gen_random_uuid()::text",
    "sqlite": (
        "lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2) || '-a' ||"
        " substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6)))"
    ),
    "mysql": "uuid()",
    "mariadb": "uuid()",
}


def _upgrade(place: Place) -> Iterator[Operation]:
    tables = _Builder(place.schema, place.prefix).tables()
    for table in tables.values():
        yield create_table(table)
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            yield create_index(index)
    names: list[dict[str, object]] = [
        {"name": "outbox_id", "value": sa.text(_UUID[place.dialect])},
        {"name": "buckets", "value": str(BUCKETS)},
    ]
    yield seed(tables["checkpoint"], names)
    yield seed(tables["lease"], [{"bucket": bucket} for bucket in range(BUCKETS)])


def _downgrade(place: Place) -> Iterator[Operation]:
    for table in reversed(_Builder(place.schema, place.prefix).tables().values()):
        yield drop_table(table)


class _Builder:
    def __init__(self, schema: str | None, prefix: str) -> None:
        self.metadata, self.schema, self.prefix = sa.MetaData(), schema, prefix

    def tables(self) -> dict[str, sa.Table]:
        return {name: make(self) for name, make in _MAKERS.items()}

    def table(self, name: str, *args: Any, **kw: Any) -> sa.Table:
        return sa.Table(self.prefix + name, self.metadata, *args, schema=self.schema, **kw)

    def primary_key(self, name: str, *columns: str) -> sa.PrimaryKeyConstraint:
        return sa.PrimaryKeyConstraint(*columns, name=f"{self.prefix}{name}_pkey")

    def unique(self, name: str, *columns: str) -> sa.UniqueConstraint:
        return sa.UniqueConstraint(*columns, name=f"{self.prefix}{name}_key")

    def bucket_check(self, name: str) -> sa.CheckConstraint:
        return sa.CheckConstraint("bucket BETWEEN 0 AND 63", name=f"{self.prefix}{name}_bucket_check")

    def index(self, name: str, *columns: str, **kw: Any) -> sa.Index:
        return sa.Index(f"{self.prefix}{name}_idx", *columns, **kw)


def _body() -> list[sa.Column[Any]]:
    return [
        sa.Column("id", unique_id(), nullable=False),
        sa.Column("bucket", sa.SmallInteger(), nullable=False),
        sa.Column("topic", text(255), nullable=False),
        sa.Column("key", text(255)),
        sa.Column("type", text(255)),
        sa.Column("payload", binary()),
        sa.Column("content_type", text(255)),
        sa.Column("headers", long_text()),
        sa.Column("created_at", UtcDateTime(), nullable=False, server_default=now()),
    ]


def _message(t: _Builder) -> sa.Table:
    return t.table(
        "message",
        sa.Column("position", number(), sa.Identity(cache=1), autoincrement=True, nullable=False),
        *_body(),
        t.primary_key("message", "position"),
        t.bucket_check("message"),
        sqlite_autoincrement=True,
    )


def _scheduled(t: _Builder) -> sa.Table:
    return t.table(
        "scheduled",
        *_body(),
        sa.Column("deliver_at", UtcDateTime(), nullable=False),
        t.primary_key("scheduled", "id"),
        t.bucket_check("scheduled"),
        t.index("scheduled_deliver_at", "deliver_at"),
    )


def _parked(t: _Builder) -> sa.Table:
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


def _dead_letter(t: _Builder) -> sa.Table:
    return t.table(
        "dead_letter",
        sa.Column("id", unique_id(), nullable=False),
        sa.Column("consumer", text(128), nullable=False),
        sa.Column("message_id", unique_id(), nullable=False),
        sa.Column("cycle", sa.Integer(), nullable=False),
        sa.Column("topic", text(255), nullable=False),
        sa.Column("partition", sa.Integer()),
        sa.Column("offset", sa.BigInteger(), quote=True),
        sa.Column("bucket", sa.SmallInteger()),
        sa.Column("key", text(255)),
        sa.Column("raw_key", binary()),
        sa.Column("type", text(255)),
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
    )


def _audit(t: _Builder) -> sa.Table:
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


def _inbox(t: _Builder) -> sa.Table:
    return t.table(
        "inbox",
        sa.Column("consumer", text(128), nullable=False),
        sa.Column("message_id", unique_id(), nullable=False),
        sa.Column("outcome", text(8), nullable=False),
        sa.Column("cycle", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("processed_at", UtcDateTime(), nullable=False, server_default=now()),
        t.primary_key("inbox", "consumer", "message_id"),
        t.index("inbox_processed_at", "processed_at"),
    )


def _attempt(t: _Builder) -> sa.Table:
    return t.table(
        "attempt",
        sa.Column("consumer", text(128), nullable=False),
        sa.Column("message_id", unique_id(), nullable=False),
        sa.Column("cycle", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("topic", text(255), nullable=False),
        sa.Column("partition", sa.Integer()),
        sa.Column("offset", sa.BigInteger(), quote=True),
        sa.Column("key", text(255)),
        sa.Column("sequence", sa.BigInteger()),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("state", text(16), nullable=False),
        sa.Column("next_attempt_at", UtcDateTime()),
        sa.Column("first_failed_at", UtcDateTime()),
        sa.Column("last_failed_at", UtcDateTime()),
        sa.Column("last_error", long_text()),
        sa.Column("type", text(255)),
        sa.Column("payload", binary()),
        sa.Column("content_type", text(255)),
        sa.Column("headers", long_text()),
        sa.Column("created_at", UtcDateTime()),
        t.primary_key("attempt", "consumer", "message_id"),
        t.index("attempt_sequence", "consumer", "key", "sequence"),
        t.index("attempt_due", "consumer", "state", "next_attempt_at"),
    )


def _sent(t: _Builder) -> sa.Table:
    return t.table(
        "sent",
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", unique_id(), nullable=False),
        sa.Column("topic", text(255), nullable=False),
        sa.Column("partition", sa.Integer()),
        sa.Column("offset", sa.BigInteger(), quote=True),
        sa.Column("sent_at", UtcDateTime(), nullable=False, server_default=now()),
        t.primary_key("sent", "position"),
        t.index("sent_id", "id"),
        t.index("sent_sent_at", "sent_at"),
    )


def _lease(t: _Builder) -> sa.Table:
    return t.table(
        "lease",
        sa.Column("bucket", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("owner", text(128)),
        sa.Column("epoch", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
        sa.Column("expires_at", UtcDateTime()),
        sa.Column("transactional_id", text(255)),
        sa.Column("fence_pending", long_text()),
        t.primary_key("lease", "bucket"),
    )


def _relay(t: _Builder) -> sa.Table:
    return t.table(
        "relay",
        sa.Column("owner", text(128), nullable=False),
        sa.Column("host", text(255), nullable=False),
        sa.Column("version", text(64), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=False, server_default=now()),
        sa.Column("heartbeat_at", UtcDateTime(), nullable=False, server_default=now()),
        sa.Column("state", long_text()),
        t.primary_key("relay", "owner"),
    )


def _checkpoint(t: _Builder) -> sa.Table:
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


STEP: Final = Step("0001_tables", _upgrade, _downgrade)
