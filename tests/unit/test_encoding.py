"""Payloads as JSON: the forms that docs and api promise, and what is said of a payload that has none."""

from __future__ import annotations

import datetime as dt
import enum
import json
import math
import uuid
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import attrs
import msgspec
import pydantic
import pydantic.dataclasses
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from outbox import DecodingError, EncodingError, Outbox
from outbox.encoding import DEFAULT, decode, dump_headers, encode, load_headers

WHEN = dt.datetime(2026, 11, 22, 3, 4, 5, 678, tzinfo=dt.UTC)
ID = uuid.UUID(int=7)


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Size(enum.StrEnum):
    SMALL = "small"


@dataclass
class Point:
    x: int
    y: Decimal


@dataclass(slots=True)
class Slotted:
    when: dt.datetime


@attrs.define
class AttrsPoint:
    x: int
    id: uuid.UUID


class Struct(msgspec.Struct, rename="camel"):
    order_id: int


class Model(pydantic.BaseModel):
    total: Decimal
    when: dt.datetime
    id: uuid.UUID
    colour: Colour
    points: list[Point] = []


class Aliased(pydantic.BaseModel):
    order_id: int = pydantic.Field(alias="orderId")


@pydantic.dataclasses.dataclass
class PydanticPoint:
    x: int


class Pair(NamedTuple):
    a: int
    b: str


class OwnStr(str):
    def __str__(self) -> str:
        return "something else"


class OwnDict(dict[str, int]):
    pass


def json_of(payload: Any) -> str:
    data, content_type = encode(payload, "orders", None, DEFAULT)
    assert content_type == "application/json"
    assert data is not None
    return data.decode()


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"a": 1, "b": [True, None, 1.5, "ü"]}, '{"a":1,"b":[true,null,1.5,"ü"]}'),
        ([], "[]"),
        ("text", '"text"'),
        ("", '""'),
        (7, "7"),
        (0, "0"),
        (False, "false"),
        (2**70, "1180591620717411303424"),
        (1.5, "1.5"),
        ((1, 2), "[1,2]"),
        ({7}, "[7]"),
        (WHEN, '"2026-11-22T03:04:05.000678Z"'),
        (WHEN.astimezone(dt.timezone(dt.timedelta(hours=5, minutes=30))), '"2026-11-22T08:34:05.000678+05:30"'),
        (WHEN.replace(tzinfo=None), '"2026-11-22T03:04:05.000678"'),
        (WHEN.date(), '"2026-11-22"'),
        (WHEN.time(), '"03:04:05.000678"'),
        (dt.timedelta(days=1, seconds=3), '"P1DT3S"'),
        (Decimal("1.10"), '"1.10"'),
        (Decimal("1E+5"), '"1E+5"'),
        (ID, '"00000000-0000-0000-0000-000000000007"'),
        (Colour.RED, '"red"'),
        (Colour.BLUE, "2"),
        (Size.SMALL, '"small"'),
        ({"a": b"xy"}, '{"a":"eHk="}'),
        (Point(1, Decimal("2.0")), '{"x":1,"y":"2.0"}'),
        (Slotted(WHEN), '{"when":"2026-11-22T03:04:05.000678Z"}'),
        # attrs' fields are slots, which Python sorts by name
        (AttrsPoint(1, ID), '{"id":"00000000-0000-0000-0000-000000000007","x":1}'),
        (Struct(1), '{"orderId":1}'),
        (PydanticPoint(1), '{"x":1}'),
        (Pair(1, "x"), '[1,"x"]'),
        (
            Model(total=Decimal("1.50"), when=WHEN, id=ID, colour=Colour.RED, points=[Point(1, Decimal(2))]),
            '{"total":"1.50","when":"2026-11-22T03:04:05.000678Z","id":"00000000-0000-0000-0000-000000000007",'
            '"colour":"red","points":[{"x":1,"y":"2"}]}',
        ),
        ({"model": [Aliased(orderId=1)]}, '{"model":[{"orderId":1}]}'),
        (pydantic.RootModel[list[int]]([1]), "[1]"),
        ({1: 1, ID: 2, Colour.RED: 3}, '{"1":1,"00000000-0000-0000-0000-000000000007":2,"red":3}'),
        (OrderedDict(b=1, a=2), '{"b":1,"a":2}'),
        (defaultdict(int, a=1), '{"a":1}'),
        (OwnDict(a=1), '{"a":1}'),
        (OwnStr("a"), '"a"'),
    ],
    ids=repr,
)
def test_the_json_form(payload: Any, expected: str) -> None:
    assert json_of(payload) == expected


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


@dataclass
class Priced:
    price: float | None
    parts: tuple[object, ...] = ()


@pytest.mark.parametrize(
    "payload",
    [
        math.nan,
        {"lines": [1.5, None, {"total": math.inf}]},
        Priced(-math.inf),
        Priced(None, (Priced(1.0), Priced(math.nan))),
        {Colour.RED: math.nan},
    ],
)
def test_a_number_that_json_does_not_have_is_refused_and_not_made_null(payload: object) -> None:
    with pytest.raises(EncodingError, match="NaN or an infinity"):
        encode(payload, "t", None, DEFAULT)


class Chosen(pydantic.BaseModel, ser_json_inf_nan="strings"):
    price: float
    note: str | None = None


def test_what_is_json_already_and_what_pydantic_decides_is_left_alone() -> None:
    payload = {"body": msgspec.Raw(b'{"a":null}'), "note": None}
    assert encode(payload, "t", None, DEFAULT)[0] == b'{"body":{"a":null},"note":null}'
    encode(Chosen(price=math.nan), "t", None, DEFAULT)


def test_null_is_no_number() -> None:
    assert encode(Priced(None, ({"a": None}, "null", 1e308)), "t", None, DEFAULT)[0] == (
        b'{"price":null,"parts":[{"a":null},"null",1e308]}'
    )


@given(json_values.filter(lambda value: value is not None))
def test_json_comes_back_as_it_went_and_every_reader_agrees(payload: Any) -> None:
    text = json_of(payload)
    assert json.loads(text) == payload
    big = any(abs(number) >= 2**63 for number in _integers(payload))
    if not big:  # msgspec reads larger ones as floats
        assert decode(text.encode(), "application/json", Any, DEFAULT) == payload


def _integers(value: Any) -> list[int]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [number for item in value for number in _integers(item)] if isinstance(value, list) else []


@pytest.mark.parametrize(
    "payload",
    [
        Point(1, Decimal("2.0")),
        Slotted(WHEN),
        AttrsPoint(1, ID),
        Struct(1),
        Model(total=Decimal("1.50"), when=WHEN, id=ID, colour=Colour.BLUE),
        Aliased(orderId=1),
        Pair(1, "x"),
        Size.SMALL,
        WHEN,
        Decimal("1.10"),
        ID,
    ],
    ids=repr,
)
def test_what_was_written_can_be_read_as_its_type(payload: Any) -> None:
    assert decode(json_of(payload).encode(), None, type(payload), DEFAULT) == payload


@pytest.mark.parametrize(
    ("payload", "data", "content_type"),
    [
        (b"\x00", b"\x00", "application/octet-stream"),
        (bytearray(b"a"), b"a", "application/octet-stream"),
        (memoryview(b"abc")[1:], b"bc", "application/octet-stream"),
        (b"", b"", "application/octet-stream"),
        (None, None, None),
    ],
)
def test_bytes_go_as_they_are_and_none_is_a_tombstone(payload: Any, data: Any, content_type: Any) -> None:
    assert encode(payload, "orders", None, DEFAULT) == (data, content_type)


def test_the_content_type_that_is_given_wins() -> None:
    assert encode(b"a", "orders", "avro/binary", DEFAULT) == (b"a", "avro/binary")
    assert encode({}, "orders", "application/cloudevents+json", DEFAULT) == (b"{}", "application/cloudevents+json")


# ---------------------------------------------------------------- refused


class Secretive(pydantic.BaseModel):
    card: str

    @pydantic.field_serializer("card")
    def refuse(self, value: str) -> str:
        raise TypeError(f"cannot serialise {value}")


class DuckModel:
    def model_dump(self, **_: Any) -> Any:
        raise TypeError("secret 4111")


cycle: list[Any] = []
cycle.append(cycle)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (object(), r"the payload \(a object\) cannot be encoded: objects of type object have no JSON form"),
        ({"a": [object()]}, r"the payload \(a dict\) cannot be encoded: objects of type object have no JSON form"),
        ({None: 1}, "NoneType"),
        ({(1, 2): 1}, "tuple"),
        (iter(()), "tuple_iterator"),
        (1j, "complex"),
        (Point, r"objects of type type"),
        (Model, r"ModelMetaclass"),
        ("secret \ud800", "UnicodeEncodeError"),
        (cycle, "recursion"),
        (Secretive(card="secret 4111"), r"Secretive.model_dump raised PydanticSerializationError"),
        (DuckModel(), "DuckModel.model_dump raised TypeError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_payload_that_cannot_be_encoded_raises_and_is_not_shown(payload: Any, why: str) -> None:
    with Session() as session:
        with pytest.raises(EncodingError, match=why) as refusal:
            Outbox().add(session, "orders", payload)
        assert "message for 'orders'" in str(refusal.value)
        assert "Nothing was added" in str(refusal.value)
        assert "secret" not in str(refusal.value)
        assert "4111" not in str(refusal.value)
        assert refusal.value.__cause__ is not None
        assert not session.in_transaction()


# ---------------------------------------------------------------- a codec of the user's


class Upper:
    def encode(self, payload: Any, topic: str) -> tuple[bytes, str]:
        if payload == "bad":
            raise TypeError("secret")
        if payload == "str":
            return "text", "text/plain"  # type: ignore[return-value]
        return str(payload).upper().encode(), "text/plain"

    def decode(self, payload: bytes, content_type: str | None, into: Any) -> Any:
        return payload.decode().lower()


def test_a_codec_encodes_everything_but_bytes_and_tombstones() -> None:
    outbox = Outbox(codec=Upper())
    with Session() as session:
        message = outbox.add(session, "orders", "abc")
        assert (message.payload, message.content_type) == (b"ABC", "text/plain")
        assert outbox.add(session, "orders", b"abc").payload == b"abc"
        assert outbox.add(session, "orders", None).payload is None


def test_an_error_of_a_codec_is_not_shown() -> None:
    with Session() as session:
        with pytest.raises(EncodingError, match="cannot be encoded: TypeError") as refusal:
            Outbox(codec=Upper()).add(session, "orders", "bad")
        assert "secret" not in str(refusal.value)
        with pytest.raises(EncodingError, match=r"Upper.encode must return \(bytes, content type\)"):
            Outbox(codec=Upper()).add(session, "orders", "str")


# ---------------------------------------------------------------- headers, and reading


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))
    )
)
def test_headers_come_back_as_they_went(headers: dict[str, str]) -> None:
    assert load_headers(dump_headers(headers)) == headers == json.loads(dump_headers(headers))


@pytest.mark.parametrize("text", ["[]", '{"a":1}', "{", "null", '{"a":null}'])
def test_headers_that_are_no_object_of_text_are_refused(text: str) -> None:
    with pytest.raises(DecodingError, match="headers"):
        load_headers(text)


def test_no_headers_are_empty_headers() -> None:
    assert load_headers(None) == load_headers("") == {}


@pytest.mark.parametrize(
    ("data", "into", "why"),
    [
        (b'{"x":"1","y":"2"}', Point, "is no Point: .*x"),
        (b'{"x":1}', Point, "is no Point: .*y"),
        (b"{", Point, "is no Point"),
        (b"\xff", Any, "is no"),
        (b'{"total":"a"}', Model, "is no Model"),
    ],
)
def test_bytes_that_are_not_the_type_are_refused_with_the_field(data: bytes, into: Any, why: str) -> None:
    with pytest.raises(DecodingError, match=why):
        decode(data, None, into, DEFAULT)


def test_a_tombstone_is_none_and_bytes_stay_bytes() -> None:
    assert decode(None, None, Point, DEFAULT) is None
    assert decode(b"{", None, bytes, DEFAULT) == b"{"


# ---------------------------------------------------------------- text and bytes, by the content type


@pytest.mark.parametrize(
    ("payload", "content_type", "data"),
    [
        ("text", "text/plain", b"text"),
        ("Größe", "text/plain", "Größe".encode()),
        ("Größe", "Text/CSV; charset=UTF-8", "Größe".encode()),
        ("Größe", 'text/plain; format=flowed; Charset="latin-1"', "Größe".encode("latin-1")),
        ("", "text/plain", b""),
        (Size.SMALL, "text/plain", b"small"),
        ("text", None, b'"text"'),
        ("text", "application/json", b'"text"'),
        ({"a": 1}, "text/plain", b'{"a":1}'),
    ],
)
def test_a_str_under_a_content_type_of_text_goes_as_it_is(payload: Any, content_type: str | None, data: bytes) -> None:
    with Session() as session:
        message = Outbox().add(session, "notes", payload, content_type=content_type)
    assert (message.payload, message.content_type) == (data, content_type or "application/json")


@pytest.mark.parametrize("content_type", ["text/plain; charset=klingon", "text/plain; charset=ascii", "text/plain"])
def test_a_text_that_its_charset_cannot_hold_is_refused_and_not_shown(content_type: str) -> None:
    with Session() as session, pytest.raises(EncodingError, match="charset") as refusal:
        Outbox().add(session, "notes", "secret \ud800", content_type=content_type)
    assert "secret" not in str(refusal.value)
    assert content_type in str(refusal.value)


def test_a_codec_of_the_users_gets_text_too() -> None:
    with Session() as session:
        message = Outbox(codec=Upper()).add(session, "notes", "abc", content_type="text/plain")
    assert message.payload == b"ABC"


@pytest.mark.parametrize("into", [Any, object, None])
@pytest.mark.parametrize(
    ("data", "content_type", "value"),
    [
        (b"\xff\x00", "application/octet-stream", b"\xff\x00"),
        (b'{"a":1}', "application/octet-stream", b'{"a":1}'),
        (b"text", "text/plain", "text"),
        ("Größe".encode(), "text/plain; charset=utf-8", "Größe"),
        ("Größe".encode("latin-1"), "text/plain; charset=latin-1", "Größe"),
        (b"7", "TEXT/PLAIN", "7"),
        (b"7", "application/json", 7),
        (b"7", "text/json", 7),
        (b"7", "application/vnd.shop+json", 7),
        (b"7", None, 7),
    ],
)
def test_without_an_annotation_the_content_type_says_what_it_is(
    into: Any, data: bytes, content_type: str | None, value: Any
) -> None:
    assert decode(data, content_type, into, DEFAULT) == value


@pytest.mark.parametrize("into", [str, str | None])
def test_a_text_is_read_as_str(into: Any) -> None:
    assert decode(b"text", "text/plain", into, DEFAULT) == "text"
    assert decode(b'"text"', "application/json", into, DEFAULT) == "text"
    with pytest.raises(DecodingError, match="is no"):
        decode(b"\xff", "text/plain", into, DEFAULT)


@pytest.mark.parametrize("content_type", ["text/plain", "application/octet-stream"])
def test_an_annotation_goes_before_the_content_type(content_type: str) -> None:
    """Producers that do not say what they send are many."""
    assert decode(b'{"x":1,"y":"2"}', content_type, Point, DEFAULT) == Point(1, Decimal(2))
    assert decode(b'{"x":1}', content_type, dict, DEFAULT) == {"x": 1}
    assert decode(b"{", content_type, bytes, DEFAULT) == b"{"
