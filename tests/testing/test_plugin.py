"""The pytest plugin of a project that does not use it must be as if it were not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_it_is_loaded_and_imports_no_consumer_no_transport_and_no_driver(tmp_path: Path) -> None:
    (tmp_path / "test_of_a_project.py").write_text(
        "import sys\n"
        "def test_loaded(request):\n"
        "    assert request.config.pluginmanager.has_plugin('outbox')\n"
        "    rooms = ('outbox.consumer', 'outbox.relay', 'outbox.transports', 'outbox.stores')\n"
        "    drivers = ('msgspec', 'psycopg', 'aiokafka', 'sqlalchemy.ext.asyncio')\n"
        "    heavy = [name for name in sys.modules if name.startswith(rooms + drivers)]\n"
        "    assert heavy == []\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout


def test_its_fixtures_are_listed_with_what_they_do(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--fixtures", "-q", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "outbox_capture" in result.stdout
    assert "outbox_drain" in result.stdout
