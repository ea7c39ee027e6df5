"""the outbox"""

from alembic import op

import outbox_migrations

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    outbox_migrations.upgrade(op, to=1)


def downgrade() -> None:
    outbox_migrations.downgrade(op, to=0)
