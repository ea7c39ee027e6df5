"""What is removed, kept in a file: JSON Lines.

A row is on the disk before the transaction that deletes it commits. A crash in between leaves it in both, and the next run
writes it again: the file may hold a row twice, it never lacks one.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
import sys
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, Final, Self

from outbox.errors import ConfigurationError

if sys.platform != "win32":  # which has no such lock: one cleanup at a time is the user's to see to there
    import fcntl

BEGINS: Final = b'{"table": '
TAIL: Final = 1 << 24  # bytes looked at for the beginning of a last line that is torn


class Archive:
    """An open file to which rows are appended. Only its owner may read one that is made here: it holds payloads.

    Raises `ConfigurationError` where the file cannot be used: not writable, another's, locked by another cleanup.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._cannot(error) from error
        try:
            self._lock()
            self._mend()
            _sync_folder(path)
        except BaseException as error:
            os.close(self._file)
            if isinstance(error, OSError):
                raise self._cannot(error) from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._file)

    def write(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows and have them on the disk. Where that fails, what was written of them is taken back, so that the last
        line stays whole."""
        lines = b"".join(json.dumps({"table": table, **row}, default=_plain).encode() + b"\n" for row in rows)
        before = os.fstat(self._file).st_size
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, before)
            raise self._cannot(error) from error

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"archive {self.path}: another cleanup writes to it") from None

    def _mend(self) -> None:
        """Cut off a last line that was torn by a crash: its row was not deleted, and comes again."""
        size = os.fstat(self._file).st_size
        tail = os.pread(self._file, min(size, TAIL), max(0, size - TAIL))
        if not tail or tail.endswith(b"\n"):
            return
        torn = tail[tail.rfind(b"\n") + 1 :]
        if not (torn.startswith(BEGINS) or BEGINS.startswith(torn)):
            raise ConfigurationError(f"archive {self.path}: it does not end with a line of ours; name another file")
        os.ftruncate(self._file, size - len(torn))

    def _cannot(self, error: OSError) -> ConfigurationError:
        reason = error.strerror or type(error).__name__
        return ConfigurationError(f"archive {self.path}: {reason}. What it does not hold was not removed")


def _sync_folder(path: str) -> None:
    """A new file's name is on the disk too."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _plain(value: Any) -> Any:
    if isinstance(value, (bytes, memoryview)):
        return base64.b64encode(value).decode()
    if isinstance(value, dt.datetime):
        return value.isoformat()
    if isinstance(value, uuid.UUID):
        return str(value)
    raise TypeError(type(value).__name__)
