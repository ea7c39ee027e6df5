"""orders, and the first of them"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    orders = op.create_table(
        "orders",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("customer_id", sa.Integer(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_orders"),
        sa.ForeignKeyConstraint(["customer_id"], ["customers.id"], name="fk_orders_customer_id_customers"),
    )
    customers = sa.table("customers", sa.column("name"))
    op.bulk_insert(customers, [{"name": "ada"}, {"name": "grace"}])
    op.bulk_insert(orders, [{"customer_id": 1, "total": 1990}, {"customer_id": 2, "total": 250}])


def downgrade() -> None:
    op.drop_table("orders")
    op.execute("DELETE FROM customers")
