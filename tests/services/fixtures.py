"""Fixtures that give tests their servers, started when the first test asks and shared by all that follow.

A server that this machine cannot provide skips the tests that need it, and the run ends with how to get it.
With CI=true that is a failure: nobody reads the skips of a green run.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeVar

import pytest

from tests.services import KAFKA, POSTGRESQL, PostgresqlServer, Server, Service, Unavailable

ServerT = TypeVar("ServerT", bound=Server)

MISSING = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MISSING] = {}


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
        return obtain()
    except Unavailable as reason:
        text = f"{service.name}: {reason}. To run its tests: {service.how_to_get}."
        config.stash[MISSING][service.name] = text
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(text, pytrace=False)
        pytest.skip(f"no {service.name} on this machine: {reason}")


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


@pytest.fixture(scope="session")
def postgresql(pytestconfig: pytest.Config) -> Iterator[PostgresqlServer]:
    """A running PostgreSQL, shared by the session. Tests that kill it take `killable_postgresql`."""
    yield from _session(pytestconfig, POSTGRESQL)


@pytest.fixture
def postgresql_url(postgresql: PostgresqlServer) -> Iterator[str]:
    """The URL (`postgresql://user@host:port/name`) of a fresh, empty database, dropped after the test."""
    url = postgresql.create_database()
    yield url
    postgresql.drop_database(url)


@pytest.fixture
def killable_postgresql(own_servers: OwnServers, postgresql: PostgresqlServer) -> Iterator[PostgresqlServer]:
    """A PostgreSQL that the test may stop, kill, pause and restart; it answers again after the test."""
    yield from own_servers.lend(POSTGRESQL, postgresql)


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
    """A Kafka that the test may stop, kill, pause and restart; it answers again after the test."""
    yield from own_servers.lend(KAFKA, kafka)


@pytest.fixture
def topic_name() -> str:
    """A prefix for topic names that no other test has; the topics themselves are the test's to create."""
    return f"test-{uuid.uuid4().hex[:12]}"
