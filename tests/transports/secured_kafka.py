"""A Kafka with TLS, SASL and access rights, that makes topics for whoever asks carelessly; as a local process."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.services.install import jars, java
from tests.services.kafka import JAVA, LOG4J, POM, SETTINGS, VERSION, cluster_id
from tests.services.process import LocalProcess, can_connect, free_port, new_folder, run_as
from tests.services.service import StartFailed
from tests.services.waiting import wait_until
from tests.transports.certificates import certificates, openssl

ADMIN_TIMEOUT = 60  # seconds for Kafka's own command, which is another Java


@dataclass
class SecuredKafka:
    """``app`` with the password ``pw`` is a user without any rights; who comes through `internal` may do all."""

    control: LocalProcess
    folder: Path
    runtime: str
    classpath: str
    internal: int
    sasl: int
    sasl_ssl: int

    def url(self, listener: str, *, user: str = "app:pw@", **parameters: Any) -> str:
        protocol, port = {
            "internal": ("PLAINTEXT", self.internal),
            "sasl": ("SASL_PLAINTEXT", self.sasl),
            "sasl_ssl": ("SASL_SSL", self.sasl_ssl),
        }[listener]
        query = {"security_protocol": protocol, "delivery_timeout_ms": 5000} | parameters
        host = "127.0.0.1" if listener == "internal" else "localhost"
        return f"kafka://{user}{host}:{port}?" + "&".join(f"{name}={value}" for name, value in query.items())

    def allow(self, *operations: str, **resource: str) -> None:
        """Let ``app`` do these operations on ``topic=…`` or ``group=…``."""
        command = [self.runtime, "-cp", self.classpath, "org.apache.kafka.tools.AclCommand"]
        command += ["--bootstrap-server", f"127.0.0.1:{self.internal}", "--add", "--allow-principal", "User:app"]
        for operation in operations:
            command += ["--operation", operation]
        for kind, name in resource.items():
            command += [f"--{kind}", name]
        subprocess.run(command, check=True, capture_output=True, timeout=ADMIN_TIMEOUT)


def start() -> SecuredKafka:
    """Raises `Unavailable` where this machine has neither Java nor Kafka's jars and may not fetch them."""
    runtime, classpath = java(JAVA), f"{jars(f'kafka-{VERSION}', POM)}/*"
    folder = new_folder("kafka-secured", detached=False)
    _certificates(folder)
    controller, internal, sasl, sasl_ssl = (free_port() for _ in range(4))
    doors = f"PLAINTEXT://127.0.0.1:{internal},SASL_PLAINTEXT://localhost:{sasl},SASL_SSL://localhost:{sasl_ssl}"
    settings = SETTINGS | {
        "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        "listeners": f"{doors},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": doors,
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,"
        "SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL",
        "log.dirs": str(folder / "data"),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(folder / "keystore.pem"),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        "auto.create.topics.enable": "true",  # Kafka's default
    }
    for listener in ("sasl_plaintext", "sasl_ssl"):
        security = "org.apache.kafka.common.security"
        settings |= {
            f"listener.name.{listener}.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
            f"listener.name.{listener}.plain.sasl.jaas.config": f'{security}.plain.PlainLoginModule required user_app="pw";',
            f"listener.name.{listener}.scram-sha-512.sasl.jaas.config": f"{security}.scram.ScramLoginModule required;",
        }
    (folder / "server.properties").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    (folder / "log4j2.properties").write_text(LOG4J)
    machine = [runtime, "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    machine += ["-Dlog4j2.configurationFile=log4j2.properties", "-cp", classpath]
    format_command = ["kafka.tools.StorageTool", "format", "-t", cluster_id(), "-c", "server.properties"]
    run_as(None, [*machine, *format_command, "--add-scram", "SCRAM-SHA-512=[name=app,password=pw]"], cwd=folder)
    control = LocalProcess([*machine, "kafka.Kafka", "server.properties"], folder, discard_by_kill=True)
    control.start()
    doors_open = [("127.0.0.1", internal), ("localhost", sasl), ("localhost", sasl_ssl)]  # one after the other

    def answers() -> bool:
        return all(can_connect(host, port) for host, port in doors_open)

    if not wait_until(lambda: answers() or not control.running(), 60) or not control.running():
        log = control.log()
        control.discard()
        raise StartFailed(log)
    return SecuredKafka(control, folder, runtime, classpath, internal, sasl, sasl_ssl)


def _certificates(folder: Path) -> None:
    certificates(folder)
    openssl(folder, "pkcs8", "-topk8", "-nocrypt", "-in", "broker.key", "-out", "broker.pkcs8")
    parts = [(folder / name).read_text() for name in ("broker.pkcs8", "broker.pem", "ca.pem")]
    (folder / "keystore.pem").write_text("".join(parts))
