"""Which argument of a handler gets what, and what is refused with the handler's and the argument's name."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import msgspec
import pydantic
import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outbox import ConfigurationError, Consumer, DecodingError, Message, Outbox, event
from outbox._message import new_id
from outbox.consumer.binding import Handler

if TYPE_CHECKING:
    from somewhere import OnlyForTypeCheckers  # type: ignore[import-not-found]
    from sqlalchemy import orm


@event("orders", type="order.placed")
@dataclass
class OrderPlaced:
    order_id: int


@event("orders", type="order.cancelled")
@dataclass
class OrderCancelled:
    order_id: int


class Pydantic(pydantic.BaseModel):
    order_id: int


@attrs.define
class Attrs:
    order_id: int


class Msgspec(msgspec.Struct):
    order_id: int


class Typed(typing.TypedDict):
    order_id: int


class MySession(Session):
    pass


outbox = Outbox()


def message(payload: bytes | None = b'{"order_id": 7}') -> Message:
    return Message(id=new_id(), topic="orders", type="order.placed", payload=payload, content_type="application/json")


def bound(function: Callable[..., Any], what: Any = "orders", **options: Any) -> Handler:
    consumer = Consumer("billing", outbox, **options)
    consumer.on(what)(function)
    (handler,) = consumer._handlers.check()
    return handler


def call(function: Callable[..., Any], given: Message | None = None, session: object = None, **options: Any) -> Any:
    handler = bound(function, **options)
    given = given or message()
    return handler.call(handler.decode(given, outbox.codec), given, session, options.get("provide", {}))


def test_the_decorator_returns_the_function_unchanged() -> None:
    def handle(event: OrderPlaced) -> None: ...

    assert Consumer("billing", outbox).on(OrderPlaced)(handle) is handle


@pytest.mark.parametrize("kind", [OrderPlaced, Pydantic, Attrs, Msgspec])
def test_the_payload_is_decoded_to_its_annotation(kind: Any) -> None:
    def handle(event: Any) -> Any:
        return event

    handle.__annotations__["event"] = kind
    assert call(handle) == kind(order_id=7)


def test_plain_payloads() -> None:
    def as_dict(event: dict[str, int]) -> Any:
        return event

    def as_typed_dict(event: Typed) -> Any:
        return event

    def as_bytes(event: bytes) -> Any:
        return event

    def as_anything(event: Any) -> Any:
        return event

    def unannotated(event):  # type: ignore[no-untyped-def]
        return event

    assert call(as_bytes) == b'{"order_id": 7}'
    for handler in (as_dict, as_typed_dict, as_anything, unannotated):
        assert call(handler) == {"order_id": 7}


def test_a_message_as_the_payload_is_not_decoded() -> None:
    def handle(whole: Message) -> Any:
        return whole

    given = message(b"\xff")
    assert call(handle, given) is given


def test_an_unannotated_payload_of_a_declared_class_is_that_class() -> None:
    def handle(event):  # type: ignore[no-untyped-def]
        return event

    handler = bound(handle, OrderPlaced)
    assert handler.decode(message(), outbox.codec) == OrderPlaced(7)
    with pytest.raises(DecodingError, match="tombstone"):
        handler.decode(message(None), outbox.codec)


@pytest.mark.parametrize("annotation", [OrderPlaced, Pydantic, bytes, dict])
def test_a_tombstone_is_refused_where_the_annotation_has_no_none(annotation: Any) -> None:
    def handle(event: Any) -> Any:
        return event

    handle.__annotations__["event"] = annotation
    with pytest.raises(DecodingError, match=r"tombstone.*event: .* \| None"):
        call(handle, message(None))


@pytest.mark.parametrize("annotation", [OrderPlaced, Pydantic, bytes, dict[str, int]])
def test_a_tombstone_is_none_where_the_annotation_has_none(annotation: Any) -> None:
    def handle(event: Any) -> Any:
        return event

    for optional in (annotation | None, Annotated[annotation | None, "note"]):
        handle.__annotations__["event"] = optional
        assert call(handle, message(None)) is None
        assert call(handle) is not None


def test_arguments_by_annotation_by_name_and_provided() -> None:
    made = []

    def get_stripe() -> str:
        made.append("stripe")
        return "a stripe"

    def handle(
        event: OrderPlaced,
        db: Session,
        session: Any,
        note: Message,
        stripe: object,
        fixed: int,
        *,
        kept: str = "default",
    ) -> Any:
        return event, db, session, note.topic, stripe, fixed, kept

    # `session` is annotated as something else, so only provide can serve it
    provide = {"stripe": get_stripe, "fixed": 3, "session": lambda: "mine"}
    result = call(handle, session="the session", provide=provide)
    assert result == (OrderPlaced(7), "the session", "mine", "orders", "a stripe", 3, "default")
    assert made == ["stripe"]


def test_unannotated_session_and_message_by_name() -> None:
    def handle(event, message, session):  # type: ignore[no-untyped-def]
        return message.topic, session

    assert call(handle, session="the session") == ("orders", "the session")


def test_positional_only_and_variable_arguments() -> None:
    def handle(event: OrderPlaced, session: Session, /, *rest: int, **more: int) -> Any:
        return event.order_id, session, rest, more

    assert call(handle, session="s") == (7, "s", (), {})


def test_annotations_of_an_enclosing_function_and_for_type_checkers_only() -> None:
    @dataclass
    class Local:
        order_id: int

    consumer = Consumer("billing", outbox)

    @consumer.on("orders")
    def handle(event: Local, session: Session | None, db: Annotated[Session, "note"]) -> Any:
        return event, session, db

    @consumer.on("orders", type="unresolved")
    def renamed(event: OrderPlaced, other: orm.Session) -> Any:
        return event, other

    with pytest.raises(ConfigurationError, match="argument 'other'"):

        @consumer.on("orders", type="unknown")
        def unknown(event: OrderPlaced, other: OnlyForTypeCheckers) -> None: ...

    plain, imported = consumer._handlers.check()
    assert plain.call(plain.decode(message(), outbox.codec), message(), "s", {}) == (Local(7), "s", "s")
    assert imported.call(OrderPlaced(7), message(), "s", {}) == (OrderPlaced(7), "s")


def test_a_class_that_follows_further_down_is_found_at_the_start() -> None:
    consumer = Consumer("billing", outbox)

    @consumer.on("orders")
    def handle(event: ComesLater) -> Any:
        return event

    (handler,) = consumer._handlers.check()
    assert handler.into is ComesLater


@dataclass
class ComesLater:
    order_id: int


def test_partials_methods_and_callable_objects() -> None:
    class Service:
        def handle(self, event: OrderPlaced, session: Session) -> Any:
            return event.order_id, session

        async def __call__(self, event: OrderPlaced, session: AsyncSession) -> None: ...

    def with_option(option: int, event: OrderPlaced, session: Session) -> Any:
        return option, event.order_id, session

    assert call(Service().handle, session="s") == (7, "s")
    assert call(functools.partial(with_option, 3), session="s") == (3, 7, "s")
    assert bound(Service()).is_async
    assert bound(Service()).session == "async"


async def test_async_factories_are_awaited_for_async_handlers() -> None:
    async def get_client() -> str:
        return "a client"

    async def handle(event: OrderPlaced, client: str, session: AsyncSession) -> Any:
        return event.order_id, client, session

    provide = {"client": get_client}
    handler = bound(handle, provide=provide)
    assert handler.session == "async"
    assert await handler.acall(OrderPlaced(7), message(), "s", provide) == (7, "a client", "s")


def test_a_subclass_of_session_is_a_session() -> None:
    def handle(event: OrderPlaced, session: MySession) -> Any:
        return session

    assert bound(handle).session == "sync"


# ---------------------------------------------------------------- what is refused


def unknown_argument(event: OrderPlaced, stripe: str) -> None: ...
def no_argument() -> None: ...
def session_first(session: Session, event: OrderPlaced) -> None: ...
def async_session_in_sync(event: OrderPlaced, session: AsyncSession) -> None: ...
async def sync_session_in_async(event: OrderPlaced, session: Session) -> None: ...
def generator(event: OrderPlaced) -> Any:
    yield event


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (unknown_argument, "handler unknown_argument: nothing is known for argument 'stripe'"),
        (no_argument, "handler no_argument takes no argument"),
        (session_first, "handler session_first: its first argument, 'session', is annotated as a session"),
        (async_session_in_sync, "argument 'session' is an AsyncSession, but the handler is sync"),
        (sync_session_in_async, "argument 'session' is a Session, which would block the event loop"),
        (generator, "handler generator is a generator"),
    ],
)
def test_what_cannot_be_served_is_refused_at_registration(function: Callable[..., Any], said: str) -> None:
    consumer = Consumer("billing", outbox)
    with pytest.raises(ConfigurationError, match=said):
        consumer.on(OrderPlaced)(function)
    assert consumer.topics == ()


def test_an_async_factory_for_a_sync_handler_is_refused() -> None:
    async def get_client() -> None: ...

    def handle(event: OrderPlaced, client: Any) -> None: ...

    with pytest.raises(ConfigurationError, match="argument 'client' is provided by an async function"):
        Consumer("billing", outbox, provide={"client": get_client}).on(OrderPlaced)(handle)


def test_two_handlers_for_one_message_are_refused() -> None:
    consumer = Consumer("billing", outbox)

    @consumer.on(OrderPlaced)
    def first(event: OrderPlaced) -> None: ...

    def second(event: Any) -> None: ...

    with pytest.raises(
        ConfigurationError, match=r"first and .*second are both for type 'order.placed' of topic 'orders'"
    ):
        consumer.on("orders", type="order.placed")(second)
    consumer.on("orders")(second)
    with pytest.raises(ConfigurationError, match="both for any other type of topic 'orders'"):
        consumer.on("orders")(first)
    consumer.on(OrderCancelled)(lambda event: None)
    assert consumer.topics == ("orders",)


def test_a_handler_for_another_declared_class_than_its_argument_is_refused() -> None:
    def handle(event: OrderCancelled) -> None: ...

    with pytest.raises(ConfigurationError, match=r"argument 'event' is a OrderCancelled .* registered for OrderPlaced"):
        Consumer("billing", outbox).on(OrderPlaced)(handle)


def test_a_payload_that_json_cannot_become_is_refused_at_the_start() -> None:
    class Plain:
        pass

    def handle(event: Plain) -> None: ...

    consumer = Consumer("billing", outbox)
    consumer.on("orders")(handle)
    with pytest.raises(
        ConfigurationError, match=r"handle: its first argument is a Plain, which JSON cannot be read as"
    ):
        consumer._handlers.check()


def test_an_annotation_that_names_nothing_is_refused_at_the_start() -> None:
    def handle(event: NothingOfThatName) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    consumer = Consumer("billing", outbox)
    consumer.on("orders")(handle)
    with pytest.raises(
        ConfigurationError, match="annotation of its first argument cannot be resolved: 'NothingOfThatName'"
    ):
        consumer._handlers.check()


@pytest.mark.parametrize("what", [7, Pydantic, "", None])
def test_only_topics_and_declared_classes_can_be_registered(what: Any) -> None:
    with pytest.raises(ConfigurationError):
        Consumer("billing", outbox).on(what)(lambda event: None)


def test_a_type_beside_a_declared_class_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="the type comes from its declaration"):
        Consumer("billing", outbox).on(OrderPlaced, type="other")(lambda event: None)
