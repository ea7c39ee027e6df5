"""How a dead letter is written, by the relay and by consumers alike: always inside the transaction that ends the message's
old life, so that it exists exactly once."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import sysconfig
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import sqlalchemy as sa

from outbox._message import new_id
from outbox._outgoing import Outgoing
from outbox.dead_letters.exception_text import message_of, stack_of, type_of
from outbox.dialects import UtcDateTime, clock, insert_if_absent, was_absent
from outbox.tables import Tables
from outbox.transport import Outcome

STACK_BYTES: Final = 8 * 1024
"""Of the stack, and of the exception's message: the end of the stack is kept, and the beginning of the message."""

RELAY: Final = ""
"""The ``consumer`` of the relay's own dead letters."""

Reason = Literal["undeserializable", "no-handler", "rejected", "retries-exhausted", "crashed", "expired"]
State = Literal["open", "replayed", "discarded"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a message is given up, as text that any database can store."""

    reason: Reason
    exception_type: str | None = None
    exception_message: str | None = None
    stack: str | None = field(default=None, repr=False)
    frame: str = ""
    """The innermost frame in the user's code, as ``module:function``; without a line number, so that a deployment that
    moves the line does not make a new group."""
    place: str = ""
    """The same as ``file:line``, for a log; not stored."""

    @classmethod
    def of(cls, reason: Reason, error: BaseException, *, module: str | None = None) -> Failure:
        """From an exception; what it quotes of statements is left out. ``module``: where the handler is defined, whose whole
        package counts as the user's code even where it is installed as a wheel."""
        frame, place = _users_frame(error.__traceback__, module)
        message, stack = _head(message_of(error)), _tail(stack_of(error))
        return cls(reason, type_of(error)[:255], message, stack, frame, place)

    @classmethod
    def of_outcome(cls, reason: Reason, outcome: Outcome) -> Failure:
        """From what a transport said of a message."""
        if outcome.error is None:
            return cls(reason, exception_message=_head(outcome.reason))
        of_error = cls.of(reason, outcome.error)
        return cls(reason, of_error.exception_type, _head(outcome.reason), of_error.stack, of_error.frame)


def fingerprint(failure: Failure, consumer: str, type: str | None) -> str:
    """Eight hexadecimal digits, in upper case, that failures of one cause have in common: exception type (without one:
    the reason), first frame in the user's code, consumer and message type. Stable across processes and releases."""
    parts = (failure.exception_type or failure.reason, failure.frame, consumer, type or "")
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "replace")).hexdigest()[:8].upper()


def record(
    failure: Failure,
    *,
    consumer: str,
    message_id: uuid.UUID,
    cycle: int,
    topic: str,
    key: str | None,
    type: str | None,
    payload: bytes | None,
    content_type: str | None,
    headers: str | None,
    attempts: int,
    partition: int | None = None,
    offset: int | None = None,
    bucket: int | None = None,
    raw_key: bytes | None = None,
    created_at: dt.datetime | None = None,
    first_failed_at: dt.datetime | None = None,
    app_version: str | None = None,
) -> dict[str, Any]:
    """The parameters of one row of ``dead_letter``: open, under a new id. ``headers`` is a JSON object as text,
    ``attempts`` how often the message was tried. ``app_version`` defaults to ``OUTBOX_APP_VERSION``."""
    version = app_version or os.environ.get("OUTBOX_APP_VERSION") or None
    return {
        "id": new_id(),
        "consumer": consumer,
        "message_id": message_id,
        "cycle": cycle,
        "topic": topic,
        "partition": partition,
        "offset": offset,
        "bucket": bucket,
        "key": key,
        "raw_key": raw_key,
        "type": type,
        "payload": payload,
        "content_type": content_type,
        "headers": headers,
        "created_at": created_at,
        "reason": failure.reason,
        "exception_type": failure.exception_type,
        "exception_message": failure.exception_message,
        "stack": failure.stack,
        "fingerprint": fingerprint(failure, consumer, type),
        "attempts": attempts,
        "first_failed_at": first_failed_at,
        "app_version": None if version is None else version[:64],
        "state": "open",
    }


def write(connection: sa.Connection, tables: Tables, row: dict[str, Any]) -> bool:
    """Write one `record` in the transaction of ``connection``. False: there is one of that consumer, message and cycle
    already, and nothing was changed. Asked by conflict clause, so a repeated transaction does not write it twice."""
    dialect = connection.dialect.name
    return was_absent(connection.execute(insert_if_absent(tables.dead_letter, dialect), row), dialect)


def write_relay(
    connection: sa.Connection,
    tables: Tables,
    row: Outgoing,
    *,
    message_id: uuid.UUID,
    cycle: int,
    created_at: dt.datetime | None,
    first_failed_at: dt.datetime | None,
    attempts: int,
    failure: Failure,
) -> bool:
    """Write the dead letter of a message that the relay gives up. Its ``offset`` is the message's old position: what
    orders the messages of a key when they are replayed."""
    return write(
        connection,
        tables,
        record(
            failure,
            consumer=RELAY,
            message_id=message_id,
            cycle=cycle,
            topic=row.topic,
            key=row.key,
            type=row.type,
            payload=row.payload,
            content_type=row.content_type,
            headers=row.headers,
            attempts=attempts,
            offset=row.position,
            bucket=row.bucket,
            created_at=created_at,
            first_failed_at=first_failed_at,
        ),
    )


def now(connection: sa.Connection) -> dt.datetime:
    """The database's clock: what is compared with ``dead_at`` comes from where that came from."""
    found: dt.datetime = connection.execute(sa.select(sa.type_coerce(clock(), UtcDateTime()))).scalar_one()
    return found


# ---------------------------------------------------------------- whose code a frame is

_OURS: Final = str(Path(__file__).resolve().parent.parent) + os.sep
_STANDARD: Final = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) + os.sep for name in ("stdlib", "platstdlib")}
)  # fmt: skip
_INSTALLED: Final = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


def _users_frame(trace: TracebackType | None, module: str | None) -> tuple[str, str]:
    package = module.partition(".")[0] if module else None
    found = place = ""
    while trace is not None:
        code, name = trace.tb_frame.f_code, trace.tb_frame.f_globals.get("__name__", "")
        if (package and name.partition(".")[0] == package) or _is_users(code.co_filename):
            found = f"{name}:{code.co_qualname}"
            place = f"{code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found, place


def _is_users(file: str) -> bool:
    if file.startswith("<"):
        return False
    return not file.startswith((_OURS, *_STANDARD)) and not any(part in file for part in _INSTALLED)


# ---------------------------------------------------------------- text that every database takes


def storable(text: str) -> str:
    """Text without what databases refuse: NUL characters (PostgreSQL) and lone surrogates (all of them)."""
    if "\x00" in text:
        text = text.replace("\x00", "\\x00")
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _head(text: str) -> str:
    text = storable(text)
    data = text.encode()
    return text if len(data) <= STACK_BYTES else data[: STACK_BYTES - 3].decode(errors="ignore") + "…"


def _tail(text: str) -> str:
    text = storable(text)
    data = text.encode()
    return text if len(data) <= STACK_BYTES else "…" + data[3 - STACK_BYTES :].decode(errors="ignore")
