"""`python -m tests.services start|stop|status [name …]`: servers that outlive the command, for `make services`.

What runs is kept in `.services/`, one JSON file per service. `start` and `status` print a line
`export OUTBOX_TEST_<NAME>_URL=…` per running service on stdout and nothing else there, for a shell to eval.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.services import SERVICES, Options, Server, Service, StartFailed, Unavailable
from tests.services.container import Container
from tests.services.process import LocalProcess
from tests.services.service import Control

STATE = Path(__file__).resolve().parents[2] / ".services"
CONTROLS: dict[str, Any] = {"local": LocalProcess, "docker": Container}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.services", description="Start and stop test servers.")
    parser.add_argument("command", choices=["start", "stop", "status"])
    parser.add_argument("names", nargs="*", metavar="name", help=f"default: all ({', '.join(SERVICES)})")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(SERVICES))
    if unknown:
        parser.error(f"no such service: {', '.join(unknown)} (there are: {', '.join(SERVICES)})")
    command = {"start": start, "stop": stop, "status": status}[options.command]
    with _locked():
        # Each service has its turn, whatever became of the ones before it.
        results = [command(SERVICES[name]) for name in options.names or SERVICES]
    return 0 if all(results) else 1


def start(service: Service[Any]) -> bool:
    """Have the service run, and print its export line; False if it cannot be had."""
    server = _running(service)
    if server is not None:
        _say(f"{service.name}: runs already")
    else:
        try:
            server = service.obtain_own(Options(like_production=True, detached=True))
        except Unavailable as reason:
            _say(f"{service.name}: {reason}. To get it: {service.how_to_get}.")
            return False
        except StartFailed as failure:
            _say(str(failure))
            return False
        state = {"url": server.url, "source": server.control.source, **server.control.state()}
        _file(service).write_text(json.dumps(state, indent=2))
        _say(f"{service.name}: started ({server.control.source})")
    _print_export(service, server)
    return True


def stop(service: Service[Any]) -> bool:
    """Stop the service and remove its data."""
    server = _recorded(service)
    if server is None:
        _say(f"{service.name}: was not started from here")
        return True
    server.close()
    _file(service).unlink()
    _say(f"{service.name}: stopped")
    return True


def status(service: Service[Any]) -> bool:
    """Print the export line of a service that answers; False if it does not."""
    server = _running(service)
    if server is None:
        _say(f"{service.name}: does not run")
        return False
    _print_export(service, server)
    return True


def _running(service: Service[Any]) -> Server | None:
    """The server that was started before, if it still answers; what is left of it is cleared away if not."""
    server = _recorded(service)
    if server is None:
        return None
    if server.control.running():
        try:
            service.ping(server.url)
        except Exception as error:
            _say(f"{service.name}: no longer answers ({error})")
        else:
            return server
    server.close()
    _file(service).unlink()
    return None


def _recorded(service: Service[Any]) -> Server | None:
    try:
        state = json.loads(_file(service).read_text())
    except FileNotFoundError:
        return None
    control: Control = CONTROLS[state["source"]].adopt(state)
    return Server(service, state["url"], control)


def _file(service: Service[Any]) -> Path:
    return STATE / f"{service.name}.json"


@contextmanager
def _locked() -> Iterator[None]:
    """One command at a time, so that two do not start the same service."""
    STATE.mkdir(exist_ok=True)
    with (STATE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _print_export(service: Service[Any], server: Server) -> None:
    print(f"export {service.variable}={shlex.quote(server.url)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
