"""the outbox of a newer pyoutbox: this came with `pip install -U pyoutbox`"""

from alembic import op

import outbox_migrations

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    outbox_migrations.upgrade(op, to=2, start=1)


def downgrade() -> None:
    outbox_migrations.downgrade(op, to=1, start=2)
