"""A server as a local process: started, killed, paused, and gone when its runner is."""

from __future__ import annotations

import atexit
import contextlib
import os
import pwd
import queue
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any

import psutil  # type: ignore[import-untyped]  # it has no stubs of its own

from tests.services.waiting import wait_until

STOP_TIMEOUT = 20.0  # seconds until a server that was asked to end is killed
LOG_TAIL = 6_000  # characters of log in an error message
FOLDER_PREFIX = "pyoutbox-test-"


@dataclass
class LocalProcess:
    """Control over one local server process and the processes it starts.

    command: what to run, in the foreground; its output goes to `folder/log`.
    folder: all the server's data; `discard` removes it.
    user: the user to run it as, where we are root; None for ourselves.
    stop_signal: asks for an orderly end.
    discard_by_kill: for a server that takes its time over an orderly end and leaves nothing behind without.
    detached: it outlives this process. Otherwise it is killed with it, however this process ends (Linux).
    """

    command: Sequence[str]
    folder: Path
    user: str | None = None
    stop_signal: int = SIGTERM
    discard_by_kill: bool = False
    detached: bool = False
    source: str = field(default="local", init=False)
    process: psutil.Process | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.detached:
            # For whoever forgets `discard`, and for exits that skip the finalizers of fixtures.
            atexit.register(self.discard)

    def start(self) -> None:
        if self.running():
            return
        command = [*_guard(self.user, self.detached), *self.command]
        with (self.folder / "log").open("ab") as log:
            self.process = _in_lasting_thread(
                lambda: psutil.Popen(
                    command,
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C in the terminal is for the runner, which then ends its servers in order.
                    start_new_session=True,
                )
            )

    def stop(self) -> None:
        process = self.process
        if process is None or not self.running():
            return
        self.resume()  # a paused process does not hear the signal
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(self.stop_signal)
        if not wait_until(lambda: not _alive(process), STOP_TIMEOUT):
            self.kill()

    def kill(self) -> None:
        tree = self._tree()
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(SIGKILL)
        if not wait_until(lambda: not any(_alive(process) for process in tree), STOP_TIMEOUT):
            raise RuntimeError(f"still alive after SIGKILL: {tree}")

    def pause(self) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(SIGSTOP)

    def resume(self) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(SIGCONT)

    def running(self) -> bool:
        return self.process is not None and _alive(self.process)

    def log(self) -> str:
        try:
            return (self.folder / "log").read_text(errors="replace")[-LOG_TAIL:]
        except FileNotFoundError:
            return ""

    def discard(self) -> None:
        atexit.unregister(self.discard)
        if not self.discard_by_kill:
            self.stop()
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def state(self) -> dict[str, Any]:
        assert self.process is not None
        return {
            "pid": self.process.pid,
            "created": self.process.create_time(),
            "folder": str(self.folder),
            "stop_signal": int(self.stop_signal),
            "discard_by_kill": self.discard_by_kill,
        }

    @classmethod
    def adopt(cls, state: dict[str, Any]) -> LocalProcess:
        """Control over the detached server that another process described with `state`."""
        control = cls(
            [],
            Path(state["folder"]),
            stop_signal=state["stop_signal"],
            discard_by_kill=state["discard_by_kill"],
            detached=True,
        )
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(state["pid"])
            # Pids are used again: only the process that started at that time is the server.
            if abs(process.create_time() - state["created"]) < 1:
                control.process = process
        return control

    def _tree(self) -> list[psutil.Process]:
        """The server and its descendants; PostgreSQL's each lead a session of their own, no group holds them."""
        if self.process is None or not self.running():
            return []
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _alive(process: psutil.Process) -> bool:
    """Whether it still runs. A zombie does not: it waits for whoever adopted it, and that may take seconds."""
    if isinstance(process, psutil.Popen):
        return bool(process.poll() is None)  # reaps it, too
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def new_folder(name: str, *, detached: bool, user: str | None = None) -> Path:
    """An empty folder for one server's data, on a path that `user` can reach, and owned by that user."""
    base = Path(tempfile.gettempdir()).resolve()
    if user is not None and not all(parent.stat().st_mode & 0o001 for parent in (base, *base.parents)):
        base = Path("/var/tmp")  # TMPDIR is private to us
    _sweep(base)
    owner = "kept" if detached else str(os.getpid())
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{name}-{owner}-", dir=base))
    if user is not None:
        account = pwd.getpwnam(user)
        os.chown(folder, account.pw_uid, account.pw_gid)
    return folder


def _sweep(base: Path) -> None:
    """Remove the folders of runners that were killed before they could."""
    for folder in base.glob(f"{FOLDER_PREFIX}*-*-*"):
        owner = folder.name.split("-")[-2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def unprivileged(preferred: str) -> str | None:
    """The user to run a server as that is not to run as root; None for ourselves, where we are not root.

    The preferred one often comes with a package that tests can do without.
    """
    if os.geteuid() != 0:
        return None
    return preferred if any(account.pw_name == preferred for account in pwd.getpwall()) else "nobody"


def run_as(user: str | None, command: Sequence[str], *, cwd: Path) -> None:
    """Run a preparing command to its end; raise RuntimeError with its output if it fails."""
    result = subprocess.run(
        [*_guard(user, detached=True), *command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed with status {result.returncode}:\n{result.stdout[-LOG_TAIL:]}")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free.

    Below the range that the kernel gives to outgoing connections: while a test has its server down, a client
    that tries again and again could otherwise be given the server's port as its own end, and keep it.
    """
    for port in random.sample(range(15_000, 30_000), 100):
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port between 15000 and 30000")


def can_connect(host: str, port: int) -> bool:
    """Whether something accepts TCP connections there."""
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False


def _guard(user: str | None, detached: bool) -> list[str]:
    """What to put before a command so that it runs as `user` and, unless detached, dies with this process.

    setpriv executes the command in its own place: the pid we hold is the server's.
    """
    if not sys.platform.startswith("linux"):
        return []
    guard = ["setpriv"]
    if user is not None:
        guard += [f"--reuid={user}", f"--regid={user}", "--init-groups"]
    if not detached:
        guard += ["--pdeathsig", "KILL"]
    return guard if len(guard) > 1 else []


@cache
def _jobs() -> queue.SimpleQueue[Callable[[], None]]:
    jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            jobs.get()()

    threading.Thread(target=work, name="starts test servers", daemon=True).start()
    return jobs


def _in_lasting_thread(start: Callable[[], psutil.Popen]) -> psutil.Popen:
    """Call `start` in a thread that lives as long as this process.

    The kernel sends the parent-death signal when the *thread* that started the child ends: a server that a
    test restarts in a worker thread would be killed with that worker.
    """
    started: queue.SimpleQueue[psutil.Popen | BaseException] = queue.SimpleQueue()

    def job() -> None:
        try:
            started.put(start())
        except BaseException as error:
            started.put(error)

    _jobs().put(job)
    result = started.get()
    if isinstance(result, BaseException):
        raise result
    return result
