"""What an exception says, as text that a dead letter may keep, and the part of it that a log may show.

SQLAlchemy's errors quote the statement and its parameters, drivers the row that they refuse: that is the user's data, and not
kept. Other exceptions' texts are kept in the dead letter, beside the payload, and never logged: they can quote it.
"""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Iterator
from typing import Final

import sqlalchemy as sa

from outbox._refusals import words
from outbox.errors import DecodingError, OutboxError

_CAUSE: Final = "\nThe above exception was the direct cause of the following exception:\n\n"
_CONTEXT: Final = "\nDuring handling of the above exception, another exception occurred:\n\n"
_QUOTES: Final = ("[SQL: ", "[parameters: ")
_GROUP: Final = 15  # exceptions of a group that are shown

LOG_LENGTH: Final = 600  # characters of our own words


def type_of(error: BaseException) -> str:
    """The exception's class, with its module where that is not Python's own."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def message_of(error: BaseException) -> str:
    """The exception's text. Of SQLAlchemy's the driver's first line alone: what follows it (PostgreSQL's DETAIL) quotes the
    row, and then come the statement and its parameters. The same is cut off where another exception's text quotes one."""
    if isinstance(error, sa.exc.StatementError) and error.orig is not None:
        return f"({type_of(error.orig)}) {words(error.orig)}"
    return _without_statement(_text(error))


def stack_of(error: BaseException) -> str:
    """As Python prints it, each exception with its `message_of`."""
    chain = list(_chain(error))
    # the driver's error is the cause of SQLAlchemy's, with the same row in its text
    drivers = {id(one.orig) for one, _ in chain if isinstance(one, sa.exc.StatementError)}
    return "".join(_one(one, id(one) in drivers) + link for one, link in reversed(chain))


def own_words(error: BaseException) -> str:
    """The first line of what this library says itself, or a handler with `Retry` and `Drop`; else nothing. Ends where it
    goes on with a foreign exception's text."""
    if not isinstance(error, OutboxError):
        return ""
    line = _first_line(_text(error))
    if isinstance(error, DecodingError) and error.__cause__ is not None:
        line = line.partition(": ")[0]
    return line[:LOG_LENGTH]


def _chain(error: BaseException) -> Iterator[tuple[BaseException, str]]:
    """The exception and those before it, each with the sentence that leads to the one after it."""
    seen: set[int] = set()
    one: BaseException | None = error
    link = ""
    while one is not None and id(one) not in seen:
        yield one, link
        seen.add(id(one))
        if one.__cause__ is not None:
            one, link = one.__cause__, _CAUSE
        else:
            one, link = None if one.__suppress_context__ else one.__context__, _CONTEXT


def _one(error: BaseException, drivers: bool) -> str:
    message = words(error) if drivers else message_of(error)
    notes = [_without_statement(str(note)) for note in getattr(error, "__notes__", ())]
    text = "\n".join([f"{type_of(error)}: {message}" if message else type_of(error), *notes]) + "\n"
    if error.__traceback__ is not None:
        text = "Traceback (most recent call last):\n" + "".join(traceback.format_tb(error.__traceback__)) + text
    if isinstance(error, BaseExceptionGroup):
        for number, one in enumerate(error.exceptions[:_GROUP], 1):
            text += f"  +-- {number}\n" + textwrap.indent(stack_of(one), "  | ", lambda line: True)
    return text


def _without_statement(text: str) -> str:
    quoted = [at for mark in _QUOTES if (at := text.find(mark)) >= 0]
    return text[: min(quoted)].partition("\nDETAIL:")[0].rstrip() if quoted else text


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return f"<unprintable {type(error).__name__}>"


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else ""
