"""The servers that tests, benchmarks and `make services` run against, each in a file of its own.

`POSTGRESQL.obtain()` gives a server that answers, wherever it comes from (see `service.py`). A new service
is one more file here and one more line in `SERVICES`.

Two are of another kind where the environment says so, as it does in `make test-matrix`:
OUTBOX_TEST_POSTGRESQL_VERSION=14 (or 18), and OUTBOX_TEST_MARIADB=mysql, which puts MySQL 9 in MariaDB's place.
"""

from __future__ import annotations

import os
from typing import Any

from tests.services.kafka import Kafka
from tests.services.mariadb import MariadbServer
from tests.services.mysql import mariadb_or_its_stand_in
from tests.services.pgbouncer import Pgbouncer, PgbouncerServer
from tests.services.postgresql import Postgresql, PostgresqlServer
from tests.services.rabbitmq import Rabbitmq, RabbitmqServer
from tests.services.service import DatabaseServer, NotOurs, Options, Server, Service, StartFailed, Unavailable
from tests.services.sqs import Elasticmq, Ministack
from tests.services.standby import Standby

POSTGRESQL = Postgresql(os.environ.get("OUTBOX_TEST_POSTGRESQL_VERSION"))
MARIADB = mariadb_or_its_stand_in(os.environ.get("OUTBOX_TEST_MARIADB"))
KAFKA = Kafka()
RABBITMQ = Rabbitmq()
SQS = Ministack()
ELASTICMQ = Elasticmq()

# By the names of their fixtures, which are the services' own but for MariaDB's stand-in.
SERVICES: dict[str, Service[Any]] = {
    "postgresql": POSTGRESQL,
    "mariadb": MARIADB,
    "kafka": KAFKA,
    "rabbitmq": RABBITMQ,
    "sqs": SQS,
    "elasticmq": ELASTICMQ,
}

__all__ = [
    "ELASTICMQ",
    "KAFKA",
    "MARIADB",
    "POSTGRESQL",
    "RABBITMQ",
    "SERVICES",
    "SQS",
    "DatabaseServer",
    "MariadbServer",
    "NotOurs",
    "Options",
    "Pgbouncer",
    "PgbouncerServer",
    "PostgresqlServer",
    "Rabbitmq",
    "RabbitmqServer",
    "Server",
    "Service",
    "Standby",
    "StartFailed",
    "Unavailable",
]
