"""RabbitMQ for tests: one node with a distribution port, a port mapper (epmd) and a cookie of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pika

from tests.services.container import Container, require_image
from tests.services.install import debian_packages
from tests.services.process import LocalProcess, can_connect, free_port, new_folder, unprivileged
from tests.services.service import Control, Options, Server, Service

IMAGE = "rabbitmq:4.0"
SCRIPTS = Path("/usr/lib/rabbitmq/bin")
"""Not /usr/sbin/rabbitmq*, which change folder and user."""
PLUGINS = ("rabbitmq_consistent_hash_exchange", "rabbitmq_auth_mechanism_ssl")

# epmd ends with the node, whose parent-death signal the shell hands on by `exec`; erl would start one that goes on living.
START = """\
[ -n "$SHARED_EPMD" ] || setpriv --pdeathsig KILL epmd -port "$ERL_EPMD_PORT" -address 127.0.0.1 &
until epmd -port "$ERL_EPMD_PORT" -names >/dev/null 2>&1; do sleep 0.05; done
exec "$0/rabbitmq-server"
"""


class RabbitmqServer(Server):
    """A running RabbitMQ; the user guest with the password guest may do everything."""

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl (2 s), which takes a server of ours; returns what it printed."""
        if isinstance(self.control, LocalProcess):
            result = subprocess.run(
                [str(SCRIPTS / "rabbitmqctl"), *arguments],
                env=os.environ | _environment(self.control.folder),
                capture_output=True,
                text=True,
                timeout=60,
            )
            if result.returncode:
                raise RuntimeError(f"rabbitmqctl {arguments[0]} failed: {result.stderr or result.stdout}")
            return result.stdout
        if isinstance(self.control, Container):
            return self.control.run("rabbitmqctl", *arguments)
        raise RuntimeError("rabbitmqctl needs a server that was started here")


class Rabbitmq(Service[RabbitmqServer]):
    name = "rabbitmq"
    how_to_get = (
        "start Docker, or install RabbitMQ (Debian: apt install rabbitmq-server), "
        "or set OUTBOX_TEST_RABBITMQ_URL=amqp://guest:guest@127.0.0.1:5672"
    )

    def __init__(self, prepare: Callable[[Path], Mapping[str, str]] | None = None) -> None:
        """``prepare``: puts files into the folder of a local server, and returns further lines of its rabbitmq.conf."""
        self._prepare = prepare

    def ping(self, url: str) -> None:
        address = urlsplit(url)
        # First without the driver, which logs every refusal as an error.
        if not can_connect(address.hostname or "", address.port or 5672):
            raise ConnectionError(f"nothing listens on {address.hostname}:{address.port}")
        parameters = pika.URLParameters(url)
        parameters.socket_timeout = parameters.stack_timeout = 3
        pika.BlockingConnection(parameters).close()

    def server(self, url: str, control: Control) -> RabbitmqServer:
        return RabbitmqServer(self, url, control)

    def docker(self, options: Options) -> tuple[str, Control]:
        require_image(IMAGE)
        port = free_port()
        plugins = "[" + ",".join(PLUGINS) + "]."
        return f"amqp://guest:guest@127.0.0.1:{port}", Container(
            IMAGE,
            port=(5672, port),
            env={},
            command=["sh", "-c", f"echo '{plugins}' > /etc/rabbitmq/enabled_plugins; exec rabbitmq-server"],
            detached=options.detached,
        )

    def local(self, options: Options) -> tuple[str, Control]:
        require_installed()
        user = unprivileged("rabbitmq")
        folder = new_folder(self.name, detached=options.detached, user=user)
        more = self._prepare(folder) if self._prepare is not None else {}
        return node(folder, user, more, options)


def require_installed() -> None:
    """Raises `Unavailable` where this machine has no RabbitMQ and may not install one."""
    if not (SCRIPTS / "rabbitmq-server").exists() or shutil.which("epmd") is None:
        debian_packages(["rabbitmq-server"], purpose="RabbitMQ")


def node(
    folder: Path,
    user: str | None,
    more: Mapping[str, str],
    options: Options,
    *,
    cookie: str | None = None,
    mapper: int | None = None,
) -> tuple[str, Control]:
    """A node that is yet to be started, called as its folder: URL and control. ``more``: further lines of its
    configuration. ``mapper``: the port of an epmd that it shares with others, as it does the ``cookie``."""
    port = free_port()
    settings = {
        "listeners.tcp.1": f"127.0.0.1:{port}",
        # On a full disk tests fail for another reason than this one's.
        "disk_free_limit.absolute": "50MB",
        "log.console": "true",
        "log.console.level": "warning",
        **more,
    }
    (folder / "rabbitmq.conf").write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
    (folder / "enabled_plugins").write_text("[" + ",".join(PLUGINS) + "].\n")
    (folder / "ports").write_text(f"{free_port()} {mapper or free_port()}")
    (folder / "shared_epmd").write_text("" if mapper is None else "yes")
    (folder / "one_core").write_text("" if options.like_production else "yes")
    (folder / ".erlang.cookie").write_text(cookie or folder.name)
    (folder / ".erlang.cookie").chmod(0o400)
    if user is not None:
        for path in folder.iterdir():
            shutil.chown(path, user)
    environment = [f"{name}={value}" for name, value in _environment(folder).items()]
    control = LocalProcess(
        ["env", *environment, "sh", "-c", START, str(SCRIPTS)],
        folder,
        user=user,
        discard_by_kill=True,
        detached=options.detached,
    )
    return f"amqp://guest:guest@127.0.0.1:{port}", control


def _environment(folder: Path) -> dict[str, str]:
    """For the server and rabbitmqctl alike."""
    distribution, mapper = (folder / "ports").read_text().split()
    more: Sequence[str] = ("+S", "1:1") if (folder / "one_core").read_text() else ()
    return {
        "HOME": str(folder),
        "RABBITMQ_NODENAME": f"{folder.name}@localhost",
        "RABBITMQ_DIST_PORT": distribution,
        "ERL_EPMD_PORT": mapper,
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "SHARED_EPMD": (folder / "shared_epmd").read_text(),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "logs"),
        # Its script then becomes the node, so that the process we hold is the server.
        "RABBITMQ_ALLOW_INPUT": "1",
        "RABBITMQ_SERVER_START_ARGS": "-noinput",
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": " ".join(
            ("-start_epmd false -kernel inet_dist_use_interface {127,0,0,1} +sbwt none +sbwtdcpu none", *more)
        ),
        "RABBITMQ_CTL_ERL_ARGS": "-start_epmd false",
    }
