"""The demo's conductor: places orders, runs the relay and the consumer as child processes, and kills them."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox.errors import OutboxError


class DemoFailed(OutboxError):
    """A child of the demo died by itself, or the messages did not come through in time. Shows the end of its log."""


@dataclass
class Child:
    """A relay or consumer process, started again when it was killed."""

    name: str
    arguments: list[str]
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    kills: int = 0

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "outbox", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )

    def kill(self) -> None:
        """SIGKILL, as a crash or the OOM killer would, then start it again."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.kills += 1
        self.start()

    def check(self) -> None:
        if self.process is not None and self.process.poll() is not None:
            raise DemoFailed(f"the {self.name} ended with status {self.process.returncode}:\n{self.tail()}")

    def stop(self, timeout: float = 15.0) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


@dataclass
class Placed:
    """Orders so far, by the threads that place them. For progress only: the counts at the end come from the database."""

    committed: int = 0
    rolled_back: int = 0
    errors: list[BaseException] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def place_orders(
    engine: sa.Engine, orders: int, customers: int, poison: int, threads: int, placed: Placed, seed: int
) -> threading.Thread:
    """Place ``orders`` orders that commit, and one in twenty more that rolls back, in the background."""
    from outbox.cli.demo.shop import CannotRollBack, place_order

    rng = random.Random(seed)
    poisoned = set(rng.sample(range(orders), min(poison, orders)))
    jobs = iter([(n, rng.randrange(1, customers + 1), rng.random() < 0.05) for n in range(orders)])

    def work() -> None:
        try:
            while True:
                with placed.lock:
                    job = next(jobs, None)
                if job is None:
                    return
                number, customer, also_roll_back = job
                if also_roll_back:
                    with contextlib.suppress(CannotRollBack), Session(engine) as session, session.begin():
                        place_order(session, customer, fail=True)
                    with placed.lock:
                        placed.rolled_back += 1
                with Session(engine) as session, session.begin():
                    place_order(session, customer, voucher="5%" if number in poisoned else "")
                with placed.lock:
                    placed.committed += 1
        except BaseException as error:
            placed.errors.append(error)

    def all_of_them() -> None:
        workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    conductor = threading.Thread(target=all_of_them, daemon=True)
    conductor.start()
    return conductor


@contextlib.contextmanager
def data_folder(keep: bool) -> Iterator[Path]:
    if keep:
        yield Path(tempfile.mkdtemp(prefix="outbox-demo-"))
    else:
        with tempfile.TemporaryDirectory(prefix="outbox-demo-") as folder:
            yield Path(folder)


def wait_until(done: Callable[[], bool], children: list[Child], seconds: float, what: str) -> None:
    """Poll ``done`` until it is true; a child that died, or the deadline, is a `DemoFailed`."""
    deadline = time.monotonic() + seconds
    while not done():
        for child in children:
            child.check()
        if time.monotonic() > deadline:
            logs = "\n".join(f"--- {child.name}\n{child.tail()}" for child in children)
            raise DemoFailed(f"{what} did not happen within {seconds:.0f} s\n{logs}")
        time.sleep(0.2)
