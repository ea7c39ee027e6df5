"""SQS for tests: two servers of others that speak it. One is lax where the other is strict, so what passes on both is near
the truth: ministack knows the limits of today (1 MiB), ElasticMQ those of old (256 KiB), and checks attributes."""

from __future__ import annotations

import http.client
import os
import sys
from urllib.parse import parse_qs, urlsplit

from tests.services.container import Container, require_image
from tests.services.install import jars, java
from tests.services.process import LocalProcess, free_port, new_folder
from tests.services.service import Control, Options, Server, Service, Unavailable

VERSION = "1.6.14"
JAVA = 17
POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>pyoutbox</groupId><artifactId>elasticmq</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.elasticmq</groupId><artifactId>elasticmq-server_2.13</artifactId><version>{VERSION}</version></dependency>
  </dependencies>
</project>
"""
CONFIGURATION = """\
include classpath("application.conf")
node-address {{ protocol = http, host = "{host}", port = {port}, context-path = "" }}
rest-sqs {{ enabled = true, bind-port = {port}, bind-hostname = "{bind}", sqs-limits = strict }}
rest-stats {{ enabled = false }}
generate-node-address = false
aws {{ region = us-east-1, accountId = 000000000000 }}
"""


def _url(port: int) -> str:
    return f"sqs://test:test@us-east-1/?endpoint_url=http://127.0.0.1:{port}"


class _Sqs(Service[Server]):
    def ping(self, url: str) -> None:
        endpoint = urlsplit(parse_qs(urlsplit(url).query)["endpoint_url"][0])
        connection = http.client.HTTPConnection(endpoint.hostname or "", endpoint.port, timeout=3)
        try:
            connection.request("GET", "/?Action=ListQueues")
            connection.getresponse().read()
        finally:
            connection.close()

    def server(self, url: str, control: Control) -> Server:
        return Server(self, url, control)


class Ministack(_Sqs):
    name = "sqs"
    how_to_get = "pip install ministack, or set OUTBOX_TEST_SQS_URL=sqs://key:secret@us-east-1/?endpoint_url=http://…"

    def docker(self, options: Options) -> tuple[str, Control]:
        raise Unavailable("it needs no Docker")

    def local(self, options: Options) -> tuple[str, Control]:
        folder = new_folder(self.name, detached=options.detached)
        port = free_port()
        settings = {
            "SERVICES": "sqs",
            "BIND_HOST": "127.0.0.1",
            "MINISTACK_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(port),
            "HOME": str(folder),
            "LOG_LEVEL": "WARNING",
            "PATH": os.environ.get("PATH", ""),
        }
        command = [
            "env",
            "-i",
            *(f"{name}={value}" for name, value in settings.items()),
            sys.executable,
            "-m",
            "ministack",
        ]
        return _url(port), LocalProcess(command, folder, discard_by_kill=True, detached=options.detached)


class Elasticmq(_Sqs):
    name = "elasticmq"
    how_to_get = (
        "start Docker, or install Java 17 or newer and Maven (Debian: apt install default-jre-headless maven) "
        "and set OUTBOX_TEST_INSTALL=1"
    )

    def docker(self, options: Options) -> tuple[str, Control]:
        image = f"softwaremill/elasticmq:{VERSION}"
        require_image(image)
        port = free_port()
        configuration = CONFIGURATION.format(host="127.0.0.1", port=port, bind="0.0.0.0")
        start = "exec java -Dconfig.file=/tmp/c.conf -jar /opt/elasticmq-server.jar"
        command = ["sh", "-c", f"cat > /tmp/c.conf <<'END'\n{configuration}\nEND\n{start}"]
        return _url(port), Container(image, port=(port, port), env={}, command=command, detached=options.detached)

    def local(self, options: Options) -> tuple[str, Control]:
        classpath = f"{jars(f'elasticmq-{VERSION}', POM)}/*"
        folder = new_folder(self.name, detached=options.detached)
        port = free_port()
        (folder / "emq.conf").write_text(CONFIGURATION.format(host="127.0.0.1", port=port, bind="127.0.0.1"))
        quick = [] if options.like_production else ["-XX:TieredStopAtLevel=1"]
        command = [
            *(java(JAVA), "-Xmx256m", "-XX:+UseSerialGC", *quick, "-Xshare:auto"),
            *("-Dconfig.file=emq.conf", "-cp", classpath, "org.elasticmq.server.Main"),
        ]
        return _url(port), LocalProcess(command, folder, discard_by_kill=True, detached=options.detached)
