"""MariaDB for tests, with a row binlog switched on."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pymysql

from tests.services.container import Container, require_image
from tests.services.install import debian_packages
from tests.services.process import LocalProcess, free_port, new_folder, run_as, unprivileged
from tests.services.service import Control, DatabaseServer, Options, Service, Unavailable

IMAGE = "mariadb:10.11"
# Without the package mariadb-server, which would also run a server of the system's, on port 3306.
PACKAGES = ["mariadb-server-core", "mariadb-client-core"]

SETTINGS = {
    "skip-name-resolve": "ON",
    "max_connections": "200",
    "innodb_buffer_pool_size": "64M",
    # MySQL's default, and what Galera needs: positions of statements that run side by side may interleave
    "innodb_autoinc_lock_mode": "2",
    "server_id": "1",
    "log_bin": "binlog",
    "binlog_format": "ROW",
    "binlog_row_image": "FULL",
    "binlog_row_metadata": "FULL",
    "gtid_strict_mode": "ON",
}
# The server's crash loses nothing even so: its pages are the kernel's. Only the machine's crash would.
UNSAFE_AND_QUICK = {
    "innodb_flush_log_at_trx_commit": "2",
    "innodb_flush_method": "nosync",
    "innodb_doublewrite": "OFF",
    "sync_binlog": "0",
}

PING_TIMEOUT = 3  # seconds
DROP_TIMEOUT = 2  # seconds for locks that nobody holds any more, except a prepared transaction

NO_SUCH_THREAD, LOCK_WAIT_TIMEOUT = 1094, 1205


class MariadbServer(DatabaseServer):
    """A running MariaDB or MySQL; `url` is that of its own database `mysql`, with the superuser."""

    def create_database(self, template: str | None = None) -> str:
        """Create a database with a unique name and return its URL (`mysql://root@host:port/name`).

        It is empty, or has the tables and rows of the database at the URL `template`: that costs a test some
        50 ms for ten tables, a third of creating them through SQLAlchemy.
        """
        name = f"test_{uuid.uuid4().hex[:12]}"
        with connected(self.url) as cursor:
            cursor.execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
            if template:
                cursor.execute(f"USE {name}")
                _copy(cursor, _database(template))
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))

    def drop_database(self, url: str) -> None:
        """Drop the database at `url`, with whatever a test left in it: sessions, prepared transactions."""
        name = _database(url)
        with connected(self.url) as cursor:
            cursor.execute("SELECT id FROM information_schema.processlist WHERE db = %s", [name])
            for (session,) in cursor.fetchall():
                _kill(cursor, session)
            cursor.execute(f"SET lock_wait_timeout = {DROP_TIMEOUT}, innodb_lock_wait_timeout = {DROP_TIMEOUT}")
            try:
                cursor.execute(f"DROP DATABASE {name}")
            except pymysql.OperationalError as error:
                if error.args[0] != LOCK_WAIT_TIMEOUT:
                    raise
                _roll_back_prepared(cursor)
                cursor.execute(f"DROP DATABASE {name}")


class Mariadb(Service[MariadbServer]):
    name = "mariadb"
    how_to_get = (
        "start Docker, or install MariaDB (Debian: apt install mariadb-server-core mariadb-client-core), "
        "or set OUTBOX_TEST_MARIADB_URL=mysql://root@127.0.0.1:3306/mysql (a superuser's)"
    )

    def ping(self, url: str) -> None:
        with connected(url, timeout=PING_TIMEOUT) as cursor:
            cursor.execute("SELECT 1")

    def server(self, url: str, control: Control) -> MariadbServer:
        return MariadbServer(self, url, control)

    def docker(self, options: Options) -> tuple[str, Control]:
        require_image(IMAGE)
        port = free_port()
        control = Container(
            IMAGE,
            port=(3306, port),
            env={"MARIADB_ALLOW_EMPTY_ROOT_PASSWORD": "1"},
            command=[f"--{name}={value}" for name, value in _settings(options).items()],
            detached=options.detached,
        )
        return url_for(port), control

    def local(self, options: Options) -> tuple[str, Control]:
        server = _find_server() or _install_server()
        user = unprivileged("mysql")
        folder = new_folder(self.name, detached=options.detached, user=user)
        port = free_port()
        file = write_settings(folder, port, _settings(options))
        run_as(
            user,
            [
                *("mariadb-install-db", f"--defaults-file={file}", f"--datadir={folder / 'data'}"),
                *("--auth-root-authentication-method=normal", "--skip-test-db"),
            ],
            cwd=folder,
        )
        control = LocalProcess(
            [server, f"--defaults-file={file}"], folder, user=user, discard_by_kill=True, detached=options.detached
        )
        return url_for(port), control


def _settings(options: Options) -> dict[str, str]:
    return SETTINGS if options.like_production else SETTINGS | UNSAFE_AND_QUICK


def write_settings(folder: Path, port: int, settings: dict[str, str]) -> Path:
    """Write the file that a server of MariaDB's or MySQL's starts with; its data will be in `folder/data`."""
    everywhere = {
        "datadir": str(folder / "data"),
        "tmpdir": str(folder),  # a server that starts removes the temporary tables of others from a shared one
        "socket": str(folder / "socket"),
        "pid-file": str(folder / "pid"),
        "bind-address": "127.0.0.1",
        "port": str(port),
    }
    file = folder / "my.cnf"
    file.write_text("[mysqld]\n" + "".join(f"{name} = {value}\n" for name, value in (everywhere | settings).items()))
    return file


def url_for(port: int) -> str:
    return f"mysql://root@127.0.0.1:{port}/mysql"


def _database(url: str) -> str:
    return urlsplit(url).path.lstrip("/")


@contextlib.contextmanager
def connected(url: str, timeout: float = 30) -> Iterator[Any]:
    """A cursor of a connection in autocommit; `timeout` is how long an answer may take, in seconds."""
    address = urlsplit(url)
    connection = pymysql.connect(
        host=address.hostname,
        port=address.port or 3306,
        user=address.username,
        password=address.password or "",
        database=_database(url),
        autocommit=True,
        connect_timeout=PING_TIMEOUT,
        read_timeout=timeout,
    )
    with connection, connection.cursor() as cursor:
        yield cursor


def _copy(cursor: Any, source: str) -> None:
    """Copy the tables of `source` with their rows into the database in use."""
    cursor.execute("SET foreign_key_checks = 0")  # the order of the tables is any
    cursor.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = %s", [source])
    for (table,) in cursor.fetchall():
        cursor.execute(f"SHOW CREATE TABLE {source}.`{table}`")
        cursor.execute(cursor.fetchone()[1])
        cursor.execute(f"INSERT INTO `{table}` SELECT * FROM {source}.`{table}`")


def _roll_back_prepared(cursor: Any) -> None:
    """Roll back the prepared transactions of the whole server: it does not say which database one is in."""
    cursor.execute("XA RECOVER")
    for form, length, _, name in cursor.fetchall():
        xid = name.encode() if isinstance(name, str) else name
        cursor.execute(f"XA ROLLBACK X'{xid[:length].hex()}', X'{xid[length:].hex()}', {form}")


def _kill(cursor: Any, session: int) -> None:
    try:
        cursor.execute("KILL %s", [session])
    except pymysql.MySQLError as error:
        if error.args[0] != NO_SUCH_THREAD:  # it ended by itself
            raise


def _find_server() -> str | None:
    return shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin:/usr/libexec:/usr/local/sbin")


def _install_server() -> str:
    debian_packages(PACKAGES, purpose="MariaDB")
    server = _find_server()
    if server is None:
        raise Unavailable(f"{' and '.join(PACKAGES)} brought no mariadbd")
    return server
