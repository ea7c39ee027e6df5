"""Three RabbitMQ nodes that are one cluster; as local processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from tests.services import RABBITMQ, Options, RabbitmqServer
from tests.services.process import LocalProcess, free_port, new_folder, unprivileged
from tests.services.rabbitmq import node, require_installed

NODES = 3


class Cluster:
    def __init__(self, nodes: list[RabbitmqServer], names: list[str]) -> None:
        self.nodes = nodes
        self.names = names
        self.url = nodes[0].url + "".join("," + one.url.rpartition("@")[2] for one in nodes[1:])
        """Of all of them, the first one first."""

    def leader(self, queue: str) -> RabbitmqServer:
        lines = self.nodes[0].ctl("list_queues", "--quiet", "name", "leader").splitlines()
        (found,) = [line.split("\t")[1] for line in lines if line.split("\t")[0] == queue]
        return self.nodes[self.names.index(found)]


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Raises `Unavailable` where this machine has no RabbitMQ and may not install one."""
    require_installed()
    user, mapper = unprivileged("rabbitmq"), free_port()
    folders = [new_folder(f"rabbitmq{at}", detached=False, user=user) for at in range(NODES)]
    names = [f"{folder.name}@localhost" for folder in folders]
    settings = {
        "cluster_formation.peer_discovery_backend": "classic_config",
        "cluster_partition_handling": "pause_minority",
        **{f"cluster_formation.classic_config.nodes.{at}": name for at, name in enumerate(names, 1)},
    }
    with ExitStack() as exit:
        epmd = LocalProcess(
            ["epmd", "-port", str(mapper), "-address", "127.0.0.1"],
            new_folder("epmd", detached=False, user=user),
            user=user,
            discard_by_kill=True,
        )
        exit.callback(epmd.discard)
        epmd.start()
        nodes = []
        for folder in folders:
            url, control = node(folder, user, settings, Options(), cookie="cluster", mapper=mapper)
            nodes.append(RABBITMQ.server(url, control))
            exit.callback(nodes[-1].close)
        with ThreadPoolExecutor(NODES) as threads:
            list(threads.map(lambda one: one.start(), nodes))
        yield Cluster(nodes, names)
