"""The example with an Alembic history of its own, by each of its three ways, with the commands of its README."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.migrations.project import mysql_url

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "alembic_shop"
WITHIN = 120  # seconds, on a loaded machine

# Commands one after the other in one process, as the shell would run each in its own: a second sooner each.
DRIVER = """\
import json, runpy, sys
from alembic.config import main as alembic
from outbox.cli import main as outbox

for words in json.loads(sys.argv[1]):
    if words[0] == "cp":
        import shutil
        for file in words[1:-1]:
            shutil.copy(file, words[-1])
    elif words[0] == "alembic":
        alembic(argv=words[1:])
    elif words[0] == "outbox":
        assert outbox(words[1:]) == 0, words
    else:
        runpy.run_module(words[2], run_name="__main__")
"""

AUTOGENERATE = (
    "alembic revision --autogenerate -m outbox --rev-id 0004",
    "alembic upgrade head",
    "alembic check",
)
BY_HAND = (
    "cp by_hand/0004_outbox.py by_hand/0005_outbox_2.py alembic/versions/",
    "alembic upgrade head",
    "alembic check",
)
MIGRATE = (
    "outbox migrate --app shop.messaging:outbox --dry-run",
    "outbox migrate --app shop.messaging:outbox",
    "alembic check",
)
THEN = ("python -m shop.place", "outbox status --app shop.messaging:outbox")
BACK = "alembic downgrade 0003"
WAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "autogenerate": (AUTOGENERATE, BACK),
    "by hand": (BY_HAND, BACK),
    "migrate": (MIGRATE, "outbox migrate --app shop.messaging:outbox --to 0 --downgrade"),
}


class Project:
    """A copy of the example, on one database."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder / "shop"
        shutil.copytree(EXAMPLE, self.folder, ignore=shutil.ignore_patterns("__pycache__", "*.db"))
        self.readme = (EXAMPLE / "README.md").read_text()
        self.engine = sa.create_engine(url)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("OUTBOX_", "PYTEST"))}
        path = f"{Path(sys.executable).parent}:{clean['PATH']}"
        self.environment = {**clean, "PATH": path, "PYTHONPATH": str(self.folder), "OUTBOX_DATABASE": url}

    def run(self, *commands: str) -> str:
        """Commands of the README, which end by themselves; returns what they printed."""
        for command in commands:
            assert re.search(rf"^{re.escape(command)}$", self.readme, re.M), f"the README does not say {command!r}"
        words = [shlex.split(command) for command in commands]
        if self.engine.dialect.name == "sqlite":
            return "".join(self._process(one) for one in words)
        return self._process([sys.executable, "-W", "error", "-c", DRIVER, json.dumps(words)])

    def _process(self, words: list[str]) -> str:
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=WITHIN
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def tables(self) -> set[str]:
        return set(sa.inspect(self.engine).get_table_names())

    def orders(self) -> list[tuple[int, int, int]]:
        with self.engine.connect() as connection:
            rows = connection.execute(sa.text("select customer_id, total, paid from orders order by id"))
            return [tuple(row) for row in rows]

    def waiting(self) -> int:
        with self.engine.connect() as connection:
            return connection.scalar(sa.text("select count(*) from outbox_message")) or 0


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Project]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/shop.db"
    else:
        given = request.getfixturevalue(f"{request.param}_url")
        made = (
            mysql_url(given) if request.param == "mariadb" else sa.make_url(given).set(drivername="postgresql+psycopg")
        )
        url = made.render_as_string(hide_password=False)
    found = Project(tmp_path, url)
    yield found
    found.engine.dispose()


@pytest.mark.parametrize("way", WAYS)
def test_the_outbox_goes_into_an_alembic_history_and_out_of_it_again(project: Project, way: str) -> None:
    there, back = WAYS[way]
    before = [(1, 1990, 1), (2, 250, 0)]
    project.run("alembic upgrade 0003")
    assert project.orders() == before
    shop = project.tables()

    printed = project.run(*there, *THEN)
    assert "No new upgrade operations detected." in printed
    assert "order 3 of ada" in printed
    assert "pending               1" in printed
    assert project.orders() == [*before, (1, 700, 0)]
    assert project.waiting() == 1
    assert len(project.tables() - shop) == 11

    project.run(back)
    assert project.tables() == shop
    assert project.orders() == [*before, (1, 700, 0)]

    # and in again, where there is nothing to generate or copy any more
    again = [command for command in there if "autogenerate" not in command and not command.startswith("cp ")]
    assert "No new upgrade operations detected." in project.run(*again)
    assert project.orders() == [*before, (1, 700, 0)]
    assert project.waiting() == 0
