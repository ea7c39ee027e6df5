"""What counts as a lasting trouble, with a clock of the test's."""

from __future__ import annotations

import pytest

from outbox.relay import troubles
from outbox.relay.troubles import Troubles


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(troubles.time, "monotonic", lambda: now[0])
    return now


def test_what_fails_again_and_again_lasts(clock: list[float]) -> None:
    found, error = Troubles(), ValueError()
    for _ in range(3):
        found.fails("park", error)
        clock[0] += 3
    assert found.lasting(6) is error
    found.works("park")
    assert found.lasting(6) is None


def test_what_failed_once_does_not_last(clock: list[float]) -> None:
    found = Troubles()
    found.fails("park", ValueError())
    clock[0] += 7
    assert found.lasting(6) is None


def test_what_has_not_failed_for_as_long_is_over(clock: list[float]) -> None:
    found = Troubles()
    for _ in range(4):
        found.fails("park", ValueError())
        clock[0] += 3
    clock[0] += 6
    assert found.lasting(6) is None


def test_failures_far_apart_are_not_in_a_row(clock: list[float]) -> None:
    found = Troubles()
    assert found.fails("park", ValueError()) == 1
    clock[0] += 5
    assert found.fails("park", ValueError()) == 2
    clock[0] += 60
    assert found.fails("park", ValueError()) == 1


def test_the_same_trouble_is_said_once_a_minute_and_a_new_one_at_once(clock: list[float]) -> None:
    found = Troubles()

    def said(text: str) -> bool:
        found.fails("park", ValueError(text))
        return found.is_news("park")

    assert [said("away") for _ in range(5)] == [True, False, False, False, False]
    assert [said("denied"), said("denied")] == [True, False]
    news = 0
    for _ in range(90):  # three minutes
        clock[0] += 2
        news += said("denied")
    assert news == 3
    found.works("park")
    assert said("denied")  # it had gone and is back
