"""What a log and a dead letter say of a failing handler: where it was, and nothing that statements or payloads hold."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Drop, Retry
from outbox.consumer import Retries
from tests.consumer.billing import QUICKLY, Billing, Charge, OrderPlaced, placed, running, until_finished
from tests.consumer.conftest import ON_EACH

SECRET = "4111-1111"


def place_of(text: str) -> str:
    """file:line of the line in this file that ends with a mark."""
    with open(__file__) as file:
        for number, line in enumerate(file, 1):
            if line.rstrip().endswith(f"# {text}"):
                return f"{__file__}:{number}"
    raise AssertionError(text)


async def given_up(
    billing: Billing, caplog: pytest.LogCaptureFixture, handle: Any, **changes: Any
) -> tuple[Any, list[str]]:
    """One message handled so: its dead letter, and what was logged of it (warnings, then the error)."""
    consumer = billing.consumer(retries=Retries(attempts=2, backoff=QUICKLY))
    consumer.on(OrderPlaced)(handle)
    async with running(consumer):
        await billing.publish(placed(1, **changes))
        await until_finished(consumer, 1)
    (letter,) = billing.dead()
    logged = [
        record.getMessage()
        for record in caplog.records
        if record.name == "outbox.consumer" and record.levelno >= logging.WARNING
    ]
    assert SECRET not in "".join(logged)
    assert SECRET not in caplog.text
    return letter, logged


async def test_the_log_names_file_and_line_of_the_users_code_and_not_the_text(
    sqlite_billing: Billing, caplog: pytest.LogCaptureFixture
) -> None:
    def check(card: str) -> None:
        raise ValueError(f"{card} is no card")  # here it fails

    def handle(event: OrderPlaced) -> None:
        check(SECRET)

    letter, logged = await given_up(sqlite_billing, caplog, handle)
    warning, error = logged
    place = place_of("here it fails")
    assert "(attempt 1 of 2)" in warning
    assert warning.endswith(f": ValueError at {place}")
    assert error.endswith(f"is a dead letter of consumer billing (retries-exhausted): ValueError at {place}")
    assert letter.exception_message == f"{SECRET} is no card"  # the dead letter keeps it


async def test_the_frame_is_the_users_where_a_library_raised(
    sqlite_billing: Billing, caplog: pytest.LogCaptureFixture
) -> None:
    import json

    def handle(event: OrderPlaced) -> None:
        json.loads(SECRET + "{")  # into the library

    _, logged = await given_up(sqlite_billing, caplog, handle)
    assert logged[0].endswith(f"json.decoder.JSONDecodeError at {place_of('into the library')}")


async def test_what_we_say_ourselves_is_logged(sqlite_billing: Billing, caplog: pytest.LogCaptureFixture) -> None:
    def handle(event: OrderPlaced, session: Session) -> None:
        session.commit()  # not a handler's to do

    _, logged = await given_up(sqlite_billing, caplog, handle)
    place = place_of("not a handler's to do")
    for line in logged:
        assert f"outbox.errors.TransactionError at {place}: a handler does not commit its session" in line


@pytest.mark.parametrize("kind", [Retry, Drop])
async def test_what_a_handler_says_with_our_exceptions_is_logged(
    sqlite_billing: Billing, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    def handle(event: OrderPlaced) -> None:
        raise kind("the ledger is closed until noon\nand a second line")  # on purpose

    _, logged = await given_up(sqlite_billing, caplog, handle)
    place = place_of("on purpose")
    assert logged[-1].endswith(f"outbox.errors.{kind.__name__} at {place}: the ledger is closed until noon")


async def test_a_payload_that_cannot_be_read_is_not_quoted(
    sqlite_billing: Billing, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(event: OrderPlaced) -> None: ...

    payload = f'{{"order_id": 1, "total": "{SECRET}"}}'.encode()
    letter, (logged,) = await given_up(sqlite_billing, caplog, handle, payload=payload)
    assert logged.endswith("(undeserializable): outbox.errors.DecodingError: the payload is no OrderPlaced")
    assert "$.total" in str(letter.exception_message)


# ---------------------------------------------------------------- SQL


def breaks_the_database(event: OrderPlaced, session: Session) -> None:
    session.execute(sa.insert(Charge), {"order_id": None, "amount": SECRET})


def hides_it_in_its_own_error(event: OrderPlaced, session: Session) -> None:
    try:
        breaks_the_database(event, session)
    except sa.exc.SQLAlchemyError as error:
        raise RuntimeError(f"cannot charge: {error}") from error


def goes_on_after_it(event: OrderPlaced, session: Session) -> None:
    session.add(Charge(order_id=None, amount=SECRET))
    try:
        session.flush()
    except sa.exc.IntegrityError:
        session.execute(sa.select(1))  # PendingRollbackError, which quotes the first one


def cannot_be_bound(event: OrderPlaced, session: Session) -> None:
    session.execute(sa.select(sa.bindparam("at", SECRET, sa.DateTime()), sa.bindparam("n", object())))


def several(event: OrderPlaced, session: Session) -> None:
    try:
        breaks_the_database(event, session)
    except Exception as error:
        error.add_note(f"note: {str(error)[:20]}")
        raise ExceptionGroup("two of them", [error, ValueError("plain")]) from None


@pytest.mark.parametrize(
    ("handle", "said"),
    [
        (breaks_the_database, "order_id"),
        (hides_it_in_its_own_error, "cannot charge: ("),
        (goes_on_after_it, "rolled back due to a previous exception during flush"),
        (cannot_be_bound, ""),
        (several, "two of them"),
    ],
)
async def test_a_dead_letter_holds_no_parameters_of_statements(
    billing: Billing, caplog: pytest.LogCaptureFixture, handle: Any, said: str
) -> None:
    letter, logged = await given_up(billing, caplog, handle)
    message, stack = str(letter.exception_message), str(letter.stack)
    assert said in message
    assert f"in {handle.__name__}" in stack
    assert f"{__file__}:" in logged[0]
    for text in (message, stack, *[str(row) for row in billing.rows("attempt")]):
        for word in (SECRET, "[parameters", "[SQL:", "INSERT INTO", "Failing row"):
            assert word not in text


@ON_EACH
async def test_the_drivers_words_are_kept(billing: Billing, caplog: pytest.LogCaptureFixture) -> None:
    letter, _ = await given_up(billing, caplog, breaks_the_database)
    drivers = {
        "sqlite": "(sqlite3.IntegrityError) NOT NULL constraint failed: charges.order_id",
        "postgresql": '(psycopg.errors.NotNullViolation) null value in column "order_id" of relation "charges" violates '
        "not-null constraint",
        "mysql": "(pymysql.err.OperationalError) Field 'order_id' doesn't have a default value (error 1364)",
    }
    wanted = drivers[billing.engine.dialect.name]
    kind = "OperationalError" if billing.engine.dialect.name == "mysql" else "IntegrityError"
    assert letter.exception_type == f"sqlalchemy.exc.{kind}"
    assert letter.exception_message == wanted
    assert str(letter.stack).endswith(f"sqlalchemy.exc.{kind}: {wanted}\n")
    assert "The above exception was the direct cause of the following exception" in str(letter.stack)


async def test_the_attempts_row_holds_none_either(billing: Billing) -> None:
    from outbox.backoff import Backoff
    from tests.consumer.billing import until

    consumer = billing.consumer(retries=Retries(attempts=2, backoff=Backoff(first=600, most=600)))
    consumer.on(OrderPlaced)(breaks_the_database)
    async with running(consumer):
        await billing.publish(placed(1))
        await until(lambda: billing.rows("attempt"))
    (row,) = billing.rows("attempt")
    assert "order_id" in row["last_error"]
    assert SECRET not in row["last_error"]
