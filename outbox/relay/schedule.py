"""Messages with a time: when it has come they move into ``message``, where they are like any other."""

from __future__ import annotations

import sqlalchemy as sa

from outbox.dialects import clock, delete_listed
from outbox.tables import BODY, Tables


def move_due(connection: sa.Connection, tables: Tables, limit: int) -> int:
    """Move up to ``limit`` due rows in one transaction; returns how many. Any relay may: rows that another is moving, or
    that an open cancel holds, are skipped. A key's order starts here."""
    scheduled, message = tables.scheduled, tables.message
    ids = connection.scalars(
        sa.select(scheduled.c.id)
        .where(scheduled.c.deliver_at <= clock())
        .order_by(scheduled.c.deliver_at, scheduled.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    if not ids:
        return 0
    # created_at is when it came into `message`: the age of what is unsent must not count the time it was asked to wait
    names = [name for name in BODY if name != "created_at"]
    columns = [scheduled.c[name] for name in names]
    connection.execute(
        message.insert().from_select(
            names,
            sa.select(*columns).where(scheduled.c.id.in_(ids)).order_by(scheduled.c.deliver_at, scheduled.c.id),
        )
    )
    connection.execute(delete_listed(scheduled, connection.dialect.name, {"id": ids}))
    return len(ids)
