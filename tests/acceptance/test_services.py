"""The servers that all other tests rely on: they answer, survive what tests do to them, and leave with their runner."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]
import psycopg
import pymysql
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tests.services import MARIADB, POSTGRESQL, MariadbServer, PgbouncerServer, PostgresqlServer, Server
from tests.services.postgresql import Postgresql
from tests.services.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]

# Starts a server, says where its process and data are, and waits for its own end.
RUNNER = """
import json, sys
from tests.services import SERVICES
server = SERVICES[sys.argv[1]].obtain_own()
print(json.dumps(server.control.state()), flush=True)
sys.stdin.read()
"""


def test_postgresql_gives_each_test_an_empty_database(postgresql: PostgresqlServer, postgresql_url: str) -> None:
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        tables = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
        assert tables == (0,)
    other = postgresql.create_database()
    assert other != postgresql_url
    postgresql.drop_database(other)


def test_postgresql_is_set_up_for_logical_replication_and_prepared_transactions(postgresql_url: str) -> None:
    with psycopg.connect(postgresql_url) as connection:
        assert connection.execute("SHOW wal_level").fetchone() == ("logical",)
        assert connection.execute("SHOW max_prepared_transactions").fetchone() != ("0",)


def test_a_server_of_another_release_than_was_asked_for_is_refused(postgresql: PostgresqlServer) -> None:
    other = "14" if POSTGRESQL.version == "18" else "18"
    with pytest.raises(ConnectionError, match=f"PostgreSQL {other} is asked for, and that one is "):
        Postgresql(other).ping(postgresql.url)


def test_a_database_copied_from_a_template_has_its_tables(postgresql: PostgresqlServer, postgresql_url: str) -> None:
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE fruit (name text)")
    copy = postgresql.create_database(template=postgresql_url)
    with psycopg.connect(copy) as connection:
        assert connection.execute("SELECT count(*) FROM fruit").fetchone() == (0,)
    postgresql.drop_database(copy)


def test_a_database_is_dropped_whatever_a_test_left_in_it(postgresql: PostgresqlServer) -> None:
    url = postgresql.create_database()
    with psycopg.connect(url, autocommit=True) as left_open:
        left_open.execute("CREATE TABLE fruit (name text)")
        left_open.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [f"s_{uuid.uuid4().hex}"])
        left_open.execute("BEGIN")
        left_open.execute("INSERT INTO fruit VALUES ('apple')")
        left_open.execute(f"PREPARE TRANSACTION '{uuid.uuid4().hex}'")
        postgresql.drop_database(url)
        with pytest.raises(psycopg.OperationalError):
            left_open.execute("SELECT 1")


def test_postgresql_killed_and_restarted_has_its_port_and_its_data(killable_postgresql: PostgresqlServer) -> None:
    server = killable_postgresql
    url = server.create_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE fruit AS SELECT 'apple' AS name")

    server.kill()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url)

    server.restart()
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT name FROM fruit").fetchone() == ("apple",)
    server.drop_database(url)


def test_a_paused_server_is_silent_until_it_resumes(killable_postgresql: PostgresqlServer) -> None:
    killable_postgresql.pause()
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        POSTGRESQL.ping(killable_postgresql.url)
    killable_postgresql.resume()
    POSTGRESQL.ping(killable_postgresql.url)


def test_pgbouncer_runs_consecutive_transactions_of_a_client_on_different_backends(
    pgbouncer: PgbouncerServer, postgresql_url: str
) -> None:
    with psycopg.connect(pgbouncer.through(postgresql_url), autocommit=True, prepare_threshold=None) as connection:
        backends = [connection.execute("SELECT pg_backend_pid()").fetchone() for _ in range(20)]
    assert len(set(backends)) >= 4
    assert all(one != next for one, next in pairwise(backends))


def test_pgbouncer_is_of_the_kind_that_knows_no_prepared_statements(
    pgbouncer: PgbouncerServer, postgresql_url: str
) -> None:
    url = pgbouncer.through(postgresql_url)
    # prepared on one backend, executed on the next
    with (
        psycopg.connect(url, autocommit=True, prepare_threshold=0) as connection,
        pytest.raises(psycopg.errors.InvalidSqlStatementName),
    ):
        connection.execute("SELECT 1")


def test_mariadb_gives_each_test_an_empty_database(mariadb: MariadbServer, mariadb_url: str) -> None:
    with _mariadb(mariadb_url) as cursor:
        assert cursor.execute("SHOW TABLES") == 0
    other = mariadb.create_database()
    assert other != mariadb_url
    mariadb.drop_database(other)


def test_mariadb_is_set_up_for_a_row_binlog(mariadb_url: str) -> None:
    with _mariadb(mariadb_url) as cursor:
        cursor.execute("SELECT @@log_bin, @@binlog_format, @@binlog_row_image, @@binlog_row_metadata")
        assert cursor.fetchone() == (1, "ROW", "FULL", "FULL")


def test_a_mariadb_database_copied_from_a_template_has_its_tables_and_rows(
    mariadb: MariadbServer, mariadb_url: str
) -> None:
    with _mariadb(mariadb_url) as cursor:
        cursor.execute("CREATE TABLE tree (id int PRIMARY KEY AUTO_INCREMENT, name text)")
        cursor.execute("CREATE TABLE fruit (tree int, FOREIGN KEY (tree) REFERENCES tree (id))")
        cursor.execute("INSERT INTO tree (id, name) VALUES (41, 'apple')")
        cursor.execute("INSERT INTO fruit VALUES (41)")
    copy = mariadb.create_database(template=mariadb_url)
    with _mariadb(copy) as cursor:
        cursor.execute("INSERT INTO tree (name) VALUES ('pear')")
        cursor.execute("SELECT id, name FROM tree ORDER BY id")
        assert cursor.fetchall() == ((41, "apple"), (42, "pear"))
        with pytest.raises(pymysql.IntegrityError):
            cursor.execute("INSERT INTO fruit VALUES (43)")
    mariadb.drop_database(copy)


def test_a_mariadb_database_is_dropped_whatever_a_test_left_in_it(mariadb: MariadbServer) -> None:
    url = mariadb.create_database()
    with _mariadb(url) as gone:
        gone.execute("CREATE TABLE fruit (id int PRIMARY KEY)")
        gone.execute("XA START 'left'")
        gone.execute("INSERT INTO fruit VALUES (1)")
        gone.execute("XA END 'left'")
        gone.execute("XA PREPARE 'left'")
    with _mariadb(url) as left_open:
        left_open.execute("BEGIN")
        left_open.execute("INSERT INTO fruit VALUES (2)")
        mariadb.drop_database(url)
        with pytest.raises(pymysql.OperationalError):
            left_open.execute("SELECT 1")


def test_mariadb_killed_and_restarted_has_its_port_and_its_data(killable_mariadb: MariadbServer) -> None:
    server = killable_mariadb
    url = server.create_database()
    with _mariadb(url) as cursor:
        cursor.execute("CREATE TABLE fruit AS SELECT 'apple' AS name")
        cursor.execute("INSERT INTO fruit VALUES ('pear')")

    server.kill()
    with pytest.raises(pymysql.OperationalError), _mariadb(url):
        pass

    server.restart()
    with _mariadb(url) as cursor:
        cursor.execute("SELECT name FROM fruit")
        assert cursor.fetchall() == (("apple",), ("pear",))
    server.drop_database(url)


def test_a_paused_mariadb_is_silent_until_it_resumes(killable_mariadb: MariadbServer) -> None:
    killable_mariadb.pause()
    with pytest.raises(pymysql.OperationalError, match="timed out"):
        MARIADB.ping(killable_mariadb.url)
    killable_mariadb.resume()
    MARIADB.ping(killable_mariadb.url)


async def test_kafka_creates_no_topic_by_itself(kafka_url: str, topic_name: str) -> None:
    async with _admin(kafka_url) as admin:
        await admin.describe_topics([topic_name])
        assert topic_name not in await admin.list_topics()


async def test_kafka_killed_and_restarted_has_its_port_and_its_data(killable_kafka: Server, topic_name: str) -> None:
    async with _admin(killable_kafka.url) as admin:
        await admin.create_topics([NewTopic(topic_name, num_partitions=1, replication_factor=1)])
    async with AIOKafkaProducer(bootstrap_servers=_address(killable_kafka.url), acks="all") as producer:
        await producer.send_and_wait(topic_name, b"apple")

    await asyncio.to_thread(killable_kafka.kill)
    await asyncio.to_thread(killable_kafka.restart)

    consumer = AIOKafkaConsumer(bootstrap_servers=_address(killable_kafka.url), auto_offset_reset="earliest")
    async with consumer:
        consumer.assign([TopicPartition(topic_name, 0)])
        record = await asyncio.wait_for(consumer.getone(), 20)
    assert record.value == b"apple"


async def test_a_server_restarted_in_a_worker_thread_outlives_that_thread(
    killable_postgresql: PostgresqlServer,
) -> None:
    def restart_in_a_loop_of_its_own() -> None:
        asyncio.run(asyncio.to_thread(killable_postgresql.restart))

    await asyncio.to_thread(restart_in_a_loop_of_its_own)
    POSTGRESQL.ping(killable_postgresql.url)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("postgresql", signal.SIGKILL),
        ("postgresql", signal.SIGTERM),
        ("postgresql", signal.SIGINT),
        ("mariadb", signal.SIGKILL),
        ("mariadb", signal.SIGINT),
        ("kafka", signal.SIGKILL),
    ],
)
def test_nothing_is_left_running_when_the_runner_ends(
    name: str, end: signal.Signals, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(name)  # or skip
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=REPOSITORY,
    )
    with runner:
        assert runner.stdout is not None
        started = json.loads(runner.stdout.readline())
        if "pid" not in started:
            pytest.skip("a container's end is the business of Docker and testcontainers")
        server = psutil.Process(started["pid"])
        tree = [server, *server.children(recursive=True)]
        runner.send_signal(end)

    assert wait_until(lambda: not any(_runs(process) for process in tree), 20)
    if end is signal.SIGINT:
        assert not Path(started["folder"]).exists()


@pytest.mark.usefixtures("postgresql")  # or skip
def test_make_services_leaves_servers_running_and_stops_them(tmp_path: Path) -> None:
    # A copy, so that servers that a developer has running are not touched.
    copy = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "tests" / "services", copy / "tests" / "services")
    (copy / "tests" / "__init__.py").touch()

    def run(command: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "tests.services", command, "postgresql"],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert result.returncode == (1 if command == "status" else 0)
        return result.stdout

    try:
        exported = run("start")
        variable, _, url = exported.strip().removeprefix("export ").partition("=")
        assert variable == "OUTBOX_TEST_POSTGRESQL_URL"
        POSTGRESQL.ping(url)
        assert run("start") == exported
    finally:
        assert run("stop") == ""
    assert run("status") == ""
    with pytest.raises(psycopg.OperationalError):
        POSTGRESQL.ping(url)


@contextmanager
def _mariadb(url: str) -> Iterator[Any]:
    address = urlsplit(url)
    connection = pymysql.connect(
        host=address.hostname,
        port=address.port,
        user=address.username,
        database=address.path.lstrip("/"),
        autocommit=True,
    )
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        if connection.open:
            connection.close()


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _address(url: str) -> str:
    return urlsplit(url).netloc


@asynccontextmanager
async def _admin(url: str) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=_address(url))
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()
