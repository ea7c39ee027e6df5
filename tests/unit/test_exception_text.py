"""Exceptions as text for dead letters: like Python's own tracebacks, without what statements held."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest

from outbox.dead_letters.exception_text import message_of, own_words, stack_of
from outbox.errors import ConfigurationError, DecodingError


def plain() -> None:
    raise ValueError("no")


def empty() -> None:
    raise ValueError


def caused() -> None:
    try:
        plain()
    except ValueError as error:
        raise KeyError("key") from error


def handled() -> None:
    try:
        plain()
    except ValueError:
        raise KeyError("key")  # noqa: B904


def suppressed() -> None:
    try:
        plain()
    except ValueError:
        raise KeyError("key") from None


def noted() -> None:
    error = ConfigurationError("wrong")
    error.add_note("a note\nof two lines")
    raise error


def recursive(depth: int = 100) -> None:
    # not to Python's limit: whatever the garbage collector finalizes up there fails, whoever left it
    if not depth:
        raise RecursionError("deep enough")
    recursive(depth - 1)


def caught(function: Callable[[], None]) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("function", [plain, empty, caused, handled, suppressed, noted, recursive])
def test_it_reads_as_python_writes_it(function: Callable[[], None]) -> None:
    error = caught(function)
    assert stack_of(error) == "".join(traceback.format_exception(error))


def test_a_group_shows_what_it_holds() -> None:
    error = caught(lambda: (_ for _ in ()).throw(ExceptionGroup("both", [caught(caused), caught(plain)])))
    stack = stack_of(error)
    for part in ("ExceptionGroup: both (2 sub-exceptions)", "KeyError: 'key'", "in plain", "ValueError: no"):
        assert part in stack


def test_a_chain_that_bites_its_tail_ends() -> None:
    first, second = ValueError("1"), ValueError("2")
    first.__cause__, second.__cause__ = second, first
    assert stack_of(first).count("ValueError: 2") == 1


def test_an_exception_that_cannot_be_printed_is_named() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert "unprintable" in message_of(Broken())
    assert "Broken" in stack_of(Broken())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("secret"), ""),
        (ConfigurationError("ours\nand more"), "ours"),
        (DecodingError("the message is a tombstone: annotate it"), "the message is a tombstone: annotate it"),
    ],
)
def test_our_own_words(error: BaseException, words: str) -> None:
    assert own_words(error) == words


def test_our_own_words_end_where_a_foreign_error_is_quoted() -> None:
    error = DecodingError("the payload is no Order: Invalid enum value 'secret'")
    error.__cause__ = ValueError("Invalid enum value 'secret'")
    assert own_words(error) == "the payload is no Order"
