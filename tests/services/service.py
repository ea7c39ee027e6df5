"""The contract of a test service: where it comes from, and what tests may do to it.

A service is had from the first of these that answers:

1. the environment variable `OUTBOX_TEST_<NAME>_URL` (a server that somebody else runs);
2. Docker, through `testcontainers`, where an engine answers;
3. a local install: what is there already, else Debian's packages or Maven Central (see `install.py`).

To add a service, write one file with a subclass of `Service` and name it in `tests/services/__init__.py`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from tests.services.waiting import wait_until

READY_TIMEOUT = 90.0  # seconds; a loaded machine with two cores needs 10 for Kafka


class Unavailable(Exception):
    """This machine cannot provide the service; the message says why."""


class StartFailed(Exception):
    """The service should have started and did not; the message ends with the server's log."""


class NotOurs(Exception):
    """The server was not started here, so it cannot be stopped, killed or paused from here."""


@dataclass(frozen=True)
class Options:
    """How a server is run.

    like_production: with fsync and the full JIT compiler, for benchmarks and whatever outlives one run;
        without, the server starts quicker and a crash of the machine (not of the server) may lose its data.
    detached: the server outlives this process. Without, it dies with it, even with a SIGKILL.
    """

    like_production: bool = False
    detached: bool = False


class Control(Protocol):
    """Power over one server: a local process, a container, or none at all. Every method is idempotent."""

    source: str

    def start(self) -> None:
        """Start the server on its port with the data it had; return without waiting for readiness."""

    def stop(self) -> None:
        """End it in the orderly way, by force after a deadline; its data stay."""

    def kill(self) -> None:
        """End it with SIGKILL; its data stay."""

    def pause(self) -> None:
        """Freeze it (SIGSTOP): connections stay open and nothing answers."""

    def resume(self) -> None:
        """Let a paused server go on."""

    def running(self) -> bool:
        """Whether the server's process is alive; a paused one is."""

    def log(self) -> str:
        """The end of what it logged."""

    def discard(self) -> None:
        """End it and remove its data."""

    def state(self) -> dict[str, Any]:
        """What another process needs to take control (JSON), for servers that run detached."""


class Foreign:
    """No power: the server came by its URL."""

    source = "environment"

    def start(self) -> None:
        raise NotOurs("a server given by its URL cannot be started from here")

    stop = kill = pause = resume = start

    def running(self) -> bool:
        return True

    def log(self) -> str:
        return ""

    def discard(self) -> None:
        """Leave it as it is."""

    def state(self) -> dict[str, Any]:
        return {}


class Server:
    """A server that answers, or did until a test ended it.

    The methods block (up to READY_TIMEOUT seconds): an async test calls them with `asyncio.to_thread`.
    """

    def __init__(self, service: Service[Any], url: str, control: Control) -> None:
        self.service = service
        self.url = url
        self.control = control

    @property
    def ours(self) -> bool:
        """Whether this process may stop, kill and pause it."""
        return not isinstance(self.control, Foreign)

    def start(self) -> None:
        """Start it and return when it answers; raise StartFailed, with its log, when it does not."""
        self.control.start()
        self._wait_until_it_answers()

    def stop(self) -> None:
        """End it in the orderly way; its data stay, `restart` brings it back."""
        self.control.stop()

    def kill(self) -> None:
        """End it as a crash does (SIGKILL); its data stay, `restart` brings it back."""
        self.control.kill()

    def restart(self) -> None:
        """Have it answer again on the same port with the same data; stops it first if it still runs."""
        self.control.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers until `resume`."""
        self.control.pause()

    def resume(self) -> None:
        """Let a paused server go on."""
        self.control.resume()

    def recover(self) -> None:
        """Bring it back from whatever a test did to it: resumed, and restarted if it was stopped or killed."""
        if not self.control.running():
            self.start()
        else:
            self.control.resume()
            self._wait_until_it_answers()

    def close(self) -> None:
        """End it for good and remove its data; a server that is not ours is left alone."""
        self.control.discard()

    def _wait_until_it_answers(self) -> None:
        problem: Exception | None = None

        def answers() -> bool:
            nonlocal problem
            try:
                self.service.ping(self.url)
            except Exception as error:  # whatever a driver raises, the deadline decides
                problem = error
                return False
            return True

        if not wait_until(lambda: not self.control.running() or answers(), READY_TIMEOUT):
            raise StartFailed(self._report(f"did not answer within {READY_TIMEOUT:.0f} s ({problem})")) from problem
        if not self.control.running():
            raise StartFailed(self._report("ended while starting"))

    def _report(self, what: str) -> str:
        return f"{self.service.name} at {self.url} {what}. Its log:\n{self.control.log() or '(empty)'}"


class DatabaseServer(Server, ABC):
    """A database server that gives each test a database of its own."""

    @abstractmethod
    def create_database(self, template: str | None = None) -> str:
        """Create a database with a unique name and return its URL: empty, or a copy of the one at `template`."""

    @abstractmethod
    def drop_database(self, url: str) -> None:
        """Drop the database at `url`, with whatever a test left in it, open sessions included."""


ServerT = TypeVar("ServerT", bound=Server)


class Service(ABC, Generic[ServerT]):
    """One kind of server that tests need."""

    name: ClassVar[str]
    """In lower case; names the fixture and the environment variable."""

    how_to_get: ClassVar[str]
    """One line for a person on whose machine the service is missing."""

    @property
    def variable(self) -> str:
        """The environment variable that may hold the URL of a running server."""
        return f"OUTBOX_TEST_{self.name.upper()}_URL"

    @abstractmethod
    def ping(self, url: str) -> None:
        """Return if a server at `url` speaks the protocol and is ready for work, raise whatever fits if not.

        Takes at most a few seconds either way.
        """

    @abstractmethod
    def server(self, url: str, control: Control) -> ServerT:
        """The handle for a server at `url`."""

    @abstractmethod
    def docker(self, options: Options) -> tuple[str, Control]:
        """The URL and control of a container that is yet to be started; raise Unavailable without an engine."""

    @abstractmethod
    def local(self, options: Options) -> tuple[str, Control]:
        """The URL and control of a local server that is yet to be started, installed first if that is allowed.

        Raise Unavailable if this machine has no such server and may not or cannot install one.
        """

    def obtain(self, options: Options = Options()) -> ServerT:
        """A server that answers, from the first source that has one.

        Raise Unavailable if none has, StartFailed if a server broke while starting. A URL in the environment
        that does not answer is StartFailed as well: to take another server in silence would hide the mistake.
        """
        url = os.environ.get(self.variable)
        if url:
            return self._given(url)
        return self.obtain_own(options)

    def obtain_own(self, options: Options = Options()) -> ServerT:
        """The same, but a server of our own, which tests may kill: never the one in the environment."""
        reasons = []
        for source in (self.docker, self.local):
            try:
                url, control = source(options)
            except Unavailable as reason:
                reasons.append(str(reason))
                continue
            server = self.server(url, control)
            with discarded_on_error(server):
                server.start()
            return server
        raise Unavailable("; ".join(reasons))

    def _given(self, url: str) -> ServerT:
        try:
            self.ping(url)
        except Exception as error:
            raise StartFailed(
                f"{self.variable} is set to {url!r}, but nothing answers there ({error}). Start that server, "
                f"or unset the variable to have one started."
            ) from error
        return self.server(url, Foreign())


@contextmanager
def discarded_on_error(server: Server) -> Iterator[None]:
    """Leave nothing running when the block is left by an exception, an interrupt included."""
    try:
        yield
    except BaseException:
        server.close()
        raise
