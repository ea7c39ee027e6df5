"""Apache Kafka for tests: one broker in KRaft mode, without ZooKeeper and without automatic topics."""

from __future__ import annotations

import asyncio
import base64
import uuid
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from aiokafka.admin import AIOKafkaAdminClient

from tests.services.container import Container, require_image
from tests.services.install import jars, java
from tests.services.process import LocalProcess, can_connect, free_port, new_folder, run_as
from tests.services.service import Control, Options, Server, Service

VERSION = "4.3.1"
IMAGE = f"apache/kafka:{VERSION}"
JAVA = 17  # what Kafka 4 brokers need
PING_TIMEOUT = 5.0  # seconds

POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>dev</groupId><artifactId>kafka</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version></dependency>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka-tools</artifactId><version>{VERSION}</version></dependency>
  </dependencies>
</project>
"""

SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "auto.create.topics.enable": "false",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    # Fewer partitions of the internal topics: the first group and the first transaction start sooner.
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.num.partitions": "4",
    # A broker that was killed cannot come back before the controller has given up on its former life.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "message.max.bytes": "1048588",  # Kafka's default, named because tests rely on it
}

LOG4J = """\
rootLogger.level = INFO
rootLogger.appenderRef.stdout.ref = STDOUT
appender.stdout.type = Console
appender.stdout.name = STDOUT
appender.stdout.layout.type = PatternLayout
appender.stdout.layout.pattern = [%d] %p %m (%c)%n
"""


class Kafka(Service[Server]):
    name = "kafka"
    how_to_get = (
        "start Docker, or install Java 17 or newer and Maven (Debian: apt install default-jre-headless maven) "
        "and set OUTBOX_TEST_INSTALL=1, or set OUTBOX_TEST_KAFKA_URL=kafka://127.0.0.1:9092"
    )

    def ping(self, url: str) -> None:
        # In a thread of its own: the caller may be in a thread that runs an event loop.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: asyncio.run(asyncio.wait_for(_ping(url), PING_TIMEOUT))).result()

    def server(self, url: str, control: Control) -> Server:
        return Server(self, url, control)

    def docker(self, options: Options) -> tuple[str, Control]:
        require_image(IMAGE)
        port = free_port()
        settings = SETTINGS | {
            "controller.quorum.voters": "1@localhost:9093",
            "listeners": "PLAINTEXT://:9092,CONTROLLER://:9093",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        }
        # The image takes its settings from the environment, with this spelling.
        env = {"KAFKA_" + name.upper().replace(".", "_"): value for name, value in settings.items()}
        env["KAFKA_HEAP_OPTS"] = _heap(options)
        return f"kafka://127.0.0.1:{port}", Container(
            IMAGE, port=(9092, port), env=env, command=[], detached=options.detached
        )

    def local(self, options: Options) -> tuple[str, Control]:
        runtime = java(JAVA)
        classpath = f"{jars(f'kafka-{VERSION}', POM)}/*"
        folder = new_folder(self.name, detached=options.detached)
        port, controller_port = free_port(), free_port()
        settings = SETTINGS | {
            "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
            "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
            "log.dirs": str(folder / "data"),
        }
        (folder / "server.properties").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        (folder / "log4j2.properties").write_text(LOG4J)
        virtual_machine = [runtime, *_heap(options).split(), "-XX:+UseSerialGC"]
        quick_start = ["-XX:TieredStopAtLevel=1", "-Xshare:auto"]
        logging_to = ["-Dlog4j2.configurationFile=log4j2.properties", "-cp", classpath]
        run_as(
            None,
            [
                *(*virtual_machine, *quick_start, *logging_to),
                *("kafka.tools.StorageTool", "format", "-t", cluster_id(), "-c", "server.properties"),
            ],
            cwd=folder,
        )
        control = LocalProcess(
            [
                *(*virtual_machine, *([] if options.like_production else quick_start), *logging_to),
                *("kafka.Kafka", "server.properties"),
            ],
            folder,
            discard_by_kill=True,
            detached=options.detached,
        )
        return f"kafka://127.0.0.1:{port}", control


def cluster_id() -> str:
    """A new one. None that begins with a hyphen, which Kafka's command takes for an option of its own."""
    return base64.urlsafe_b64encode(b"\0" + uuid.uuid4().bytes[1:]).decode().rstrip("=")


def _heap(options: Options) -> str:
    return "-Xmx1g -Xms512m" if options.like_production else "-Xmx384m -Xms128m"


async def _ping(url: str) -> None:
    address = urlsplit(url)
    # First without the driver, which logs every refusal as an error.
    if not await asyncio.to_thread(can_connect, address.hostname or "", address.port or 9092):
        raise ConnectionError(f"nothing listens on {address.netloc}")
    admin = AIOKafkaAdminClient(bootstrap_servers=address.netloc, request_timeout_ms=3000)
    try:
        await admin.start()
        if not (await admin.describe_cluster())["brokers"]:
            raise ConnectionError("the broker has not joined its cluster yet")
    finally:
        await admin.close()
