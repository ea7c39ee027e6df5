"""As `alembic init` makes it, shortened: the URL comes from the environment, the metadata from the app."""

import os

from alembic import context
from shop import messaging  # noqa: F401  (its Outbox has put its tables into Base.metadata)
from shop.models import Base
from sqlalchemy import create_engine, pool

url = os.environ["OUTBOX_DATABASE"]
options = {"target_metadata": Base.metadata, "compare_type": True, "compare_server_default": True}

if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    engine = create_engine(url, poolclass=pool.NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, transaction_per_migration=True, **options)
        with context.begin_transaction():
            context.run_migrations()
