"""The servers that benchmarks run against: those of the tests, with fsync and the full JIT compiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.services import KAFKA, POSTGRESQL, Options

PRODUCTION = Options(like_production=True)


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of a fresh database, for SQLAlchemy with psycopg."""
    server = POSTGRESQL.obtain(PRODUCTION)
    try:
        yield server.create_database().replace("postgresql://", "postgresql+psycopg://", 1)
    finally:
        server.close()


@contextmanager
def kafka() -> Iterator[str]:
    """The URL of a broker, ``kafka://host:port``."""
    server = KAFKA.obtain(PRODUCTION)
    try:
        yield server.url
    finally:
        server.close()
