"""A shop with one kind of data: each order is placed together with a message that has its name as payload.

So after whatever a test did, the names in the two tables must be the same: a name that is only among the orders is a
message lost, one that is only among the messages is a message sent for data that never was.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session

from outbox import Outbox


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "shop_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(255), unique=True)


outbox = Outbox(Base.metadata)

TABLES: list[sa.Table] = [
    Base.metadata.tables[Order.__tablename__],
    outbox.tables.message,
    outbox.tables.scheduled,
    outbox.tables.inbox,
]

Bind = sa.Engine | sa.Connection


def place(session: Session | scoped_session[Session], name: str) -> None:
    """An order and its message, nothing flushed."""
    session.add(Order(name=name))
    tell(session, name)


def tell(where: Session | scoped_session[Session] | sa.Connection, name: str) -> None:
    """The message alone."""
    outbox.add(where, "orders", name.encode())


class Shop:
    """The shop's database, looked at from a connection of its own."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @property
    def releases_commit(self) -> bool:
        """Whether a released savepoint is committed if it was the first statement: sqlite3 sends no BEGIN before it."""
        return self.engine.dialect.name == "sqlite" and not self.engine.dispatch.begin

    def orders(self) -> list[str]:
        """The names of the orders that are committed."""
        with self.engine.connect() as connection:
            return list(connection.scalars(sa.select(Order.name).order_by(Order.id)))

    def messages(self) -> list[str]:
        """The names in the messages that are committed, by position."""
        message = outbox.tables.message
        with self.engine.connect() as connection:
            payloads: Sequence[bytes] = connection.scalars(
                sa.select(message.c.payload).order_by(message.c.position)
            ).all()
            return [payload.decode() for payload in payloads]

    def holds(self, *names: str) -> bool:
        """Whether exactly these orders are committed, and exactly their messages, in this order."""
        orders, messages = self.orders(), self.messages()
        assert sorted(orders) == sorted(messages), "an order without its message, or the other way round"
        assert messages == list(names)
        return True
