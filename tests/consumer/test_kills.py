"""The consumer's process is killed at each window; afterwards everything is counted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.consumer.billing import TIMEOUT, Billing, placed, until


class Child:
    """The consumer as a process of its own."""

    def __init__(self, billing: Billing, folder: Path) -> None:
        self.billing = billing
        self.tries_file = folder / "tries"
        self.log = folder / "child.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, where: str = "nowhere") -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.consumer.child", self.billing.url, self.billing.transport_url, where],
                env={**os.environ, "TRIES": str(self.tries_file)},
                stdout=log,
                stderr=log,
            )

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(TIMEOUT)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def tries(self) -> list[int]:
        return [int(line) for line in self.tries_file.read_text().split()] if self.tries_file.exists() else []


@pytest.fixture
def durable_billing(database_url: str, tmp_path: Path) -> Iterator[Billing]:
    """With a broker that outlives processes."""
    service = Billing(database_url, f"local:///{tmp_path / 'broker.db'}?session=1")
    yield service
    service.close()


@pytest.fixture
def child(durable_billing: Billing, tmp_path: Path) -> Iterator[Child]:
    child = Child(durable_billing, tmp_path)
    yield child
    child.kill()


async def test_a_crash_between_the_effects_commit_and_the_ack_does_not_repeat_the_effect(
    durable_billing: Billing, child: Child
) -> None:
    billing = durable_billing
    await billing.publish(placed(1))
    child.start("before ack")
    assert child.wait() == -signal.SIGKILL
    assert billing.charges() == [1]  # committed, and the broker does not know

    child.start()
    await billing.publish(placed(2))
    await until(lambda: len(billing.charges()) == 2)
    assert child.stop() == 0
    assert billing.charges() == [1, 2]
    assert child.tries() == [1, 2]  # delivered again, and skipped before its handler
    assert [row["key"] for row in billing.rows("message")] == ["1", "2"]


async def test_a_crash_between_a_dead_letter_and_its_ack_does_not_double_it(
    durable_billing: Billing, child: Child
) -> None:
    billing = durable_billing
    await billing.publish(placed(-1))
    child.start("before ack")
    assert child.wait() == -signal.SIGKILL
    assert len(billing.dead()) == 1

    child.start()
    await billing.publish(placed(2))
    await until(lambda: len(billing.charges()) == 1)
    assert child.stop() == 0
    assert [letter.attempts for letter in billing.dead()] == [3]
    assert child.tries() == [-1, -1, -1, 2]


async def test_a_crash_in_the_handler_leaves_nothing_and_the_message_comes_again(
    durable_billing: Billing, child: Child
) -> None:
    billing = durable_billing
    await billing.publish(placed(1))
    child.start("in the handler")
    assert child.wait() == -signal.SIGKILL
    assert billing.charges() == []
    assert billing.rows("inbox") == []

    child.start()
    await until(billing.charges)
    assert child.stop() == 0
    assert (billing.charges(), child.tries()) == ([1], [1, 1])


async def test_attempts_survive_a_crash_after_each_of_them(durable_billing: Billing, child: Child) -> None:
    billing = durable_billing
    await billing.publish(placed(-1))
    for attempts in (1, 2):
        child.start("after the attempt")
        assert child.wait() == -signal.SIGKILL
        assert [row["attempts"] for row in billing.rows("attempt")] == [attempts]
    child.start()
    await until(billing.dead)
    assert child.stop() == 0
    assert child.tries() == [-1, -1, -1]
    assert [letter.attempts for letter in billing.dead()] == [3]


@pytest.mark.parametrize("where", ["before ack", "in the handler"])
async def test_a_replay_that_is_killed_has_its_effect_once(durable_billing: Billing, child: Child, where: str) -> None:
    billing = durable_billing
    await billing.publish(placed(-1), placed(-2))
    child.start()
    await until(lambda: len(billing.dead()) == 2)
    assert child.stop() == 0
    mend(billing)
    billing.letters.replay(consumer="billing")
    if where == "in the handler":
        child.start(where)
        assert child.wait() == -signal.SIGKILL
        assert billing.charges() == []
        billing.expire_replay_leases()
    child.start()
    await until(lambda: len(billing.charges()) == 2)
    child.kill()
    billing.expire_replay_leases()
    child.start()
    await billing.publish(placed(3))
    await until(lambda: len(billing.charges()) == 3)
    assert child.stop() == 0
    assert sorted(billing.charges()) == [1, 2, 3]
    assert billing.rows("attempt") == []


def mend(billing: Billing) -> None:
    """What the handler stumbled over is put right in the dead letters: their orders get a positive number."""
    import sqlalchemy as sa

    letter = billing.tables.dead_letter
    with billing.engine.begin() as connection:
        for row in connection.execute(sa.select(letter.c.id, letter.c.payload)).all():
            connection.execute(
                sa.update(letter).where(letter.c.id == row.id).values(payload=row.payload.replace(b"-", b""))
            )


async def test_whatever_moment_it_is_killed_at_every_message_has_its_effect_exactly_once(
    durable_billing: Billing, child: Child
) -> None:
    billing = durable_billing
    count, kills = 200, 0
    dice = random.Random(20261122)
    child.start()
    for start in range(0, count, 20):
        await billing.publish(*(placed(number, key=str(number % 10)) for number in range(start, start + 20)))
        child_lives_until = time.monotonic() + dice.uniform(0.0, 0.6)
        before = len(billing.charges())
        await until(
            lambda t=child_lives_until, n=before: time.monotonic() > t and len(billing.charges()) > n  # type: ignore[misc]
        )
        child.kill()
        kills += 1
        child.start()
    await until(lambda: len(set(billing.charges())) == count)
    assert child.stop() == 0
    charges = billing.charges()
    assert (len(charges), len(set(charges))) == (count, count)
    assert [row["outcome"] for row in billing.rows("inbox")] == ["done"] * count
    assert len(billing.rows("message")) == count  # one outgoing message for each effect
    assert kills == 10
    by_key = [[number for number in charges if number % 10 == key] for key in range(10)]
    assert by_key == [sorted(numbers) for numbers in by_key]
