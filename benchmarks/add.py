"""What ``outbox.add`` adds to an ORM transaction on PostgreSQL, beside ``session.add(row)`` of the same columns, by hand."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks.figures import Report
from benchmarks.servers import postgresql
from outbox import Outbox


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "bench_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[int]
    note: Mapped[str]


outbox = Outbox(Base.metadata)


class Row(Base):
    """What people write by hand: a mapped class with the columns of our table."""

    __tablename__ = "bench_outbox"
    position: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(), primary_key=True)
    id: Mapped[uuid.UUID]
    bucket: Mapped[int] = mapped_column(sa.SmallInteger)
    topic: Mapped[str] = mapped_column(sa.String(255))
    key: Mapped[str | None] = mapped_column(sa.String(255))
    type: Mapped[str | None] = mapped_column(sa.String(255))
    payload: Mapped[bytes | None]
    content_type: Mapped[str | None] = mapped_column(sa.String(255))
    headers: Mapped[str | None] = mapped_column(sa.Text)
    created_at: Mapped[Any] = mapped_column(sa.DateTime(timezone=True), server_default=sa.func.clock_timestamp())


encode = msgspec.json.encode


def payload(n: int) -> dict[str, Any]:
    return {"order_id": n, "customer": n % 1000, "total": "19.90", "currency": "EUR", "lines": [1, 2, 3]}


def values(n: int) -> dict[str, Any]:
    return {
        "id": uuid.uuid4(),
        "bucket": n % 64,
        "topic": "orders",
        "key": str(n % 1000),
        "type": "order.placed",
        "payload": encode(payload(n)),
        "content_type": "application/json",
        "headers": None,
    }


def by_hand(session: Session, n: int) -> None:
    session.add(Row(**values(n)))


def by_outbox(session: Session, n: int) -> None:
    outbox.add(session, "orders", payload(n), key=n % 1000, type="order.placed")


def orders(engine: sa.Engine, add: Callable[[Session, int], None] | None, messages: int, transactions: int) -> float:
    """Seconds a transaction of one order and some messages takes."""
    start = time.perf_counter()
    for n in range(transactions):
        with Session(engine) as session, session.begin():
            session.add(Order(customer=n % 1000, note="a note of the usual length"))
            if add is not None:
                for m in range(messages):
                    add(session, n + m)
    return (time.perf_counter() - start) / transactions


def many(engine: sa.Engine, how: Callable[[Session], None], transactions: int) -> float:
    start = time.perf_counter()
    for _ in range(transactions):
        with Session(engine) as session, session.begin():
            how(session)
    return (time.perf_counter() - start) / transactions


def core_list(session: Session) -> None:
    session.execute(sa.insert(outbox.tables.message), [values(n) for n in range(100)])


def add_all(session: Session) -> None:
    outbox.add_all(
        session,
        [{"topic": "orders", "payload": payload(n), "key": n % 1000, "type": "order.placed"} for n in range(100)],
    )


def run(report: Report, *, repeat: int, scale: float) -> None:
    rounds, chunk = max(1, round(20 * scale)), 50
    with postgresql() as url:
        engine = sa.create_engine(url)
        try:
            Base.metadata.create_all(engine)
            for messages in (1, 10):
                ours, ratios = [], []
                for _ in range(repeat):
                    plain = hand = mine = 0.0
                    for _ in range(rounds):  # in turn, so that a slow moment of the machine is everybody's
                        plain += orders(engine, None, 0, chunk)
                        hand += orders(engine, by_hand, messages, chunk)
                        mine += orders(engine, by_outbox, messages, chunk)
                    ours.append((mine - plain) / rounds * 1e6)
                    ratios.append((mine - plain) / (hand - plain))
                report.figure(f"add.orm.messages{messages}", ours, "us", reference="session_add_row", ratios=ratios)
            ours, ratios = [], []
            for _ in range(repeat):
                core = mine = 0.0
                for _ in range(rounds):
                    core += many(engine, core_list, 10)
                    mine += many(engine, add_all, 10)
                ours.append(mine / rounds * 1e6)
                ratios.append(mine / core)
            report.figure("add.many.messages100", ours, "us", reference="core_insert_list", ratios=ratios)
        finally:
            engine.dispose()
