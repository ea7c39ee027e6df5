"""The HTTP side: an order and its message commit together, before the response is sent."""

import os
from decimal import Decimal
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel, Field
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from outbox import Relay
from outbox_fastapi import lifespan, session_dependency
from shop.messaging import OrderPlaced, outbox
from shop.models import Charge, Order

engine = create_async_engine(os.environ["OUTBOX_DATABASE"])
get_session = session_dependency(async_sessionmaker(engine, expire_on_commit=False))

# scope="function": a commit that fails is a 500, not a 201 that was already sent
Session = Annotated[AsyncSession, Depends(get_session, scope="function")]

# The relay runs in this process, until there is so much to send that it should have one of its own (`outbox relay`).
app = FastAPI(lifespan=lifespan(relay=Relay(outbox, database=engine)))


class NewOrder(BaseModel):
    customer: str = Field(min_length=1, max_length=100)
    total: Decimal = Field(gt=0, max_digits=12, decimal_places=2)


class OrderState(BaseModel):
    id: int
    charged: Decimal | None


@app.post("/orders", status_code=201)
async def place(new: NewOrder, session: Session) -> OrderState:
    order = Order(customer=new.customer, total=new.total)
    session.add(order)
    await session.flush()  # order.id exists from here on
    outbox.add(session, OrderPlaced(order.id, new.customer, new.total))
    return OrderState(id=order.id, charged=None)


@app.get("/orders/{id}")
async def show(id: int, session: Session) -> OrderState:
    if await session.get(Order, id) is None:
        raise HTTPException(404)
    charge = await session.get(Charge, id)
    return OrderState(id=id, charged=None if charge is None else charge.amount)


@app.get("/health")
async def health() -> dict[str, str]:
    """What is wrong with the relay; for people, not for a readiness probe: without a relay orders are still taken."""
    trouble: dict[str, str] = app.state.outbox.trouble()
    return trouble
