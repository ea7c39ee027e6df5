"""`@event` declares a message class and leaves it as it is."""

from __future__ import annotations

import copy
import pickle
import uuid
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from enum import StrEnum
from typing import Any, NamedTuple

import attrs
import msgspec
import pydantic
import pytest
from sqlalchemy.orm import Session

from outbox import ConfigurationError, EncodingError, Message, Outbox, event
from outbox._message import declaration

outbox = Outbox()


def add(message: object, **arguments: Any) -> Message:
    with Session() as session:
        return outbox.add(session, message, **arguments)


@event("orders", type="order.placed", key="id")
@dataclass
class OnDataclass:
    id: int


@event("orders", type="order.placed", key="id")
@dataclass(frozen=True, slots=True)
class OnFrozenSlots:
    id: int


@dataclass(slots=True)
@event("orders", type="order.placed", key="id")
class UnderDataclassWithSlots:  # which makes another class of it
    id: int


@event("orders", type="order.placed", key="id")
@attrs.frozen
class OnAttrs:
    id: int


@attrs.define
@event("orders", type="order.placed", key="id")
class UnderAttrs:
    id: int


@event("orders", type="order.placed", key="id")
class OnPydantic(pydantic.BaseModel):
    id: int

    def __init__(self, id: int) -> None:
        super().__init__(id=id)


@event("orders", type="order.placed", key="id")
class OnStruct(msgspec.Struct):
    id: int


@event("orders", type="order.placed", key="id")
class OnNamedTuple(NamedTuple):
    id: int


CLASSES: list[Any] = [
    OnDataclass,
    OnFrozenSlots,
    UnderDataclassWithSlots,
    OnAttrs,
    UnderAttrs,
    OnPydantic,
    OnStruct,
    OnNamedTuple,
]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_kind_of_class_can_be_declared(cls: Any) -> None:
    message = add(cls(7))
    assert (message.topic, message.type, message.key, message.headers) == ("orders", "order.placed", "7", {})
    assert message.payload == (b"[7]" if cls is OnNamedTuple else b'{"id":7}')
    assert message.content_type == "application/json"


@pytest.mark.parametrize("cls", CLASSES)
def test_a_declared_class_is_still_itself(cls: Any) -> None:
    assert cls(7) == cls(7)
    assert copy.copy(cls(7)) == cls(7)
    assert pickle.loads(pickle.dumps(cls(7))) == cls(7)
    assert cls.__module__ == __name__


def test_the_decorator_returns_the_very_class() -> None:
    class Placed:
        pass

    assert event("orders", type="order.placed")(Placed) is Placed


def test_the_key_may_be_a_function_a_property_or_inherited() -> None:
    @event("orders", type="a", key=lambda message: f"{message.tenant}/{message.id}")
    @dataclass
    class Function:
        tenant: str
        id: int

    @event("orders", type="b", key="combined")
    @dataclass
    class Property:
        tenant: str
        id: int

        @property
        def combined(self) -> str:
            return f"{self.tenant}-{self.id}"

    @event("orders", type="c", key="tenant")
    @dataclass
    class Inherited(Property):
        more: int = 0

    assert add(Function("a", 1)).key == "a/1"
    assert add(Property("a", 1)).key == "a-1"
    assert add(Inherited("a", 1)).key == "a"


def test_without_a_key_a_message_has_none() -> None:
    @event("orders", type="a")
    @dataclass
    class Placed:
        id: int | None = None

    assert add(Placed()).key is None


@pytest.mark.parametrize("key", [None, "", True, 1.5])
def test_the_value_of_the_key_is_checked_for_each_message(key: Any) -> None:
    @event("orders", type="a", key="id")
    @dataclass
    class Placed:
        id: Any = dataclass_field()

    with pytest.raises(EncodingError, match="message for 'orders': key"):
        add(Placed(key))


def test_the_version_travels_as_a_header_unless_it_is_the_first() -> None:
    @event("orders", type="a", version=3)
    @dataclass
    class Placed:
        pass

    assert add(Placed()).headers == {"outbox-version": "3"}
    assert add(Placed(), headers={"tenant": "a"}).headers == {"tenant": "a", "outbox-version": "3"}


def test_names_may_be_str_enums() -> None:
    class Name(StrEnum):
        TOPIC = "orders"
        TYPE = "order.placed"

    @event(Name.TOPIC, type=Name.TYPE)
    @dataclass
    class Placed:
        pass

    found = declaration(Placed)
    assert found is not None
    assert type(found.topic) is type(found.type) is str
    assert (add(Placed()).topic, add(Placed()).type) == ("orders", "order.placed")


def test_an_event_keeps_the_id_that_it_is_given() -> None:
    id = uuid.uuid4()
    assert add(OnDataclass(1), id=id).id == id


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"topic": "", "type": "a"}, "topic has 0 characters"),
        ({"topic": 7, "type": "a"}, "topic is a int"),
        ({"topic": "x" * 256, "type": "a"}, "topic has 256 characters"),
        ({"topic": "orders", "type": ""}, "type must be a str of 1 to 255"),
        ({"topic": "orders", "type": None}, "type is required"),
        ({"topic": "orders", "type": 7}, "type must be a str"),
        ({"topic": "orders", "type": "a\x00"}, "type contains a NUL"),
        ({"topic": "orders", "type": "a", "version": 0}, "version must be an int from 1 on"),
        ({"topic": "orders", "type": "a", "version": "1"}, "version must be an int"),
        ({"topic": "orders", "type": "a", "version": True}, "version must be an int"),
        ({"topic": "orders", "type": "a", "key": "ordr_id"}, "Placed has no attribute 'ordr_id'"),
        ({"topic": "orders", "type": "a", "key": 7}, "key is the name of an attribute, or a function"),
    ],
)
def test_a_wrong_declaration_is_refused_where_it_is_made(arguments: Any, why: str) -> None:
    class Placed:
        order_id: int

    with pytest.raises(ConfigurationError, match=why):
        event(**arguments)(Placed)


def test_the_type_is_required() -> None:
    with pytest.raises(TypeError, match="type"):
        event("orders")  # type: ignore[call-arg]


def test_only_classes_are_declared() -> None:
    with pytest.raises(ConfigurationError, match="declares a class, not <function"):
        event("orders", type="a")(lambda: None)  # type: ignore[arg-type]
