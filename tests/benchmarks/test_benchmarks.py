"""The benchmarks run, and say what they measured in one form. How fast it was is not this test's to judge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_each_benchmark_prints_one_json_object_a_figure(
    postgresql: object, mariadb: object, kafka: object, rabbitmq: object, elasticmq: object
) -> None:
    # the fixtures only make sure that the servers can be had; the benchmark starts its own, with fsync
    names = ("add", "relay", "stores", "cleanup", "transports")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *names, "--quick", "--repeat", "1", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stderr
    figures = {line["figure"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert {
        "add.orm.messages1",
        "add.orm.messages10",
        "add.many.messages100",
        "relay.bare.read_delete.keys1000.rows100000",
        "relay.bare.publish.keys1000.rows100000",
        "relay.postgresql.kafka.keys1000.rows100000",
        "relay.memory.rows1000000",
        "relay.idle.poll20ms",
        "stores.postgresql.read_delete",
        "stores.postgresql.read_delete.pipelined",
        "stores.postgresql.read_delete.backlog1000000",
        "stores.postgresql.read_delete.backlog1000000.snapshot_held",
        "stores.mariadb.read_delete",
        "stores.sqlite.read_delete",
        "stores.aiosqlite.read_delete",
        "stores.transaction.psycopg.message",
        "stores.transaction.asyncpg.message",
        "stores.transaction.pymysql.message",
        "stores.transaction.asyncmy.message",
        "stores.transaction.sqlite3.message",
        "stores.transaction.postgresql.wal.message",
        "stores.postgresql.transactions.clients16.message",
        "stores.mariadb.transactions.clients16.message",
        "stores.postgresql.cleanup.relay.beside",
        "stores.postgresql.cleanup.consumer.beside",
        "stores.postgresql.cleanup.rows1000000",
        *(
            f"transports.{one}.{what}"
            for one in ("kafka", "rabbitmq", "sqs", "local", "memory")
            for what in ("publish", "consume")
        ),
    } <= figures.keys()
    for figure in figures.values():
        # what a message costs is a difference of two times, and in a run this quick it may come out below zero
        assert figure["value"] > 0 or figure["figure"].startswith(("add.orm", "stores.transaction"))
        assert figure["unit"]
        assert ("reference" in figure) == ("ratio" in figure)


def test_a_benchmark_that_does_not_exist_is_named_with_those_that_do() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nonsense"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert "relay" in done.stderr
