"""Every snippet of the README is run, in the order in which a newcomer meets them."""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from outbox import Outbox
from outbox._message import bucket_of
from tests.services.waiting import wait_until

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPET = re.compile(r"<!-- snippet: (\S+) -->\n```\w*\n(.*?)```", re.DOTALL)
BIN = Path(sys.executable).parent


def snippets() -> dict[str, str]:
    return dict(SNIPPET.findall(README))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds the README's modules, and whose place.py has been run."""
    for name, text in snippets().items():
        if name.endswith(".py"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
    subprocess.run([sys.executable, "-m", "shop.place"], cwd=tmp_path, check=True, timeout=60)
    return tmp_path


@pytest.fixture
def processes(folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """The README's relay and consumer, running."""
    started = []
    for number, line in enumerate(snippets()["shell"].strip().splitlines()):
        with (folder / f"process{number}.log").open("w") as log:
            command = [str(BIN / "outbox"), *shlex.split(line)[1:]]
            started.append(subprocess.Popen(command, cwd=folder, stderr=log, text=True))
    yield started
    for process in started:
        process.kill()
        process.wait()


def count(folder: Path, query: str) -> int:
    with sqlite3.connect(folder / "shop.db", timeout=10) as connection:
        return int(connection.execute(query).fetchone()[0])


def outbox(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    arguments = shlex.split(line, comments=True)[1:]
    return subprocess.run([str(BIN / "outbox"), *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


def test_the_first_message_has_its_effect_once_and_the_operator_sees_it(
    folder: Path, processes: list[subprocess.Popen[str]]
) -> None:
    logs = lambda: "\n".join(file.read_text() for file in folder.glob("*.log"))  # noqa: E731
    assert wait_until(lambda: count(folder, "select count(*) from charges") == 1, 30), logs()
    assert wait_until(lambda: count(folder, "select count(*) from outbox_message") == 0, 30), logs()

    # something for the operator to look at: bytes that no handler can read
    engine = sa.create_engine(f"sqlite:///{folder}/shop.db")
    with engine.begin() as connection:
        Outbox().add(connection, "orders", b"not JSON", type="order.placed", key="1")
    engine.dispose()
    assert wait_until(lambda: count(folder, "select count(*) from outbox_dead_letter") == 1, 30), logs()

    status, trace, groups, replay = snippets()["operator"].strip().splitlines()
    said = outbox(folder, status)
    assert said.returncode == 0, said.stderr
    assert "1 dead letter is open" in said.stdout
    said = outbox(folder, trace)
    assert said.returncode == 0, said.stderr
    assert "dead letter of billing" in said.stdout
    said = outbox(folder, groups + " --json" if "#" not in groups else groups.split("#")[0] + " --json")
    assert said.returncode == 0, said.stderr
    (group,) = json.loads(said.stdout)
    assert group["reason"] == "undeserializable"
    said = outbox(folder, re.sub(r"--group \w+", f"--group {group['fingerprint']}", replay))
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith("Would replay 1 dead letter.\n1 to consumer billing alone")

    for process in processes:
        process.terminate()
    assert [process.wait(30) for process in processes] == [0, 0], logs()
    assert count(folder, "select count(*) from charges") == 1


def test_the_commands_that_the_readme_names_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_of_readme_and_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_files_that_docs_name_exist() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for name in re.findall(r"`((?:outbox|tests|migrations|integrations|docs)/[\w/.]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_a_row_written_by_hand_as_the_table_page_says_is_one_of_ours() -> None:
    text = (ROOT / "docs" / "table.md").read_text()
    (id, bucket, key) = re.search(r"values \('([\w-]+)', (\d+), 'orders', '(\w+)'", text).groups()  # type: ignore[union-attr]
    assert bucket_of(key, uuid.UUID(id)) == int(bucket)
