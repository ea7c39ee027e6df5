"""What people install: the wheel, alone in an empty environment, and the sdist that builds the same wheel."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from outbox._version import __version__

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("outbox", "outbox_fastapi", "outbox_flask", "outbox_migrations")

pytestmark = pytest.mark.timeout(600)

NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", ".services", "dist", "build", "__pycache__", ".*_cache", ".hypothesis"
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as it is now, so that both builds see the same."""
    copy = tmp_path_factory.mktemp("source") / "pyoutbox"
    shutil.copytree(REPOSITORY, copy, ignore=NOT_COPIED)
    return copy


def build(source: Path, kind: str, into: Path) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--outdir", str(into), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=into)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = into.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of an environment in which the wheel was installed without extras, in an empty folder."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    install: list[str | Path] = [
        programs / "python",
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        str(wheel),
    ]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "empty").mkdir()

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        clean = {"PATH": str(programs), "PYTHONWARNINGS": "error"}
        return subprocess.run(
            [programs / program, *arguments],
            cwd=folder / "empty",
            env=clean,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def says(bare: Run, script: str) -> str:
    done = bare("python", "-c", script)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.strip()


# ---------------------------------------------------------------- what is in them


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {*PACKAGES, f"pyoutbox-{__version__}.dist-info"}
    assert not [name for name in names if "test_" in name or "__pycache__" in name]
    for package in PACKAGES:
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    assert f"pyoutbox-{__version__}.dist-info/licenses/LICENSE" in names


def test_every_module_of_the_tree_is_in_the_wheel(source: Path, wheel: Path) -> None:
    roots = {"outbox": source, "outbox_migrations": source / "migrations"}
    expected = {
        str(file.relative_to(root))
        for package in PACKAGES
        for root in [roots.get(package, source / "integrations")]
        for file in (root / package).rglob("*.py")
    }
    with zipfile.ZipFile(wheel) as archive:
        assert expected == {name for name in archive.namelist() if name.endswith(".py")}


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "wheel").mkdir()
    assert contents(build(unpacked, "wheel", tmp_path / "wheel")) == contents(wheel)


def test_the_sdist_holds_what_a_packager_tests_with(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {
        "outbox",
        "migrations",
        "integrations",
        "tests",
        "examples",
        "pyproject.toml",
        "LICENSE",
        "README.md",
    } <= top
    assert not top & {".venv", ".git", "dist"}


def contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


# ---------------------------------------------------------------- without extras


def test_it_imports_without_extras_and_without_warnings(bare: Run) -> None:
    assert says(bare, "import outbox, outbox_migrations; print(outbox.__version__)") == __version__


def test_every_public_name_can_be_had_without_extras(bare: Run) -> None:
    assert says(bare, "import outbox; print(*[getattr(outbox, name).__name__ for name in ('Relay', 'Consumer')])")
    assert says(bare, "from outbox import *; from outbox_migrations import *; print(Outbox, upgrade)")


def test_the_command_is_there_under_both_names(bare: Run) -> None:
    for done in (bare("outbox", "--version"), bare("python", "-m", "outbox", "--version")):
        assert (done.returncode, done.stdout, done.stderr) == (0, f"outbox {__version__}\n", "")


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("import outbox_flask", "outbox_flask needs Flask, which is not installed: pip install 'pyoutbox[flask]'"),
        ("from outbox_flask import Outbox", "pip install 'pyoutbox[flask]'"),
        (
            "import outbox_fastapi",
            "outbox_fastapi needs FastAPI, which is not installed: pip install 'pyoutbox[fastapi]'",
        ),
        (
            "from outbox.stores import engine_for; engine_for('postgresql://app@db/app')",
            "needs psycopg, which is not installed: pip install 'pyoutbox[postgresql]'",
        ),
        (
            "from outbox.transports import open_transport; open_transport('kafka://broker:9092')",
            "kafka:// needs aiokafka, which is not installed: pip install 'pyoutbox[kafka]'",
        ),
    ],
)
def test_what_is_missing_is_named_with_the_extra_that_brings_it(bare: Run, statement: str, message: str) -> None:
    script = (
        f"import outbox\ntry:\n    {statement}\nexcept outbox.MissingExtra as error:\n"
        "    assert isinstance(error, ImportError)\n    print(error)"
    )
    assert message in says(bare, script)


def test_the_command_names_a_missing_driver_in_a_line(bare: Run) -> None:
    done = bare("outbox", "status", "--database", "postgresql://app@db/app")
    assert done.returncode == 2
    assert done.stderr.startswith("outbox status: database 'postgresql' needs psycopg, which is not installed")
    assert "Traceback" not in done.stderr


def test_a_message_goes_from_sqlite_to_a_broker_with_nothing_else_installed(bare: Run) -> None:
    database = ("--database", "sqlite:///shop.db")
    assert bare("outbox", "migrate", *database).returncode == 0
    script = (
        "import sqlalchemy as sa\nfrom sqlalchemy.orm import Session\nfrom outbox import Outbox\noutbox = Outbox()\n"
        "engine = sa.create_engine('sqlite:///shop.db')\n"
        "with Session(engine) as session, session.begin():\n"
        "    print(outbox.add(session, 'orders', {'id': 1}, key=1).id)\n"
        "engine.dispose()"
    )
    id = says(bare, script)
    assert bare("outbox", "trace", id, *database).stdout.endswith(
        "This message is committed and waits for the relay.\n"
    )
    drained = bare("outbox", "relay", "--drain", "--transport", "local:broker.db", *database)
    assert json.loads(drained.stdout) == {"sent": 1, "parked": 0, "dead": 0}, drained.stderr
