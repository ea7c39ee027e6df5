"""What goes to SQS and comes back: whatever a message holds, in at most ten attributes and a body that it allows."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import wire
from outbox.testing.conformance import message
from outbox.transports._sqs_message import ATTRIBUTES, ENCODING, HEADERS, entry_of, group_id, read
from outbox.transports._sqs_queues import batches

ALLOWED = re.compile("[\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NAMES = TEXT.filter(bool) | st.sampled_from(
    ["traceparent", "AWS.x", "amazon.y", "a..b", ".a", "a.", "a b", HEADERS, ENCODING]
)


def received(entry: dict[str, Any]) -> dict[str, Any]:
    return {"Body": entry["MessageBody"], "MessageAttributes": entry["MessageAttributes"]}


@given(st.none() | st.binary() | TEXT.map(str.encode), st.dictionaries(NAMES, TEXT, max_size=15), TEXT.filter(bool))
def test_whatever_goes_in_comes_out(payload: bytes | None, headers: dict[str, str], key: str) -> None:
    for name in (wire.ID, wire.TYPE, wire.KEY, wire.CONTENT_TYPE, wire.TOMBSTONE, HEADERS, ENCODING):
        headers.pop(name, None)
    sent = message("orders", key, payload, headers=headers)
    entry, size = entry_of(sent, fifo=False)
    attributes = entry["MessageAttributes"]
    assert len(attributes) <= ATTRIBUTES
    assert ALLOWED.fullmatch(entry["MessageBody"])
    assert all(ALLOWED.fullmatch(value["StringValue"]) for value in attributes.values())
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,256}", name) for name in attributes)
    assert size >= len(entry["MessageBody"].encode())
    found, out = read(received(entry))
    assert found == payload
    wanted = {wire.ID: sent.id, wire.KEY: key, **headers}
    assert dict(out) == {name: value.encode() for name, value in wanted.items()}
    assert len(out) == len(wanted)


def test_ours_are_attributes_where_there_are_many() -> None:
    """So that others can filter by type, and the id is found without unpacking."""
    many = {f"a{number}": "x" for number in range(20)}
    entry, _ = entry_of(message("orders", "k", b"\x00", type="order.placed", headers=many), fifo=False)
    assert {wire.ID, wire.TYPE, wire.KEY, ENCODING, HEADERS} <= entry["MessageAttributes"].keys()
    assert len(entry["MessageAttributes"]) == ATTRIBUTES
    assert len(json.loads(entry["MessageAttributes"][HEADERS]["StringValue"])) == 20 - (ATTRIBUTES - 5)


@pytest.mark.parametrize(
    "foreign",
    [
        {},
        {"Body": "x", "MessageAttributes": {HEADERS: {"StringValue": "[1"}}},
        {"Body": "x", "MessageAttributes": {HEADERS: {"StringValue": "[1]"}}},
        {"Body": "x", "MessageAttributes": {HEADERS: {"StringValue": "[" * 100_000}}},
        {"Body": "no base64 at all", "MessageAttributes": {ENCODING: {"StringValue": "base64"}}},
        {"Body": "x", "MessageAttributes": {"n": {"DataType": "Binary", "BinaryValue": b"\xff"}, "m": {}}},
        {"Body": "\ud800", "MessageAttributes": None},
    ],
)
def test_what_others_send_is_read_as_far_as_it_goes(foreign: dict[str, Any]) -> None:
    payload, headers = read(foreign)
    assert payload is not None
    assert all(isinstance(name, str) and isinstance(value, bytes) for name, value in headers)


def test_a_message_that_is_replayed_is_no_duplicate_to_a_fifo_queue() -> None:
    sent = message("orders", "k")
    again = message("orders", "k", headers={wire.CYCLE: "2"})
    assert entry_of(sent, fifo=True)[0]["MessageDeduplicationId"] == sent.id
    assert entry_of(again, fifo=True)[0]["MessageDeduplicationId"] == f"{again.id}-2"
    late = [message("orders", "k", headers={wire.CYCLE: str(10**12 + last)}) for last in (1, 2)]
    assert [entry_of(m, fifo=True)[0]["MessageDeduplicationId"][-1] for m in late] == ["1", "2"]
    assert "MessageDeduplicationId" not in entry_of(sent, fifo=False)[0]


@given(TEXT.filter(bool) | st.text("ab", min_size=100, max_size=255))
def test_every_key_is_a_group(key: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9!-/:-@\[-`{-~]{1,128}", group_id(key))


def test_keys_that_are_groups_stay_as_they_are() -> None:
    assert group_id("customer-17/ü") != group_id("customer-17/ö")
    assert group_id("customer-17/(a)") == "customer-17/(a)"


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_batches_are_full_and_hold_the_limits(sizes: list[int]) -> None:
    entries: list[tuple[int, dict[str, Any], int]] = [(number, {}, size) for number, size in enumerate(sizes)]
    found = batches(entries, 300)
    assert [number for batch in found for number, _ in batch] == list(range(len(sizes)))
    for batch, following in zip(found, [*found[1:], []], strict=True):
        total = sum(sizes[number] for number, _ in batch)
        assert 0 < len(batch) <= 10
        assert total <= 300
        if following and len(batch) < 10:
            assert total + sizes[following[0][0]] > 300
