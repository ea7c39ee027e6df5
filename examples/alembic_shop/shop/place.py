"""Place an order, and say so to the rest of the world, in one transaction."""

import os

from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from shop.messaging import OrderPlaced, outbox
from shop.models import Customer, Order


def main() -> None:
    engine = create_engine(os.environ["OUTBOX_DATABASE"])
    with Session(engine) as session, session.begin():
        customer = session.scalars(select(Customer).order_by(Customer.id)).first()
        assert customer is not None
        order = Order(customer_id=customer.id, total=700)
        session.add(order)
        session.flush()
        outbox.add(session, OrderPlaced(order.id, order.total))
        print(f"order {order.id} of {customer.name}")
    engine.dispose()


if __name__ == "__main__":
    main()
