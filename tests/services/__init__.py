"""The servers that tests, benchmarks and `make services` run against, each in a file of its own.

`POSTGRESQL.obtain()` gives a server that answers, wherever it comes from (see `service.py`). A new service
is one more file here and one more line in `SERVICES`.
"""

from __future__ import annotations

from typing import Any

from tests.services.kafka import Kafka
from tests.services.mariadb import Mariadb, MariadbServer
from tests.services.postgresql import Postgresql, PostgresqlServer
from tests.services.service import DatabaseServer, NotOurs, Options, Server, Service, StartFailed, Unavailable

POSTGRESQL = Postgresql()
MARIADB = Mariadb()
KAFKA = Kafka()

SERVICES: dict[str, Service[Any]] = {service.name: service for service in (POSTGRESQL, MARIADB, KAFKA)}

__all__ = [
    "KAFKA",
    "MARIADB",
    "POSTGRESQL",
    "SERVICES",
    "DatabaseServer",
    "MariadbServer",
    "NotOurs",
    "Options",
    "PostgresqlServer",
    "Server",
    "Service",
    "StartFailed",
    "Unavailable",
]
