"""A consumer process for the tests that kill it: ``python -m tests.consumer.child DATABASE TRANSPORT WHERE``.

It kills itself with SIGKILL at WHERE: ``before ack`` (what was handled is committed, the broker does not know), ``in the
handler`` (its effect is flushed, not committed), ``after the attempt`` (recorded, before the next one), or nowhere.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

from sqlalchemy.orm import Session

from outbox.backoff import Backoff
from outbox.consumer import Retries
from outbox.consumer.processing import Processing
from outbox.transports import open_transport
from tests.consumer.billing import Charge, Charged, OrderPlaced, outbox
from tests.consumer.wrapped import WrappedTransport


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def main(database: str, transport_url: str, where: str) -> None:
    from outbox import Consumer

    transport = WrappedTransport(open_transport(transport_url))
    consumer = Consumer(
        "billing",
        outbox,
        database=database,
        transport=transport,
        member="child",
        retries=Retries(attempts=3, backoff=Backoff(first=0.01, factor=1.0, most=0.01)),
    )

    def before(step: str) -> None:
        if where == "before ack" and step == "ack":
            die()

    transport.before = before
    if where == "after the attempt":
        recorded: Any = Processing._failed

        async def then_die(*arguments: Any) -> None:
            await recorded(*arguments)
            die()

        Processing._failed = then_die  # type: ignore[method-assign, assignment]

    @consumer.on(OrderPlaced)
    def charge(event: OrderPlaced, session: Session) -> Charged:
        # tries are counted outside the database: neither a rollback nor a kill undoes them
        with open(os.environ["TRIES"], "a") as tries:
            tries.write(f"{event.order_id}\n")
        if event.order_id < 0:
            raise ValueError("never")
        session.add(Charge(order_id=event.order_id))
        session.flush()
        if where == "in the handler":
            die()
        return Charged(event.order_id)

    consumer.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
