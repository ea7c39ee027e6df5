"""`outbox_fastapi.lifespan`: a relay and consumers in the app's process, which never take it down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI, Request

from outbox import ConfigurationError, Consumer, Outbox, Relay, SchemaMismatch
from outbox.transports import memory, open_transport
from outbox_fastapi import Running, lifespan
from tests.services.process import free_port

BROKER = "memory://fastapi"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/shop.db")
    Outbox(metadata).metadata.create_all(engine)
    yield engine
    engine.dispose()
    memory.forget("fastapi")


metadata = sa.MetaData()
outbox = Outbox(metadata)
effect = sa.Table("effect", metadata, sa.Column("n", sa.Integer, primary_key=True))


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """The app as a server runs it: start-up, requests, shutdown."""
    async with app.router.lifespan_context(app) as state:
        transport = httpx.ASGITransport(app)

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "state": dict(state or {})}, receive, send)

        transport.app = with_state
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            yield client


def shop(engine: sa.Engine, app_lifespan: Any) -> FastAPI:
    app = FastAPI(lifespan=app_lifespan)

    @app.post("/add/{n}")
    def add(n: int) -> None:
        with engine.begin() as connection:
            outbox.add(connection, "orders", {"n": n}, key=n)

    @app.get("/trouble")
    def trouble(request: Request) -> dict[str, str]:
        running: Running = request.app.state.outbox
        return running.trouble()

    @app.get("/state")
    def state(request: Request) -> str:
        return str(getattr(request.state, "colour", None))

    return app


def consumer_of(engine: sa.Engine) -> Consumer:
    consumer = Consumer("billing", outbox, database=engine, transport=BROKER)

    @consumer.on("orders")
    def charge(order: dict[str, int], session: sa.orm.Session) -> None:
        session.execute(sa.insert(effect).values(n=order["n"]))

    return consumer


def effects(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(effect.c.n).order_by(effect.c.n)))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # it may come true in another thread
            await asyncio.sleep(0.01)


async def test_a_request_has_its_effect_through_the_relay_and_the_consumer_of_the_app(engine: sa.Engine) -> None:
    app = shop(engine, lifespan(Relay(outbox, database=engine, transport=BROKER), consumer_of(engine)))
    async with serving(app) as client:
        for n in (1, 2, 3):
            assert (await client.post(f"/add/{n}")).status_code == 200
        await until(lambda: effects(engine) == [1, 2, 3])
        assert (await client.get("/trouble")).json() == {}


async def test_the_apps_own_lifespan_is_around_ours_and_keeps_its_state(engine: sa.Engine) -> None:
    seen: list[str] = []
    relay = Relay(outbox, database=engine, transport=BROKER)

    @asynccontextmanager
    async def mine(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        seen.append("begin")
        yield {"colour": "blue"}
        seen.append("end")

    async with serving(shop(engine, lifespan(relay, app_lifespan=mine))) as client:
        await asyncio.wait_for(relay.started.wait(), 20)
        assert (await client.get("/state")).json() == "blue"
        assert seen == ["begin"]
    assert seen == ["begin", "end"]


async def test_it_can_be_used_inside_the_apps_own_lifespan(engine: sa.Engine) -> None:
    consumers = [consumer_of(engine)]

    @asynccontextmanager
    async def mine(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan(Relay(outbox, database=engine, transport=BROKER), consumers)(app):
            yield

    async with serving(shop(engine, mine)) as client:
        await client.post("/add/7")
        await until(lambda: effects(engine) == [7])


async def test_an_app_starts_and_takes_orders_without_a_broker(
    engine: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = f"kafka://127.0.0.1:{free_port()}"
    consumer = consumer_of(engine)
    consumer._transport = nowhere
    app = shop(engine, lifespan(Relay(outbox, database=engine, transport=nowhere), consumer))
    async with serving(app) as client:
        assert (await client.post("/add/1")).status_code == 200
        await until(lambda: consumer.state.broker)
        assert "cannot reach a broker" in (await client.get("/trouble")).json()["billing"]
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(outbox.tables.message)) == 1


async def test_an_app_whose_tables_are_missing_does_not_start(engine: sa.Engine) -> None:
    other = Outbox(prefix="other_")
    for part in ({"relay": Relay(other, database=engine, transport=BROKER)}, {"consumer": consumer_on(other, engine)}):
        app = shop(engine, lifespan(**part))
        with pytest.raises(SchemaMismatch, match="no outbox tables here"):
            async with serving(app):
                pass


def consumer_on(outbox: Outbox, engine: sa.Engine) -> Consumer:
    consumer = Consumer("billing", outbox, database=engine, transport=BROKER)
    consumer.on("orders")(lambda order: None)
    return consumer


class Refusing:
    """A broker with which nothing can ever work, which is found out when it is asked."""

    def __init__(self) -> None:
        self._real = open_transport(BROKER)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def connect(self) -> None:
        raise ConfigurationError("this broker speaks an older protocol")


@pytest.mark.parametrize("part", ["relay", "billing"])
async def test_a_relay_or_consumer_that_dies_is_logged_and_visible_and_the_app_goes_on(
    engine: sa.Engine, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    broker: Any = Refusing()
    if part == "relay":
        app = shop(engine, lifespan(Relay(outbox, database=engine, transport=broker)))
    else:
        consumer = consumer_of(engine)
        consumer._transport = broker
        app = shop(engine, lifespan(consumer=consumer))
    async with serving(app) as client:
        await until(lambda: [r for r in caplog.records if r.levelno == logging.CRITICAL])
        assert (await client.post("/add/1")).status_code == 200
        trouble = (await client.get("/trouble")).json()
        assert trouble == {part: "has died: this broker speaks an older protocol"}
    assert effects(engine) == []


async def test_the_shutdown_sends_what_is_in_flight(engine: sa.Engine) -> None:
    relay = Relay(outbox, database=engine, transport=BROKER)
    async with serving(shop(engine, lifespan(relay))) as client:
        await asyncio.wait_for(relay.started.wait(), 20)
        for n in range(50):
            await client.post(f"/add/{n}")
        await until(lambda: relay.counts.sent > 0)
    with engine.connect() as connection:
        left = connection.scalar(sa.select(sa.func.count()).select_from(outbox.tables.message)) or 0
        leases = connection.scalars(sa.select(outbox.tables.lease.c.owner).distinct()).all()
    assert left == 50 - relay.counts.sent
    assert leases == [None]
