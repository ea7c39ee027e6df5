"""Every snippet of the guide is run, in the order in which a reader meets them."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from outbox import Outbox
from tests.acceptance.test_readme import ROOT, SNIPPET
from tests.services.fixtures import INSTALL_TIMEOUT

GUIDE = (ROOT / "docs" / "guide.md").read_text()
SNIPPETS = dict(SNIPPET.findall(GUIDE))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in SNIPPETS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def python(folder: Path, *words: str) -> None:
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "shop.settings"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in SNIPPETS if name.startswith("app/")])
def test_a_module_of_the_guide_runs(name: str, folder: Path) -> None:
    python(folder, "-m", name.removesuffix(".py").replace("/", "."))


def test_the_test_of_the_guide_passes(folder: Path) -> None:
    python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_orders.py")


@pytest.mark.timeout(INSTALL_TIMEOUT)
def test_the_modules_of_the_guide_that_have_no_session_run(folder: Path, postgresql_url: str) -> None:
    with psycopg.connect(postgresql_url) as connection:
        connection.execute("create table shop_order (id integer, total integer)")
        connection.execute(Outbox().ddl("postgresql").encode())
    names = [name for name in SNIPPETS if name.startswith("raw/")]
    for name in names:
        (folder / name).write_text(SNIPPETS[name].replace("postgresql://app@db/app", postgresql_url))
        python(folder, "-m", name.removesuffix(".py").replace("/", "."))
    with psycopg.connect(postgresql_url) as connection:
        for table in ("shop_order", "outbox_message"):
            assert connection.execute(f"select count(*) from {table}".encode()).fetchone() == (len(names),)


DJANGO = {
    "shop/__init__.py": "",
    "shop/settings.py": """
INSTALLED_APPS = ["shop"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.db"}}
""",
    "shop/models.py": """
from django.db import models


class Order(models.Model):
    id = models.BigAutoField(primary_key=True)
    total = models.IntegerField()
""",
    "shop/migrations/__init__.py": "",
}


def test_the_django_app_of_the_guide_migrates_and_places_an_order(folder: Path) -> None:
    for name, text in DJANGO.items():
        (folder / name).write_text(text)
    ours = folder / "shop/migrations/0002_outbox.py"
    ours.rename(folder / "0002_outbox.py")
    python(folder, "-m", "django", "makemigrations", "shop")
    (folder / "0002_outbox.py").rename(ours)
    python(folder, "-m", "django", "migrate")
    python(folder, "-m", "django", "shell", "-c", "import shop.place")
    with closing(sqlite3.connect(folder / "shop.db")) as connection:
        assert connection.execute("select key from outbox_message").fetchall() == [("1",)]
        assert connection.execute("select total from shop_order").fetchall() == [(1990,)]


def test_every_python_example_is_run_but_the_revision() -> None:
    assert len(re.findall("^```python", GUIDE, re.MULTILINE)) == len(SNIPPETS) + 1
