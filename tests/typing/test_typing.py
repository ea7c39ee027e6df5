"""The types of the public face, seen by the two checkers that users have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
USAGE = HERE / "usage.py"
ROOT = HERE.parent.parent

CHECKERS = {
    "mypy": ["--strict", "--warn-unused-ignores", "--no-incremental", "--config-file=", str(USAGE)],
    "pyright": ["--pythonpath", sys.executable, str(USAGE)],
}


@pytest.mark.timeout(600)  # pyright may have to unpack its node first
@pytest.mark.parametrize("checker", CHECKERS)
def test_what_users_write_has_the_types_that_they_expect(checker: str) -> None:
    pytest.importorskip(checker)
    command = [sys.executable, "-m", checker, *CHECKERS[checker]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
