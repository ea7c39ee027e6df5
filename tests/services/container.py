"""A server as a Docker container, through testcontainers."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.services.process import LOG_TAIL
from tests.services.service import Unavailable

ENGINE_TIMEOUT = 5  # seconds to answer a ping
TRACES = ("/var/run/docker.sock", "~/.docker/config.json", "~/.testcontainers.properties")


class Container:
    """Control over one container; the docker SDK's handle is `container` once it is started."""

    source = "docker"

    def __init__(
        self, image: str, *, port: tuple[int, int], env: dict[str, str], command: list[str], detached: bool
    ) -> None:
        """port: inside, and on 127.0.0.1; the latter is chosen by us so that a restart keeps it."""
        self._image = image
        self._port = port
        self._env = env
        self._command = command
        self._detached = detached
        self._container: Any = None

    def start(self) -> None:
        with _quiet():
            if self._container is None:
                self._container = self._create()
            elif not self.running():
                self._container.start()

    def stop(self) -> None:
        if self.running():
            self.resume()
            self._container.stop(timeout=20)

    def kill(self) -> None:
        if self.running():
            self._container.kill()

    def pause(self) -> None:
        if self._status() == "running":
            self._container.pause()

    def resume(self) -> None:
        if self._status() == "paused":
            self._container.unpause()

    def running(self) -> bool:
        return self._status() in ("created", "running", "paused", "restarting")

    def log(self) -> str:
        if self._container is None:
            return ""
        text: str = self._container.logs(tail=100).decode(errors="replace")
        return text[-LOG_TAIL:]

    def discard(self) -> None:
        if self._container is not None:
            self._container.remove(force=True, v=True)
            self._container = None

    def state(self) -> dict[str, Any]:
        return {"container": self._container.id}

    def run(self, *command: str) -> str:
        """Run a command inside; returns what it printed."""
        status, output = self._container.exec_run(list(command))
        text: str = output.decode(errors="replace")
        if status:
            raise RuntimeError(f"{command[0]} failed with status {status}: {text}")
        return text

    @classmethod
    def adopt(cls, state: dict[str, Any]) -> Container:
        """Control over the detached container that another process described with `state`."""
        control = cls("", port=(0, 0), env={}, command=[], detached=True)
        with _quiet():
            engine = _engine()
            from docker.errors import NotFound  # type: ignore[import-untyped, unused-ignore]

            with contextlib.suppress(NotFound):
                control._container = engine.containers.get(state["container"])
        return control

    def _status(self) -> str:
        if self._container is None:
            return "absent"
        self._container.reload()
        return str(self._container.status)

    def _create(self) -> Any:
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.container import DockerContainer

        if self._detached:
            # Its reaper would remove the container as soon as this process ends.
            testcontainers_config.ryuk_disabled = True
        inside, outside = self._port
        container = DockerContainer(self._image, env=self._env)
        # The docker SDK's form; with_bind_ports knows only ports that are open to every interface.
        container.ports[f"{inside}/tcp"] = ("127.0.0.1", outside)  # type: ignore[assignment]
        if self._command:
            container.with_command(self._command)
        return container.start().get_wrapped_container()


def require_image(image: str) -> None:
    """Return once a local Docker engine has the image, pulled if need be; raise Unavailable without one."""
    # The SDK takes half a second to import: not for a machine that has never seen Docker.
    if not os.environ.get("DOCKER_HOST") and not any(Path(path).expanduser().exists() for path in TRACES):
        raise Unavailable("no Docker engine answers")
    with _quiet(), contextlib.closing(_engine()) as engine:
        from docker.errors import (  # type: ignore[import-untyped, unused-ignore]
            DockerException,
            ImageNotFound,
        )

        if not engine.api.base_url.startswith(("http+docker://", "http://localhost", "http://127.0.0.1")):
            raise Unavailable(f"the Docker engine is on another machine ({engine.api.base_url})")
        try:
            engine.images.get(image)
        except ImageNotFound:
            print(f"pulling the Docker image {image}", file=sys.stderr)
            engine.api.timeout = 600  # seconds
            try:
                engine.images.pull(image)
            except DockerException as error:
                raise Unavailable(f"Docker cannot pull {image} ({error})") from error


def _engine() -> Any:
    """The docker SDK's client, connected as testcontainers does it; raise Unavailable if no engine answers."""
    try:
        from testcontainers.core.docker_client import DockerClient

        engine = DockerClient(timeout=ENGINE_TIMEOUT).client
        engine.ping()
        return engine
    except Exception as error:  # the SDK, requests and urllib3 each have their own
        problem = str(error)
    # The SDK leaves the socket of a failed attempt to the garbage collector, and some later test would get the
    # warning about it: collected here, where warnings are off. That takes an error that no longer holds it.
    gc.collect()
    raise Unavailable(f"no Docker engine answers ({problem})")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings are errors in our tests; those of the docker SDK are not ours to act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
