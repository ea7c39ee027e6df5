"""Fixtures that give tests their servers, started when the first test asks and shared by all that follow.

A server that this machine cannot provide skips the tests that need it, and the run ends with how to get it.
With CI=true that is a failure: nobody reads the skips of a green run.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import pytest

from tests.services import (
    ELASTICMQ,
    KAFKA,
    MARIADB,
    POSTGRESQL,
    RABBITMQ,
    SERVICES,
    SQS,
    DatabaseServer,
    MariadbServer,
    Pgbouncer,
    PgbouncerServer,
    PostgresqlServer,
    RabbitmqServer,
    Server,
    Service,
    Standby,
    Unavailable,
)

ServerT = TypeVar("ServerT", bound=Server)

INSTALL_TIMEOUT = 900  # seconds for the first test that needs a service, which on a new machine installs it

MISSING = pytest.StashKey[dict[str, str]]()
TO_START = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--on",
        metavar="NAMES",
        help="only tests on these servers (as in --on=postgresql,mariadb): whose id or fixtures have one of the names",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--on")
    if wanted is None:
        return
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        known = " ".join([item.nodeid, *getattr(item, "fixturenames", ())])
        (chosen if any(name in known for name in wanted.split(",")) else others).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=others)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MISSING] = {}
    config.stash[TO_START] = {*SERVICES, "pgbouncer"}


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-timeout looks for its marker, since it counts fixtures
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Allow the first test of this process that needs a service the time to have it installed."""
    to_start = item.config.stash[TO_START]
    if needed := to_start.intersection(getattr(item, "fixturenames", ())):
        to_start -= needed
        item.add_marker(pytest.mark.timeout(INSTALL_TIMEOUT), append=False)
    return (yield)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several processes tells the one that reports."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["missing services"] = session.config.stash[MISSING]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[MISSING].update(getattr(node, "workeroutput", {}).get("missing services", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which services were missing, why, and how to get each."""
    missing = config.stash[MISSING]
    if missing:
        terminalreporter.section("services that this machine lacks")
        for text in missing.values():
            terminalreporter.write_line(text)


def or_skip(config: pytest.Config, service: Service[ServerT], obtain: Callable[[], ServerT]) -> ServerT:
    """What `obtain` returns; where the service is unavailable, skip, or fail with CI=true."""
    try:
        with _uncaptured(config):
            return obtain()
    except Unavailable as reason:
        text = f"{service.name}: {reason}. To run its tests: {service.how_to_get}."
        config.stash[MISSING][service.name] = text
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(text, pytrace=False)
        pytest.skip(f"no {service.name} on this machine")


@contextmanager
def _uncaptured(config: pytest.Config) -> Iterator[None]:
    """Let through what is printed: whoever waits for an install is to see it."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is None:
        yield
        return
    with capture.global_and_fixture_disabled():
        yield


def _session(config: pytest.Config, service: Service[ServerT]) -> Iterator[ServerT]:
    server = or_skip(config, service, service.obtain)
    try:
        yield server
    finally:
        server.close()


class OwnServers:
    """Servers that tests may kill: the session's, or one more where that was given by its URL."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._started: dict[str, Server] = {}
        self._exit = ExitStack()

    def lend(self, service: Service[ServerT], session_server: ServerT) -> Iterator[ServerT]:
        """The server; whatever the test did to it is undone afterwards, except for its data."""
        server = session_server if session_server.ours else self._start(service)
        try:
            yield server
        finally:
            server.recover()

    def _start(self, service: Service[ServerT]) -> ServerT:
        if service.name not in self._started:
            self._started[service.name] = or_skip(self._config, service, service.obtain_own)
            self._exit.callback(self._started[service.name].close)
        return self._started[service.name]  # type: ignore[return-value]  # the type that belongs to the name

    def close(self) -> None:
        self._exit.close()


@pytest.fixture(scope="session")
def own_servers(pytestconfig: pytest.Config) -> Iterator[OwnServers]:
    servers = OwnServers(pytestconfig)
    yield servers
    servers.close()


def _fresh_database(server: DatabaseServer) -> Iterator[str]:
    url = server.create_database()
    yield url
    if server.ours:
        server.recover()  # the test may have killed it, and the fixture to kill it may be torn down later
    server.drop_database(url)


@pytest.fixture(scope="session")
def postgresql(pytestconfig: pytest.Config) -> Iterator[PostgresqlServer]:
    """A running PostgreSQL, shared by the session. Tests that kill it take `killable_postgresql`."""
    yield from _session(pytestconfig, POSTGRESQL)


@pytest.fixture
def postgresql_url(postgresql: PostgresqlServer) -> Iterator[str]:
    """The URL (`postgresql://user@host:port/name`) of a fresh, empty database, dropped after the test."""
    yield from _fresh_database(postgresql)


@pytest.fixture
def killable_postgresql(own_servers: OwnServers, postgresql: PostgresqlServer) -> Iterator[PostgresqlServer]:
    """A PostgreSQL that the test may stop, kill, pause and restart; it answers again after the test.

    Not always the server of `postgresql_url`: a database comes from its `create_database()`.
    """
    yield from own_servers.lend(POSTGRESQL, postgresql)


@pytest.fixture(scope="session")
def pgbouncer(pytestconfig: pytest.Config, postgresql: PostgresqlServer) -> Iterator[PgbouncerServer]:
    """A PgBouncer in transaction mode before the server of `postgresql`, shared by the session."""
    yield from _session(pytestconfig, Pgbouncer(postgresql.url))


@pytest.fixture
def standby(pytestconfig: pytest.Config, postgresql: PostgresqlServer) -> Iterator[PostgresqlServer]:
    """A standby of the server of `postgresql`, of this test's own: it may be promoted."""
    yield from _session(pytestconfig, Standby(postgresql))


@pytest.fixture(scope="session")
def mariadb(pytestconfig: pytest.Config) -> Iterator[MariadbServer]:
    """A running MariaDB, shared by the session. Tests that kill it take `killable_mariadb`."""
    yield from _session(pytestconfig, MARIADB)


@pytest.fixture
def mariadb_url(mariadb: MariadbServer) -> Iterator[str]:
    """The URL (`mysql://user@host:port/name`) of a fresh, empty database, dropped after the test."""
    yield from _fresh_database(mariadb)


@pytest.fixture
def killable_mariadb(own_servers: OwnServers, mariadb: MariadbServer) -> Iterator[MariadbServer]:
    """A MariaDB that the test may stop, kill, pause and restart; it answers again after the test.

    Not always the server of `mariadb_url`: a database comes from its `create_database()`.
    """
    yield from own_servers.lend(MARIADB, mariadb)


@pytest.fixture(scope="session")
def kafka(pytestconfig: pytest.Config) -> Iterator[Server]:
    """A running Kafka, shared by the session. Tests that kill it take `killable_kafka`."""
    yield from _session(pytestconfig, KAFKA)


@pytest.fixture(scope="session")
def kafka_url(kafka: Server) -> str:
    """Kafka's address as `kafka://host:port`."""
    return kafka.url


@pytest.fixture
def killable_kafka(own_servers: OwnServers, kafka: Server) -> Iterator[Server]:
    """A Kafka that the test may stop, kill, pause and restart; it answers again after the test.

    Not always the server of `kafka_url`: its address is its `url`.
    """
    yield from own_servers.lend(KAFKA, kafka)


@pytest.fixture(scope="session")
def rabbitmq(pytestconfig: pytest.Config) -> Iterator[RabbitmqServer]:
    """A running RabbitMQ, shared by the session. Tests that kill it take `killable_rabbitmq`."""
    yield from _session(pytestconfig, RABBITMQ)


@pytest.fixture(scope="session")
def rabbitmq_url(rabbitmq: RabbitmqServer) -> str:
    """RabbitMQ's address as `amqp://guest:guest@host:port`."""
    return rabbitmq.url


@pytest.fixture
def killable_rabbitmq(own_servers: OwnServers, rabbitmq: RabbitmqServer) -> Iterator[RabbitmqServer]:
    """A RabbitMQ that the test may stop, kill, pause and restart; it answers again after the test.

    Not always the server of `rabbitmq_url`: its address is its `url`.
    """
    yield from own_servers.lend(RABBITMQ, rabbitmq)


@pytest.fixture(scope="session")
def sqs(pytestconfig: pytest.Config) -> Iterator[Server]:
    """A lax SQS, shared by the session."""
    yield from _session(pytestconfig, SQS)


@pytest.fixture(scope="session")
def elasticmq(pytestconfig: pytest.Config) -> Iterator[Server]:
    """A strict SQS, shared by the session."""
    yield from _session(pytestconfig, ELASTICMQ)


@pytest.fixture
def killable_sqs(own_servers: OwnServers, elasticmq: Server) -> Iterator[Server]:
    """An SQS that the test may stop, kill, pause and restart, which loses what it holds; it answers again after the test."""
    yield from own_servers.lend(ELASTICMQ, elasticmq)


@pytest.fixture
def topic_name() -> str:
    """A prefix for topic names that no other test has; the topics themselves are the test's to create."""
    return f"test-{uuid.uuid4().hex[:12]}"
