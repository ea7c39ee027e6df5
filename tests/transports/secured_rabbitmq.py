"""A RabbitMQ with TLS, client certificates, users of few rights and a small limit of message size; as a local process."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.services import Options, Rabbitmq, RabbitmqServer
from tests.services.process import free_port
from tests.services.service import discarded_on_error
from tests.transports.certificates import certificates

LIMIT = 100_000
"""Bytes of a payload."""


class Secured:
    """``guest`` may do everything. ``app`` (its certificate is client.pem) may do everything with ``app-…``, use what is
    called ``shared-…`` and only look at ``locked-…``; it has no right to virtual host ``closed``."""

    def __init__(self, server: RabbitmqServer, folder: Path, tls: int) -> None:
        self.server = server
        self.folder = folder
        self._plain = urlsplit(server.url).port
        self._tls = tls

    def plain(self, user: str = "app:pw@", path: str = "", **parameters: Any) -> str:
        return f"amqp://{user}localhost:{self._plain}{path}{_query(parameters)}"

    def tls(self, user: str = "app:pw@", host: str = "localhost", **parameters: Any) -> str:
        return f"amqps://{user}{host}:{self._tls}{_query(parameters)}"

    def wrong_door(self, scheme: str) -> str:
        """The other one's port."""
        return f"{scheme}://app:pw@localhost:{self._tls if scheme == 'amqp' else self._plain}"

    def files(self, authority: str = "ca.pem", client: bool = True) -> dict[str, str]:
        found = {"ssl_cafile": f"{self.folder}/{authority}"}
        if client:
            found |= {"ssl_certfile": f"{self.folder}/client.pem", "ssl_keyfile": f"{self.folder}/client.key"}
        return found


def start() -> Secured:
    """Raises `Unavailable` where this machine has no RabbitMQ and may not install one."""
    folders: list[Path] = []
    port = free_port()

    def prepare(folder: Path) -> Mapping[str, str]:
        folders.append(folder)
        certificates(folder, client="app")
        (folder / "definitions.json").write_text(json.dumps(_definitions()))
        return {
            "listeners.ssl.1": f"127.0.0.1:{port}",
            "ssl_options.cacertfile": f"{folder}/ca.pem",
            "ssl_options.certfile": f"{folder}/broker.pem",
            "ssl_options.keyfile": f"{folder}/broker.key",
            "ssl_options.verify": "verify_peer",
            "ssl_options.fail_if_no_peer_cert": "true",
            "ssl_cert_login_from": "common_name",
            "auth_mechanisms.1": "PLAIN",
            "auth_mechanisms.2": "EXTERNAL",
            "load_definitions": f"{folder}/definitions.json",
            "max_message_size": str(LIMIT),
        }

    service = Rabbitmq(prepare)
    url, control = service.local(Options())
    server = service.server(url, control)
    with discarded_on_error(server):
        server.start()
    return Secured(server, folders[0], port)


def _definitions() -> dict[str, Any]:
    def user(name: str, password: str, tags: str) -> dict[str, str]:
        salt = b"salt"
        digest = base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()
        return {
            "name": name,
            "password_hash": digest,
            "hashing_algorithm": "rabbit_password_hashing_sha256",
            "tags": tags,
        }

    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    own = {"configure": "^app-", "write": "^(app-|shared-|amq.default$)", "read": "^(app-|shared-)"}
    return {
        "users": [user("guest", "guest", "administrator"), user("app", "pw", "")],
        "vhosts": [{"name": "/"}, {"name": "closed"}],
        "permissions": [
            {"user": "guest", "vhost": "/", **everything},
            {"user": "app", "vhost": "/", **own},
        ],
    }


def _query(parameters: dict[str, Any]) -> str:
    return "?" + "&".join(f"{name}={value}" for name, value in parameters.items()) if parameters else ""
