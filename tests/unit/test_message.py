"""Messages: what they may be made of, and what is said when they may not."""

from __future__ import annotations

import os
import re
import threading
import time
import uuid
import zlib
from enum import Enum, IntEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from outbox import EncodingError, Message, Outbox, event
from outbox._message import BUCKETS, FOREIGN_IDS, bucket_of, check_headers, message_id, new_id

outbox = Outbox()


def add(topic: Any = "orders", payload: Any = b"", **arguments: Any) -> Message:
    """Staged in a session that has no database: what is wrong with a message is found without one."""
    with Session() as session:
        return outbox.add(session, topic, payload, **arguments)


def refused(match: str) -> Any:
    return pytest.raises(EncodingError, match=match)


# ---------------------------------------------------------------- keys


class Seven(IntEnum):
    SEVEN = 7


class Named(str, Enum):  # noqa: UP042 - whose str() is 'Named.A'
    A = "a"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("a", "a"),
        ("0", "0"),
        (" ", " "),
        ("ü" * 255, "ü" * 255),
        (0, "0"),
        (-7, "-7"),
        (Seven.SEVEN, "7"),
        (Named.A, "a"),
        (10**254, "1" + "0" * 254),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    ],
)
def test_a_key_is_stored_as_text(key: Any, text: str) -> None:
    message = add(key=key)
    assert message.key == text
    assert type(message.key) is str


def test_a_key_may_be_left_out() -> None:
    assert add().key is None


def test_a_key_that_is_none_is_refused_with_the_advice_to_flush() -> None:
    with refused(r"message for 'orders': key is None; flush the entity first \(session\.flush\(\)\)"):
        add(key=None)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (True, "key is a bool"),
        (1.5, "key is a float"),
        (b"a", "key is a bytes"),
        (("a", 1), "key is a tuple"),
        (object(), "key is a object"),
        ("", "key has 0 characters; between 1 and 255"),
        ("x" * 256, "key has 256 characters"),
        (10**255, "key has 256 characters"),
        pytest.param(10**10_000, "characters; between 1 and 255", id="an int that Python refuses to print"),
        ("a\x00b", "key contains a NUL"),
        ("a\ud800", "key contains a lone surrogate"),
    ],
)
def test_what_is_no_key_is_refused(key: Any, why: str) -> None:
    with refused(why):
        add(key=key)


# ---------------------------------------------------------------- topic, type, headers, content type, id


@pytest.mark.parametrize(
    ("topic", "why"),
    [
        ("", "topic has 0 characters"),
        ("x" * 256, "topic has 256 characters; between 1 and 255"),
        (None, "topic is a NoneType"),
        (7, "topic is a int"),
        (b"orders", "topic is a bytes"),
        ("a\x00", "topic contains a NUL"),
        ("\udfff", "topic contains a lone surrogate"),
    ],
)
def test_what_is_no_topic_is_refused(topic: Any, why: str) -> None:
    with refused(why):
        add(topic)


@pytest.mark.parametrize("type_", ["", "x" * 256, 7, b"a", "a\x00", "\ud800"])
def test_what_is_no_type_is_refused(type_: Any) -> None:
    with refused("message for 'orders': type"):
        add(type=type_)


@pytest.mark.parametrize("content_type", ["", "x" * 256, 7, b"a", "a\x00", "\ud800"])
def test_what_is_no_content_type_is_refused(content_type: Any) -> None:
    with refused("message for 'orders': content_type"):
        add(content_type=content_type)


def test_an_empty_message_id_is_refused() -> None:
    """As headers.get("outbox-id", "") gives it: claimed once, it would have every other message skipped."""
    with pytest.raises(EncodingError, match="message id is empty"):
        message_id("")


@pytest.mark.parametrize("id", ["0190", "5bce92f0-7267-4c66-9894-aac66fc6c8c6", 7, b"x" * 16])
def test_an_id_that_is_no_uuid_is_refused(id: Any) -> None:
    with refused(r"id is a \w+; it must be a UUID"):
        add(id=id)


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ([("a", "b")], "headers are a list"),
        ("a=b", "headers are a str"),
        ({"a": 1}, "header 'a' is a int; header values are text"),
        ({"a": b"b"}, "header 'a' is a bytes"),
        ({"a": None}, "header 'a' is a NoneType"),
        ({1: "b"}, "header names are non-empty text, not int"),
        ({"": "b"}, "header names are non-empty text"),
        ({"a": "\x00"}, "header 'a' contains a NUL"),
        ({"a\x00": "b"}, "a header name contains a NUL"),
        ({"a": "\ud800"}, "header 'a' contains a lone surrogate"),
        ({"\ud800": "b"}, "a header name contains a lone surrogate"),
    ],
)
def test_what_are_no_headers_are_refused(headers: Any, why: str) -> None:
    with refused(why):
        add(headers=headers)


def test_headers_are_copied() -> None:
    headers = {"a": "b"}
    message = add(headers=headers)
    headers["a"] = "c"
    assert message.headers == {"a": "b"}
    assert add().headers == {}
    assert add().headers is not add().headers


def test_a_message_does_not_print_its_payload_and_headers() -> None:
    assert "secret" not in repr(add(payload=b"secret", headers={"a": "secret"}))


@given(st.text(st.characters(), min_size=1, max_size=300))
def test_any_text_is_a_good_key_topic_and_header_or_is_refused_by_name(text: str) -> None:
    good = 1 <= len(text) <= 255 and "\x00" not in text and not any("\ud800" <= c <= "\udfff" for c in text)
    if good:
        header = f"x{text}"  # the names that are ours are refused, which has its own test
        message = add(text, key=text, headers={header: text})
        assert (message.topic, message.key, message.headers) == (text, text, {header: text})
    else:
        for arguments in ({"topic": text}, {"key": text}, {"type": text}):
            with refused(next(iter(arguments))):
                add(**arguments)


# ---------------------------------------------------------------- misuse


@event("orders", type="order.placed")
class Placed:
    pass


class Undeclared:
    pass


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("orders",), r"add\(…, 'orders'\): the payload is missing, as in add\(session, 'orders', \{…\}, key=…\)"),
        ((Placed,), r"Placed\): this is the class itself; add takes an instance of it"),
        ((Undeclared,), r"this is the class itself; add takes an instance of a class declared with @event"),
        ((Undeclared(),), r"its class is not declared; decorate it with @event\(topic, type=…\), or give topic"),
        (({"a": 1},), "dict object"),
        ((None,), "NoneType object"),
    ],
)
def test_what_was_forgotten_is_said(arguments: Any, advice: str) -> None:
    with Session() as session, pytest.raises(TypeError, match=advice):
        outbox.add(session, *arguments)


@pytest.mark.parametrize("argument", [{"key": 1}, {"type": "a"}, {"content_type": "a"}])
def test_an_event_takes_key_and_type_from_its_declaration_only(argument: Any) -> None:
    with Session() as session, pytest.raises(TypeError, match="come from its @event declaration"):
        outbox.add(session, Placed(), **argument)


def test_a_subclass_of_a_declared_class_declares_itself() -> None:
    class Special(Placed):
        pass

    with Session() as session, pytest.raises(TypeError, match="its class is not declared"):
        outbox.add(session, Special())


@pytest.mark.parametrize("where", [None, "orders", object(), Session, outbox])
def test_what_is_no_session_is_refused(where: Any) -> None:
    with pytest.raises(TypeError, match="is no session or connection"):
        outbox.add(where, "orders", b"")
    with pytest.raises(TypeError, match="is no session or connection"):
        outbox.staged(where)


def test_a_forgotten_session_is_told_as_such() -> None:
    with pytest.raises(TypeError, match="str is no session or connection"):
        outbox.add("orders", {"a": 1})  # type: ignore[call-overload]


# ---------------------------------------------------------------- buckets


@given(st.text(st.characters(exclude_categories=["Cs"])), st.uuids())
def test_a_bucket_is_the_crc_32_of_the_keys_utf_8_modulo_64(key: str, id: uuid.UUID) -> None:
    crc = 0xFFFFFFFF
    for byte in key.encode("utf-8"):
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0xEDB88320 * (crc & 1)
    assert bucket_of(key, id) == (crc ^ 0xFFFFFFFF) % 64 == zlib.crc32(key.encode()) % BUCKETS


# For other languages: docs/table.md. (123456789 is the check value of CRC-32: CBF43926.)
VECTORS = {
    "a": 3,
    "42": 8,
    "123456789": 38,
    "order-7": 26,
    "ü": 21,
    "日本": 12,
    "00000000-0000-0000-0000-000000000007": 42,
}


@pytest.mark.parametrize(("key", "bucket"), VECTORS.items())
def test_the_bucket_of_known_keys(key: str, bucket: int) -> None:
    assert bucket_of(key, uuid.UUID(int=0)) == bucket


def test_messages_without_key_are_spread_over_all_buckets() -> None:
    buckets = [bucket_of(None, new_id()) for _ in range(6400)]
    counts = [buckets.count(bucket) for bucket in range(BUCKETS)]
    assert len(counts) == BUCKETS
    assert min(counts) > 50
    assert max(counts) < 170


# ---------------------------------------------------------------- ids


def test_ids_are_uuids_of_version_7_and_of_this_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = [new_id() for _ in range(10_000)]
    after = time.time_ns() // 1_000_000
    assert {(id.version, id.variant) for id in ids} == {(7, uuid.RFC_4122)}
    # a full counter borrows the next millisecond
    assert all(before <= id.int >> 80 <= after + 3 for id in ids)
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)


def test_ids_increase_in_every_thread_and_are_all_different() -> None:
    found: list[list[uuid.UUID]] = []

    def work() -> None:
        found.append([new_id() for _ in range(5_000)])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(ids == sorted(ids) for ids in found)
    everything = [id for ids in found for id in ids]
    assert len(set(everything)) == len(everything) == 40_000
    # also without the random bits: the order is of the counter, not of luck
    assert len({id.int >> 64 for id in everything}) == 40_000


def test_ids_increase_while_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()
    ticks = iter(now - offset * 1_000_000 for offset in range(10_000))
    monkeypatch.setattr("time.time_ns", lambda: next(ticks))
    ids = [new_id() for _ in range(10_000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_a_thread_makes_an_id_can_make_its_own() -> None:
    from outbox import _message

    with _message._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if new_id().version == 7 else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_does_not_use_the_random_bits_that_its_parent_drew() -> None:
    from outbox import _message

    new_id()
    assert _message._random
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"".join(new_id().bytes[8:] for _ in range(50)))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    found = os.read(reader, 400)
    os.close(reader)
    os.close(writer)
    its = {found[at : at + 8] for at in range(0, 400, 8)}
    assert len(its) == 50
    assert not its & {new_id().bytes[8:] for _ in range(200)}


def test_a_message_id_is_a_uuid_its_text_or_any_other_text_as_a_uuid() -> None:
    id = uuid.uuid4()
    assert message_id(id) == message_id(str(id)) == message_id(str(id).upper()) == id
    assert message_id("42") == uuid.uuid5(FOREIGN_IDS, "42") == message_id("42")
    assert message_id("42").version == 5


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
)
def test_different_foreign_ids_stay_different(one: str, other: str) -> None:
    assert (message_id(one) == message_id(other)) == (one == other)


def test_the_id_that_is_given_is_kept() -> None:
    id = uuid.UUID(int=0)
    assert add(id=id).id == id


@pytest.mark.parametrize(
    "name", ["outbox-id", "outbox-type", "outbox-key", "outbox-cycle", "outbox-version", "content-type", "Outbox-Id"]
)
def test_a_header_that_is_ours_is_refused_since_it_would_replace_the_messages_own(name: str) -> None:
    with pytest.raises(EncodingError, match=re.escape(repr(name))) as caught:
        check_headers({"tenant": "acme", name: "secret-value"}, "orders")
    assert "secret-value" not in str(caught.value)
