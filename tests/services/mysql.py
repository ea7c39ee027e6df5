"""MySQL 9 for tests: what stands in for MariaDB in `make test-matrix`."""

from __future__ import annotations

from tests.services.container import Container, require_image
from tests.services.mariadb import PING_TIMEOUT, Mariadb, connected, url_for, write_settings
from tests.services.process import LocalProcess, free_port, new_folder, run_as, unprivileged
from tests.services.service import Control, Options
from tests.services.unpack import debian_unpacked

IMAGE = "mysql:9"
SUITE, PACKAGE = "sid", "mysql-server-core"  # Debian's releases have MariaDB only

SETTINGS = {
    "skip-name-resolve": "ON",
    "max_connections": "200",
    "innodb_buffer_pool_size": "64M",
    "server_id": "1",
    "log_bin": "binlog",
    "binlog_row_image": "FULL",
    "binlog_row_metadata": "FULL",
    "gtid_mode": "ON",
    "enforce_gtid_consistency": "ON",
    "mysqlx": "OFF",
    "auto_generate_certs": "OFF",  # no TLS: tests look at what is sent
    "performance_schema": "OFF",  # a quicker start
}
# The server's crash loses nothing even so: its pages are the kernel's. Only the machine's crash would.
UNSAFE_AND_QUICK = {
    "innodb_flush_log_at_trx_commit": "2",
    "innodb_flush_method": "nosync",
    "innodb_doublewrite": "OFF",
    "sync_binlog": "0",
}

# The superuser that a new server has may come from `localhost` only, and names are not resolved.
SUPERUSER = """\
CREATE USER root@'127.0.0.1' IDENTIFIED BY '';
GRANT ALL ON *.* TO root@'127.0.0.1' WITH GRANT OPTION;
"""


class Mysql(Mariadb):
    name = "mysql"
    how_to_get = (
        "start Docker, or run as root on Debian or Ubuntu (MySQL of Debian sid is unpacked beside the system), "
        "or set OUTBOX_TEST_MYSQL_URL=mysql://root@127.0.0.1:3306/mysql (a superuser's)"
    )

    def ping(self, url: str) -> None:
        with connected(url, timeout=PING_TIMEOUT) as cursor:
            cursor.execute("SELECT version()")
            (version,) = cursor.fetchone()
        if "MariaDB" in version:
            raise ConnectionError(f"MySQL is asked for, and that one is {version}")

    def docker(self, options: Options) -> tuple[str, Control]:
        require_image(IMAGE)
        port = free_port()
        control = Container(
            IMAGE,
            port=(3306, port),
            env={"MYSQL_ALLOW_EMPTY_PASSWORD": "1"},
            command=[f"--{name}={value}" for name, value in _settings(options).items()],
            detached=options.detached,
        )
        return url_for(port), control

    def local(self, options: Options) -> tuple[str, Control]:
        unpacked = debian_unpacked(SUITE, PACKAGE, purpose="MySQL")
        user = unprivileged("mysql")
        folder = new_folder(self.name, detached=options.detached, user=user)
        port = free_port()
        beside_the_system = {
            "lc-messages-dir": str(unpacked.root / "usr/share/mysql"),
            "character-sets-dir": str(unpacked.root / "usr/share/mysql/charsets"),
            "plugin-dir": str(unpacked.root / "usr/lib/mysql/plugin"),
            "secure-file-priv": "NULL",
        }
        file = write_settings(folder, port, _settings(options) | beside_the_system)
        (folder / "superuser.sql").write_text(SUPERUSER)
        command = [*unpacked.command("usr/sbin/mysqld"), f"--defaults-file={file}"]
        run_as(user, [*command, "--initialize-insecure", f"--init-file={folder / 'superuser.sql'}"], cwd=folder)
        control = LocalProcess(command, folder, user=user, discard_by_kill=True, detached=options.detached)
        return url_for(port), control


def _settings(options: Options) -> dict[str, str]:
    return SETTINGS if options.like_production else SETTINGS | UNSAFE_AND_QUICK


def mariadb_or_its_stand_in(name: str | None) -> Mariadb:
    """MariaDB, or MySQL where that is the name."""
    services = {"mariadb": Mariadb, "mysql": Mysql}
    if name and name not in services:
        raise ValueError(f"there is no {name} for tests in MariaDB's place; there are {', '.join(services)}")
    return services[name or "mariadb"]()
