"""Every snippet of the guide is run, in the order in which a reader meets them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.test_readme import ROOT, SNIPPET

GUIDE = (ROOT / "docs" / "guide.md").read_text()
SNIPPETS = dict(SNIPPET.findall(GUIDE))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in SNIPPETS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def python(folder: Path, *words: str) -> None:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in SNIPPETS if name.startswith("app/")])
def test_a_module_of_the_guide_runs(name: str, folder: Path) -> None:
    python(folder, "-m", name.removesuffix(".py").replace("/", "."))


def test_the_test_of_the_guide_passes(folder: Path) -> None:
    python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_orders.py")


def test_every_python_example_is_run_but_the_revision() -> None:
    assert len(re.findall("^```python", GUIDE, re.MULTILINE)) == len(SNIPPETS) + 1
