"""PgBouncer for tests: 1.18 in transaction mode, the old kind that knows nothing of prepared statements.

It stands before a PostgreSQL that runs already. Its server connections take turns, so that what a client says in one
transaction is heard by another backend than what it says in the next: whatever relies on a session shows.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit, urlunsplit

import psycopg

from tests.services.process import LocalProcess, free_port, new_folder, unprivileged
from tests.services.service import Control, Options, Server, Service, Unavailable
from tests.services.unpack import debian_unpacked

SUITE = "bookworm"  # which has 1.18
BACKENDS = 4  # server connections of a database, once `through` has been called

# What a session can keep from one transaction to the next, but for the settings that PgBouncer keeps for each client.
KEPT = "('client_encoding', 'DateStyle', 'TimeZone', 'standard_conforming_strings', 'application_name')"
SESSION_STATE = f"""
    select 'prepared statement ' || name from pg_prepared_statements
    union all select 'listens to ' || pg_listening_channels()
    union all select 'advisory lock ' || objid from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()
    union all select 'cursor ' || name from pg_cursors where is_holdable
    union all select 'temporary table ' || relname from pg_class where relnamespace = pg_my_temp_schema()
    union all select 'setting ' || name from pg_settings where source = 'session' and name not in {KEPT}
"""

ADMINISTRATOR = "pgbouncer"

SETTINGS = {
    "listen_addr": "127.0.0.1",
    "unix_socket_dir": "",
    "auth_type": "trust",
    "auth_file": "users",
    "pool_mode": "transaction",
    "server_round_robin": "1",
    "default_pool_size": "30",
    "max_client_conn": "200",
    "admin_users": ADMINISTRATOR,
    # Its default waits 15 s before it tries a server again that was away.
    "server_login_retry": "1",
}
OF_THE_OLD_KIND = "max_prepared_statements = 0\n"  # makes a newer PgBouncer one of the old kind


class PgbouncerServer(Server):
    """A running PgBouncer; `url` is that of the PostgreSQL server's own database, through it."""

    def through(self, url: str) -> str:
        """The URL of a database of the PostgreSQL server behind it, through it, its connections made."""
        pooled = urlsplit(url)._replace(netloc=urlsplit(self.url).netloc)
        with ExitStack() as exit:
            # open transactions at the same time need a server connection each
            for _ in range(BACKENDS):
                connection = exit.enter_context(psycopg.connect(urlunsplit(pooled), connect_timeout=5))
                connection.execute("SELECT 1")
        return urlunsplit(pooled)

    def left_on_sessions(self, url: str) -> list[str]:
        """What was left on the sessions of a database's server connections, which nobody should notice there. Each is
        asked in a transaction that is open beside the others'."""
        with ExitStack() as exit:
            connections = [exit.enter_context(psycopg.connect(url, prepare_threshold=None)) for _ in range(BACKENDS)]
            return [text for connection in connections for (text,) in connection.execute(SESSION_STATE)]

    @contextmanager
    def paused(self, url: str) -> Iterator[None]:
        """No server connection to the database at `url` during this block; its clients wait, and notice nothing."""
        name = urlsplit(url).path.lstrip("/")
        self._tell(f"PAUSE {name}")
        try:
            yield
        finally:
            self._tell(f"RESUME {name}")

    def _tell(self, command: str) -> None:
        address = urlsplit(self.url).netloc.rpartition("@")[2]
        with psycopg.connect(f"postgresql://{ADMINISTRATOR}@{address}/pgbouncer", autocommit=True) as console:
            result = console.pgconn.exec_(command.encode())  # it knows the simple protocol only
            if result.status != psycopg.pq.ExecStatus.COMMAND_OK:
                raise RuntimeError(f"{command}: {result.error_message.decode()}")


class Pgbouncer(Service[PgbouncerServer]):
    name = "pgbouncer"
    how_to_get = (
        "run as root on Debian or Ubuntu (PgBouncer of Debian 12 is unpacked beside the system), or install PgBouncer"
    )

    def __init__(self, postgresql_url: str) -> None:
        self._upstream = urlsplit(postgresql_url)

    def ping(self, url: str) -> None:
        with psycopg.connect(url, autocommit=True, connect_timeout=3, prepare_threshold=None) as connection:
            connection.execute("SELECT 1")

    def server(self, url: str, control: Control) -> PgbouncerServer:
        return PgbouncerServer(self, url, control)

    def docker(self, options: Options) -> tuple[str, Control]:
        raise Unavailable("there is no official Docker image of PgBouncer")

    def local(self, options: Options) -> tuple[str, Control]:
        user = unprivileged("postgres")
        folder = new_folder(self.name, detached=options.detached, user=user)
        command, more = _find()
        port = free_port()
        upstream = self._upstream
        settings = "".join(f"{name} = {value}\n" for name, value in (SETTINGS | {"listen_port": str(port)}).items())
        database = f"* = host={upstream.hostname} port={upstream.port or 5432}"
        (folder / "pgbouncer.ini").write_text(f"[databases]\n{database}\n[pgbouncer]\n{settings}{more}")
        (folder / "users").write_text(f'"{upstream.username}" "{upstream.password or ""}"\n"{ADMINISTRATOR}" ""\n')
        control = LocalProcess(
            [*command, "pgbouncer.ini"], folder, user=user, discard_by_kill=True, detached=options.detached
        )
        netloc = f"{upstream.username}@127.0.0.1:{port}"
        return urlunsplit(upstream._replace(netloc=netloc)), control


def _find() -> tuple[list[str], str]:
    """How to run the old kind, and what to add to its settings."""
    try:
        return debian_unpacked(SUITE, "pgbouncer", purpose="PgBouncer").command("usr/sbin/pgbouncer"), ""
    except Unavailable:
        found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
        if found is None:
            raise
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout.split()[1]
    new = tuple(map(int, version.split(".")[:2])) >= (1, 21)
    return [found], OF_THE_OLD_KIND if new else ""
