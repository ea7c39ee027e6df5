"""What happened, counted from the databases and the broker: not from the counters of the code under test."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox.cli.demo.shop import TOPIC, Charge, Order, outbox
from outbox.transports import open_transport


@dataclass(frozen=True, slots=True)
class Records:
    """What the topic holds: ``sent`` records, of which ``duplicates`` repeat a message id."""

    sent: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class Effects:
    """What the consumer's database holds, against the orders that were committed."""

    effects: int
    dead_letters: int
    reasons: dict[str, int]
    lost: int
    doubled: int
    ghosts: int
    out_of_order: int


async def _records(transport_url: str, expected: int) -> Records:
    """Read the topic from its beginning, as a group that nobody else is in."""
    transport = open_transport(transport_url)
    sent, quiet = 0, 0
    ids: set[bytes] = set()
    try:
        subscription = await transport.subscribe([TOPIC], f"count-{sent}-{id(ids)}", window=100_000)
        try:
            # the relay has stopped: once everything is here, an empty answer is the end
            while len(ids) < expected or quiet < 2:
                deliveries = await subscription.fetch(5000, 1.0)
                quiet = 0 if deliveries else quiet + 1
                if quiet > 20:
                    break
                sent += len(deliveries)
                ids |= {dict(delivery.headers)["outbox-id"] for delivery in deliveries}
                await subscription.ack(deliveries)
        finally:
            await subscription.close()
    finally:
        await transport.close()
    return Records(sent, sent - len(ids))


def records(transport_url: str, expected: int) -> Records:
    return asyncio.run(_records(transport_url, expected))


def effects(shop: sa.Engine, billing: sa.Engine) -> Effects:
    with Session(shop) as session:
        orders = set(session.scalars(sa.select(Order.id)))
    with Session(billing) as session:
        charges = session.execute(
            sa.select(Charge.order_id, Charge.customer_id, Charge.number).order_by(Charge.id)
        ).all()
        dead = outbox.tables.dead_letter
        letters = session.execute(
            sa.select(dead.c.reason, dead.c.exception_type, dead.c.state, sa.func.count())
            .where(dead.c.state != "discarded")
            .group_by(dead.c.reason, dead.c.exception_type, dead.c.state)
        ).all()
        replayed = {
            int(text)
            for payload in session.scalars(sa.select(dead.c.payload).where(dead.c.state == "replayed"))
            for text in [_order_id(payload)]
        }
    open_letters = sum(n for _, _, state, n in letters if state == "open")
    reasons: dict[str, int] = {}
    for reason, exception, _, n in letters:
        name = f"{reason}: {exception}" if exception else reason
        reasons[name] = reasons.get(name, 0) + n
    charged = [order_id for order_id, _, _ in charges]
    last: dict[int, int] = {}
    inversions = 0
    for order_id, customer_id, number in charges:
        if order_id in replayed:  # it was given up once, and its customer's other orders went on
            continue
        inversions += number < last.get(customer_id, 0)
        last[customer_id] = max(last.get(customer_id, 0), number)
    return Effects(
        effects=len(charges),
        dead_letters=open_letters,
        reasons=reasons,
        lost=len(orders - set(charged)) - open_letters,
        doubled=len(charged) - len(set(charged)),
        ghosts=len(set(charged) - orders),
        out_of_order=inversions,
    )


def _order_id(payload: bytes) -> str:
    import json

    return str(json.loads(payload)["order_id"])
