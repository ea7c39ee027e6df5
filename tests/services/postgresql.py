"""PostgreSQL for tests, with logical replication and prepared transactions switched on."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import uuid
from pathlib import Path
from signal import SIGINT
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from tests.services.container import Container, require_image
from tests.services.install import debian_packages, package_exists
from tests.services.process import LocalProcess, free_port, new_folder, run_as, unprivileged
from tests.services.service import Control, DatabaseServer, Options, Service, Unavailable
from tests.services.unpack import jar_unpacked

VERSION = "15"
OLDEST = 14  # the oldest release that the PostgreSQL project still mends
# Releases that Debian's package is not: Maven Central has their binaries.
OTHER_VERSIONS = {"14": "14.19.0", "18": "18.1.0"}
SUPERUSER = "postgres"

SETTINGS = {
    "wal_level": "logical",
    "max_wal_senders": "20",
    "max_replication_slots": "20",
    "max_prepared_transactions": "20",
    "max_connections": "200",
}
# The server's crash loses nothing even so: its pages are the kernel's. Only the machine's crash would.
UNSAFE_AND_QUICK = {"fsync": "off", "full_page_writes": "off"}


class PostgresqlServer(DatabaseServer):
    """A running PostgreSQL; `url` is that of its maintenance database, with a superuser."""

    def create_database(self, template: str | None = None) -> str:
        """Create a database with a unique name and return its URL (`postgresql://user@host:port/name`).

        It is empty, or a copy of the database at the URL `template`, to which nothing may be connected: a
        schema that is made once and copied for each test costs a test some 30 ms.
        """
        name = f"test_{uuid.uuid4().hex[:12]}"
        source = _database(template) if template else "template0"
        self._execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(source)))
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))

    def drop_database(self, url: str) -> None:
        """Drop the database at `url`, with whatever a test left in it: sessions, slots, prepared transactions."""
        name = _database(url)
        # A walsender holds its slot until it has noticed its end: pg_terminate_backend waits for that.
        self._execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
            name,
        )
        self._execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s AND NOT active",
            name,
        )
        with _connect(url) as connection:
            prepared = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
            for (gid,) in connection.execute(prepared).fetchall():
                connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
        self._execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def replace_database(self, url: str, template: str) -> None:
        """Put a copy of the database at `template` in the place of the one at `url`, as a restore or a fail-over that
        lost commits does: sessions end, and positions are given out again."""
        new = self.create_database(template=template)
        self.drop_database(url)
        names = sql.Identifier(_database(new)), sql.Identifier(_database(url))
        self._execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(*names))

    def _execute(self, statement: str | sql.Composed, *parameters: str) -> None:
        with _connect(self.url) as connection:
            connection.execute(statement, parameters or None)


class Postgresql(Service[PostgresqlServer]):
    """PostgreSQL of the system's release, or of one of OTHER_VERSIONS."""

    name = "postgresql"
    how_to_get = (
        "start Docker, or install PostgreSQL (Debian: apt install postgresql-15), "
        "or set OUTBOX_TEST_POSTGRESQL_URL=postgresql://user@127.0.0.1:5432/postgres (a superuser's)"
    )

    def __init__(self, version: str | None = None) -> None:
        if version is not None and version not in OTHER_VERSIONS:
            raise ValueError(f"there is no PostgreSQL {version} for tests; there are {', '.join(OTHER_VERSIONS)}")
        self.version = version

    def ping(self, url: str) -> None:
        with _connect(url) as connection:
            connection.execute("SELECT 1")
            found = str(connection.info.server_version // 10_000)
        if self.version is not None and found != self.version:
            raise ConnectionError(f"PostgreSQL {self.version} is asked for, and that one is {found}")

    def server(self, url: str, control: Control) -> PostgresqlServer:
        return PostgresqlServer(self, url, control)

    def docker(self, options: Options) -> tuple[str, Control]:
        image = f"postgres:{self.version or VERSION}"
        require_image(image)
        port = free_port()
        settings = [word for setting in _settings(options).items() for word in ("-c", "=".join(setting))]
        control = Container(
            image,
            port=(5432, port),
            env={"POSTGRES_HOST_AUTH_METHOD": "trust"},
            command=["postgres", *settings],
            detached=options.detached,
        )
        return _url(port), control

    def local(self, options: Options) -> tuple[str, Control]:
        binaries = _fetch_binaries(self.version) if self.version else _find_binaries() or _install_binaries()
        user = unprivileged(SUPERUSER)  # PostgreSQL refuses to run as root
        folder = new_folder(self.name, detached=options.detached, user=user)
        port = free_port()
        run_as(
            user,
            [
                *(str(binaries / "initdb"), "--pgdata=data", f"--username={SUPERUSER}", "--auth=trust"),
                *("--encoding=UTF8", f"--locale={'C.UTF-8' if Path('/etc/os-release').exists() else 'C'}", "--no-sync"),
            ],
            cwd=folder,
        )
        settings = _settings(options) | {
            "listen_addresses": "'127.0.0.1'",
            "port": str(port),
            "unix_socket_directories": "''",
        }
        with (folder / "data" / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in settings.items())
        control = LocalProcess(
            [str(binaries / "postgres"), "-D", "data"],
            folder,
            user=user,
            stop_signal=SIGINT,  # "fast": ends sessions instead of waiting for them
            detached=options.detached,
        )
        return _url(port), control


def _settings(options: Options) -> dict[str, str]:
    return SETTINGS if options.like_production else SETTINGS | UNSAFE_AND_QUICK


def _url(port: int) -> str:
    return f"postgresql://{SUPERUSER}@127.0.0.1:{port}/postgres"


def _database(url: str) -> str:
    return urlsplit(url).path.lstrip("/")


def _connect(url: str) -> psycopg.Connection:
    return psycopg.connect(url, autocommit=True, connect_timeout=3)


def _find_binaries() -> Path | None:
    """The folder with the server's binaries: Debian keeps one per release off the PATH, others are on it."""
    debian = sorted(
        (path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")),
        key=lambda folder: int(folder.parent.name),
    )
    if debian and int(debian[-1].parent.name) >= OLDEST:
        return debian[-1]
    found = shutil.which("postgres")
    return Path(found).resolve().parent if found and os.geteuid() != 0 else None


def _install_binaries() -> Path:
    # Releases of Debian and Ubuntu differ in the version that they have.
    package = f"postgresql-{VERSION}"
    if not package_exists(package):
        package = "postgresql"
    debian_packages([package], purpose="PostgreSQL")
    binaries = _find_binaries()
    if binaries is None:
        raise Unavailable(f"{package} brought no PostgreSQL {OLDEST} or newer")
    return binaries


def _fetch_binaries(version: str) -> Path:
    system = "darwin" if sys.platform == "darwin" else "linux"
    machine = "arm64v8" if platform.machine() in ("arm64", "aarch64") else "amd64"
    artifact = f"embedded-postgres-binaries-{system}-{machine}"
    exact = OTHER_VERSIONS[version]
    return jar_unpacked("io.zonky.test.postgres", artifact, exact, purpose=f"PostgreSQL {version}") / "bin"
