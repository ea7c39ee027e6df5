"""The examples, as their READMEs say to run them: real processes, a real request, followed to its effect."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from outbox.transports import open_transport
from tests.services.process import free_port
from tests.services.waiting import wait_until

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WITHIN = 60.0  # seconds, on a loaded machine

ORDER = {"customer": "ada", "total": "12.50"}


class Shop:
    """One example in a folder of its own, with the commands of its README."""

    def __init__(self, example: str, folder: Path, **environment: str) -> None:
        self.readme = (EXAMPLES / example / "README.md").read_text()
        self.folder = folder
        clean = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
        path = f"{Path(sys.executable).parent}:{clean['PATH']}"
        # the example's package is found where it is; what it writes is ours
        package = str(EXAMPLES / example)
        self.environment = {**clean, "PATH": path, "PYTHONPATH": package, "PYTHONUNBUFFERED": "1", **environment}
        self.port = free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=10)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, command: str, *more: str) -> str:
        """A command of the README that ends by itself; returns what it printed."""
        done = subprocess.run(
            self._words(command, more),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=WITHIN,
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def start(self, command: str, *more: str) -> None:
        """A command of the README that goes on."""
        with (self.folder / f"{len(self.processes)}.log").open("wb") as log:
            self.processes[command] = subprocess.Popen(
                self._words(command, more), cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )

    def _words(self, command: str, more: tuple[str, ...]) -> list[str]:
        assert re.search(rf"^{re.escape(command)}( &)?$", self.readme, re.M), f"the README does not say {command!r}"
        return [*shlex.split(command), *more]

    def until(self, condition: Any) -> None:
        def alive_and_so() -> bool:
            for command, process in self.processes.items():
                assert process.poll() is None, f"{command} ended with status {process.returncode}\n{self.logs()}"
            return bool(condition())

        assert wait_until(alive_and_so, WITHIN), self.logs()

    def answers(self) -> bool:
        try:
            return self.client.get("/orders/0").status_code == 404
        except httpx.TransportError:
            return False

    def order(self) -> str:
        """Place an order, and follow it until it was charged."""
        self.until(self.answers)
        placed = self.client.post("/orders", json=ORDER)
        assert placed.status_code == 201, self.logs()
        url = f"/orders/{placed.json()['id']}"
        self.until(lambda: self.client.get(url).json()["charged"] is not None)
        charged: str = self.client.get(url).json()["charged"]
        return charged

    def stop(self) -> dict[str, int]:
        """SIGTERM to each, the last one started first; returns the exit statuses."""
        for process in reversed(self.processes.values()):
            process.terminate()
            process.wait(WITHIN)
        return {command: process.returncode for command, process in self.processes.items()}

    def logs(self) -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        self.client.close()
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture
def flask_shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(
        "flask_shop", tmp_path, SHOP_DATABASE=f"sqlite:///{tmp_path}/shop.db", OUTBOX_TRANSPORT="local:broker.db"
    )
    yield shop
    shop.close()


@pytest.fixture
def django_shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(
        "django_shop",
        tmp_path,
        DJANGO_SETTINGS_MODULE="shop.settings",
        OUTBOX_DATABASE="sqlite:///shop.db",
        OUTBOX_TRANSPORT="local:broker.db",
    )
    yield shop
    shop.close()


@pytest.fixture
def fastapi_shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(
        "fastapi_shop", tmp_path, OUTBOX_DATABASE="sqlite+aiosqlite:///shop.db", OUTBOX_TRANSPORT="local:broker.db"
    )
    yield shop
    shop.close()


@pytest.fixture
def fastapi_shop_on_servers(tmp_path: Path, postgresql_url: str, kafka_url: str) -> Iterator[Shop]:
    topic = f"shop-orders-{uuid.uuid4().hex[:8]}"

    async def create_topic() -> None:
        transport = open_transport(kafka_url)
        try:
            await transport.connect()
            await transport.declare([topic])
        finally:
            await transport.close()

    asyncio.run(create_topic())
    database = postgresql_url.replace("postgresql:", "postgresql+psycopg:")
    shop = Shop("fastapi_shop", tmp_path, OUTBOX_DATABASE=database, OUTBOX_TRANSPORT=kafka_url, SHOP_TOPIC=topic)
    yield shop
    shop.close()


def test_the_flask_shop_charges_for_an_order(flask_shop: Shop) -> None:
    shop = flask_shop
    shop.run("flask --app shop create-tables")
    shop.start("flask --app shop run", "--port", str(shop.port))
    shop.start("flask --app shop outbox relay")
    shop.start("flask --app shop outbox consume shop.billing:billing")
    assert shop.order() == "12.50"
    assert json.loads(shop.run("flask --app shop outbox status", "--json"))["inbox"] == 1
    assert shop.stop() == {
        "flask --app shop run": -signal.SIGTERM,  # the development server knows no other end
        "flask --app shop outbox relay": 0,
        "flask --app shop outbox consume shop.billing:billing": 0,
    }


def test_the_django_shop_charges_for_an_order(django_shop: Shop) -> None:
    shop = django_shop
    shop.run("python -m django migrate")
    shop.start("python -m django runserver --noreload", f"127.0.0.1:{shop.port}")
    shop.start("outbox relay --app shop.messaging:outbox")
    shop.start("outbox consume shop.billing:billing")
    assert shop.order() == "12.50"
    status = json.loads(shop.run("outbox status --app shop.messaging:outbox", "--json"))
    assert (status["pending"], status["dead_letters"], status["inbox"]) == (0, 0, 1)
    assert shop.client.post("/orders", json={**ORDER, "total": "much"}).status_code == 400
    assert shop.stop() == {
        "python -m django runserver --noreload": -signal.SIGTERM,  # the development server knows no other end
        "outbox relay --app shop.messaging:outbox": 0,
        "outbox consume shop.billing:billing": 0,
    }


def test_the_fastapi_shop_charges_for_an_order(fastapi_shop: Shop) -> None:
    charge_for_an_order(fastapi_shop)


def test_the_fastapi_shop_charges_for_an_order_on_postgresql_and_kafka(fastapi_shop_on_servers: Shop) -> None:
    charge_for_an_order(fastapi_shop_on_servers)


def charge_for_an_order(shop: Shop) -> None:
    shop.run("python -m shop.create_tables")
    shop.start("uvicorn shop.app:app", "--port", str(shop.port))
    shop.start("outbox consume shop.billing:billing")
    assert shop.order() == "12.50"
    assert shop.client.get("/health").json() == {}
    status = json.loads(shop.run("outbox status --app shop.messaging:outbox", "--json"))
    assert (status["pending"], status["dead_letters"], status["inbox"]) == (0, 0, 1)
    assert shop.stop() == {
        "uvicorn shop.app:app": -signal.SIGTERM,  # uvicorn has shut down in order, then says what made it
        "outbox consume shop.billing:billing": 0,
    }
    assert "Application shutdown complete" in shop.logs()
    assert "Traceback" not in shop.logs()


def test_an_order_that_is_refused_leaves_no_message(fastapi_shop: Shop) -> None:
    shop = fastapi_shop
    shop.run("python -m shop.create_tables")
    shop.start("uvicorn shop.app:app", "--port", str(shop.port))
    shop.until(shop.answers)
    assert shop.client.post("/orders", json={**ORDER, "total": "-1"}).status_code == 422
    status = json.loads(shop.run("outbox status --app shop.messaging:outbox", "--json"))
    assert status["verdict"] == "Nothing waits to be sent."
