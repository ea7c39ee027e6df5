"""whether an order is paid: a column, and what it is for the orders that are there"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("orders", sa.Column("paid", sa.Integer(), nullable=False, server_default="0"))
    op.execute("UPDATE orders SET paid = 1 WHERE total > 1000")


def downgrade() -> None:
    op.drop_column("orders", "paid")
