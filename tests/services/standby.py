"""A standby of a PostgreSQL server: it answers, and writes nothing until it is promoted."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path
from signal import SIGINT
from urllib.parse import urlsplit, urlunsplit

import psycopg

from tests.services.postgresql import Postgresql, PostgresqlServer
from tests.services.process import LocalProcess, free_port, new_folder
from tests.services.service import Control, Options, Unavailable

# What a base backup leaves out.
NOT_COPIED = ("postmaster.pid", "postmaster.opts", "pg_wal", "pg_replslot", "pgsql_tmp")
EMPTY = ("pg_wal/archive_status", "pg_replslot")


class Standby(Postgresql):
    """Of a server that runs here: its data are copied as a base backup does it, with no program that only some have."""

    name = "standby"
    how_to_get = "have PostgreSQL of this machine's own run: no Docker, no OUTBOX_TEST_POSTGRESQL_URL"

    def __init__(self, primary: PostgresqlServer) -> None:
        super().__init__()
        self._primary = primary

    def docker(self, options: Options) -> tuple[str, Control]:
        raise Unavailable("a standby runs beside a primary of this machine")

    def local(self, options: Options) -> tuple[str, Control]:
        primary = self._primary.control
        if not isinstance(primary, LocalProcess):
            raise Unavailable("the primary does not run as a process of this machine")
        folder = new_folder(self.name, detached=options.detached, user=primary.user)
        port, address = free_port(), urlsplit(self._primary.url)
        self._copy(primary.folder / "data", folder / "data")
        with (folder / "data" / "postgresql.conf").open("a") as file:
            file.write(f"port = {port}\nhot_standby = on\n")
            file.write(f"primary_conninfo = 'host={address.hostname} port={address.port} user={address.username}'\n")
        (folder / "data" / "standby.signal").touch()
        _give(folder, primary.user)
        control = LocalProcess(
            primary.command, folder, user=primary.user, stop_signal=SIGINT, detached=options.detached
        )
        netloc = f"{address.username}@127.0.0.1:{port}"
        return urlunsplit(address._replace(netloc=netloc)), control

    def _copy(self, source: Path, target: Path) -> None:
        with psycopg.connect(self._primary.url, autocommit=True) as connection:
            new = connection.info.server_version >= 150_000
            start = "pg_backup_start('standby', true)" if new else "pg_start_backup('standby', true, false)"
            stop = "pg_backup_stop(false)" if new else "pg_stop_backup(false, false)"
            connection.execute(f"SELECT {start}")
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_COPIED), copy_function=_copy_if_there)
            label = connection.execute(f"SELECT labelfile FROM {stop}").fetchone()
        assert label is not None
        for name in EMPTY:
            (target / name).mkdir(parents=True)
        (target / "backup_label").write_text(label[0])


def _copy_if_there(source: str, target: str) -> str:
    try:
        return shutil.copy2(source, target)
    except FileNotFoundError:  # dropped since it was listed, which the WAL repeats
        return target


def _give(folder: Path, user: str | None) -> None:
    (folder / "data").chmod(0o700)
    if user is None:
        return
    account = pwd.getpwnam(user)
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, account.pw_uid, account.pw_gid)
