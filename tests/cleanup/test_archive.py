"""What is removed is in the file first: whatever happens in between, it is never in neither."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from outbox import ConfigurationError
from outbox.cleanup.archive import Archive
from tests.cleanup.past import buried, cleanup, handled, ids
from tests.relay.database import Database

REPOSITORY = Path(__file__).resolve().parents[2]

# argv: database, file. Dies once the rows are in the file, before they are deleted.
KILLED = """
import os, signal, sys
from outbox import Outbox
from outbox.cleanup import Cleanup, _cleanup
from outbox.cleanup.archive import Archive
write = Archive.write
lives = [3]
def kill(self, table, rows):
    write(self, table, rows)
    lives[0] -= 1
    if not lives[0]:
        os.kill(os.getpid(), signal.SIGKILL)
Archive.write = kill
_cleanup.time.sleep = lambda seconds: None
Cleanup(Outbox(), database=sys.argv[1], rows=5).run(archive=sys.argv[2])
"""

# A file may grow to argv[3] bytes: then writing fails, as on a full disk.
FULL = """
import resource, signal, sys
from outbox import ConfigurationError, Outbox
from outbox.cleanup import Cleanup, _cleanup
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with open(sys.argv[2], "a"):
    pass
_cleanup.time.sleep = lambda seconds: None
from outbox.cleanup.archive import Archive
write = Archive.write
def limited(self, table, rows):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
    try:
        write(self, table, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
Archive.write = limited
try:
    Cleanup(Outbox(), database=sys.argv[1], rows=5).run(archive=sys.argv[2])
except ConfigurationError as error:
    print(error)
    sys.exit(7)
"""


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_each_row_is_a_line_with_its_table_and_bytes_in_base64(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "gone.jsonl"
    (old,) = handled(database, 40)
    letter = buried(database, old, "discarded", days=30)
    cleanup(database).run(archive=str(file))
    first, second = lines(file)
    assert (first["table"], first["id"], first["state"]) == ("outbox_dead_letter", str(letter), "discarded")
    assert base64.b64decode(first["payload"]) == b"\x00\xff"
    assert (second["table"], second["message_id"], second["outcome"]) == ("outbox_inbox", str(old), "done")
    assert second["processed_at"].endswith("+00:00")
    assert file.stat().st_mode & 0o777 == 0o600
    handled(database, 50)
    cleanup(database).run(archive=str(file))
    assert len(lines(file)) == 3


def test_a_kill_between_the_file_and_the_delete_may_double_a_row_and_loses_none(
    database: Database, tmp_path: Path
) -> None:
    file = tmp_path / "gone.jsonl"
    old = handled(database, 40, *(uuid.uuid4() for _ in range(40)))
    killed = run(KILLED, database.url, str(file))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = ids(database, "inbox")
    kept = {uuid.UUID(line["message_id"]) for line in lines(file)}
    assert kept | left == set(old)
    assert len(kept & left) == 5  # the batch that was in the file and not deleted yet
    cleanup(database).run(archive=str(file))
    assert {uuid.UUID(line["message_id"]) for line in lines(file)} == set(old)
    assert database.count("inbox") == 0


def test_a_full_disk_deletes_nothing_and_leaves_whole_lines(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "gone.jsonl"
    old = handled(database, 40, *(uuid.uuid4() for _ in range(40)))
    full = run(FULL, database.url, str(file), "3000")
    assert full.returncode == 7, full.stderr
    assert "What it does not hold was not removed" in full.stdout
    kept = {uuid.UUID(line["message_id"]) for line in lines(file)}
    assert kept
    assert kept | ids(database, "inbox") == set(old)
    assert not kept & ids(database, "inbox")


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "gone.jsonl"
    file.write_bytes(b'{"table": "a", "n": 1}\n{"table": "outbox_in')
    with Archive(str(file)) as archive:
        archive.write("b", [{"n": 2}])
    assert lines(file) == [{"table": "a", "n": 1}, {"table": "b", "n": 2}]


def test_what_is_no_archive_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "letter.txt"
    file.write_text("dear ada")
    with pytest.raises(ConfigurationError, match="does not end with a line of ours"):
        Archive(str(file))
    assert file.read_text() == "dear ada"


def test_two_cleanups_do_not_write_to_one_file(tmp_path: Path) -> None:
    file = str(tmp_path / "gone.jsonl")
    with Archive(file), pytest.raises(ConfigurationError, match="another cleanup writes to it"):
        Archive(file)
    with Archive(file):
        pass


def test_a_file_that_cannot_be_made_is_said_and_nothing_is_removed(on_sqlite: Database, tmp_path: Path) -> None:
    handled(on_sqlite, 40)
    with pytest.raises(ConfigurationError, match="No such file or directory"):
        cleanup(on_sqlite).run(archive=os.path.join(tmp_path, "nowhere", "gone.jsonl"))
    assert on_sqlite.count("inbox") == 1
