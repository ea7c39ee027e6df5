"""A server as a Docker container, through testcontainers."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.services.process import LOG_TAIL
from tests.services.service import Unavailable

ENGINE_TIMEOUT = 5  # seconds to answer a ping
SOCKETS = ("/var/run/docker.sock", "~/.docker/run/docker.sock", "~/.colima/default/docker.sock")


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

    @classmethod
    def adopt(cls, state: dict[str, Any]) -> Container:
        """Control over the detached container that another process described with `state`."""
        control = cls("", port=(0, 0), env={}, command=[], detached=True)
        with _quiet():
            import docker

            with contextlib.suppress(docker.errors.NotFound):
                control._container = docker.from_env().containers.get(state["container"])
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
        # The SDK's own argument: with_bind_ports would publish the port on every interface.
        container.with_kwargs(ports={f"{inside}/tcp": ("127.0.0.1", outside)})
        if self._command:
            container.with_command(self._command)
        return container.start().get_wrapped_container()


def require_image(image: str) -> None:
    """Return once a Docker engine has the image, pulled if need be; raise Unavailable if there is none."""
    local = os.environ.get("DOCKER_HOST") or any(Path(path).expanduser().exists() for path in SOCKETS)
    if not local:
        raise Unavailable("no Docker engine answers")
    with _quiet():
        try:
            import docker

            client = docker.from_env(timeout=ENGINE_TIMEOUT)
        except Exception as error:
            raise Unavailable(f"no Docker engine answers ({error})") from error
        with contextlib.closing(client):
            try:
                client.ping()
                client.api.timeout = 600  # seconds; a pull may take its time
                client.images.get(image)
            except docker.errors.ImageNotFound:
                try:
                    client.images.pull(image)
                except Exception as error:
                    raise Unavailable(f"Docker cannot pull {image} ({error})") from error
            except Exception as error:
                raise Unavailable(f"no Docker engine answers ({error})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings are errors in our tests; those of the docker SDK are not ours to act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
