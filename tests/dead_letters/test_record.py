"""What a dead letter keeps, and that it is written once."""

from __future__ import annotations

import datetime as dt

import pytest

from outbox._message import new_id
from outbox.dead_letters.record import Failure, now, record, write
from outbox.transport import Outcome
from tests.dead_letters.conftest import ON_EACH
from tests.dead_letters.graveyard import Graveyard


@ON_EACH
def test_it_is_written_once_for_a_consumer_message_and_cycle(graveyard: Graveyard) -> None:
    id = new_id()
    rows = [
        record(
            Failure("rejected"),
            consumer=consumer,
            message_id=id,
            cycle=cycle,
            topic="orders",
            key=None,
            type=None,
            payload=None,
            content_type=None,
            headers=None,
            attempts=1,
        )
        for consumer, cycle in (("billing", 0), ("billing", 0), ("shipping", 0), ("billing", 1), ("", 0), ("", 0))
    ]
    with graveyard.engine.begin() as connection:
        written = [write(connection, graveyard.tables, row) for row in rows]
    assert written == [True, False, True, True, True, False]
    assert len(graveyard.rows("dead_letter")) == 4


def test_the_relays_dead_letter_keeps_the_message_as_it_was(graveyard: Graveyard) -> None:
    id = graveyard.bury_unsent(41, headers='{"tenant": "a"}')
    (letter,) = graveyard.letters.find(consumer="")
    assert (letter.message_id, letter.consumer, letter.offset, letter.partition) == (id, "", 41, None)
    assert (letter.payload, letter.content_type, letter.headers) == (b"\x00bytes", "text/plain", {"tenant": "a"})
    assert (letter.reason, letter.exception_type, letter.exception_message) == ("rejected", None, "too large")


@ON_EACH
def test_the_clock_is_the_databases(graveyard: Graveyard) -> None:
    graveyard.bury()
    with graveyard.engine.connect() as connection:
        (letter,) = graveyard.letters.find()
        passed = now(connection) - letter.dead_at
    assert dt.timedelta(0) <= passed < dt.timedelta(minutes=1)


def test_the_app_version_comes_from_the_environment(graveyard: Graveyard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_APP_VERSION", "shop 4.2")
    id = graveyard.bury()
    letter = graveyard.letters.get(id)
    assert letter is not None
    assert letter.app_version == "shop 4.2"


@ON_EACH
def test_text_that_no_database_takes_is_kept_readable(graveyard: Graveyard) -> None:
    failure = Failure.of("rejected", ValueError("nul \x00, surrogate \udc80, é"))
    id = graveyard.bury(failure)
    letter = graveyard.letters.get(id)
    assert letter is not None
    assert letter.exception_message == "nul \\x00, surrogate \\udc80, é"


def test_the_end_of_a_long_stack_is_kept() -> None:
    failure = Failure.of("rejected", ValueError("é" * 10_000))
    assert failure.stack is not None
    assert len(failure.stack.encode()) <= 8 * 1024
    assert failure.stack.rstrip().endswith("é")
    assert failure.exception_message is not None
    assert len(failure.exception_message.encode()) <= 8 * 1024
    assert failure.exception_message.startswith("é")


def test_of_an_outcome_the_reason_is_the_message() -> None:
    plain = Failure.of_outcome("rejected", Outcome.reject("too large"))
    assert (plain.reason, plain.exception_type, plain.exception_message) == ("rejected", None, "too large")
    caused = Failure.of_outcome("retries-exhausted", Outcome.retry("timed out", TimeoutError("after 3 s")))
    assert (caused.exception_type, caused.exception_message) == ("TimeoutError", "timed out")
    assert "after 3 s" in str(caused.stack)
