"""The servers that benchmarks run against: those of the tests, with fsync and the full JIT compiler."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from outbox.stores.engine import sync_engine_for
from tests.services import ELASTICMQ, KAFKA, MARIADB, POSTGRESQL, RABBITMQ, Options

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
def mariadb() -> Iterator[str]:
    """The URL of a fresh database, ``mysql://…``. Its buffer pool holds a million rows of a benchmark."""
    server = MARIADB.obtain(PRODUCTION)
    try:
        url = server.create_database()
        engine = sync_engine_for(url)
        with engine.connect() as connection:
            connection.exec_driver_sql("set global innodb_buffer_pool_size = 1073741824")
        engine.dispose()
        yield url
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


@contextmanager
def rabbitmq() -> Iterator[str]:
    """The URL of a broker, ``amqp://user:password@host:port``."""
    server = RABBITMQ.obtain(PRODUCTION)
    try:
        yield server.url
    finally:
        server.close()


@contextmanager
def sqs() -> Iterator[str]:
    """The URL of ElasticMQ, ``sqs://key:secret@region/?endpoint_url=…``."""
    server = ELASTICMQ.obtain(PRODUCTION)
    try:
        # a close ends polls that take longer, and their messages would be invisible to who is measured next
        yield f"{server.url}&wait_ms=1000"
    finally:
        server.close()


@contextmanager
def local() -> Iterator[str]:
    """The URL of a new log, ``local:…``."""
    with tempfile.TemporaryDirectory(prefix="outbox-bench-") as folder:
        yield f"local:{folder}/log.db"


@contextmanager
def memory() -> Iterator[str]:
    """The URL of a new log in this process."""
    yield f"memory://{uuid.uuid4().hex}"
