"""`python -m shop.create_tables`. An app that lives longer has Alembic: autogenerate sees the outbox's tables too."""

from __future__ import annotations

import asyncio
import os

from sqlalchemy.ext.asyncio import create_async_engine

from shop import messaging  # noqa: F401  # its Outbox puts the tables on the metadata
from shop.models import Base


async def main() -> None:
    engine = create_async_engine(os.environ["OUTBOX_DATABASE"])
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
