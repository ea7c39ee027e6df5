"""Our headers cannot be replaced by somebody's: the inbox would skip a message under an id that is not its own."""

from __future__ import annotations

import json
import uuid

import pytest

from outbox import wire
from outbox._outgoing import Outgoing
from outbox.errors import DecodingError

ID = "018f3c1e-7c1a-7000-8000-000000000001"


def stored(headers: str | None) -> Outgoing:
    return Outgoing(1, ID, "orders", "42", "order.placed", b"{}", "application/json", headers, 8)


def test_our_headers_come_first_and_the_users_after_them() -> None:
    assert wire.headers(stored('{"tenant": "acme"}')) == [
        ("outbox-id", ID.encode()),
        ("outbox-type", b"order.placed"),
        ("content-type", b"application/json"),
        ("tenant", b"acme"),
    ]


@pytest.mark.parametrize("name", ["outbox-id", "outbox-type", "content-type", "outbox-key"])
def test_a_row_written_by_hand_does_not_replace_our_headers_by_its_own(name: str) -> None:
    sent = wire.headers(stored(json.dumps({name: str(uuid.uuid4()), "tenant": "acme"})))
    assert wire.text_headers(sent) == wire.text_headers(wire.headers(stored('{"tenant": "acme"}')))


def test_the_cycle_of_a_replay_and_the_version_of_a_declared_message_are_sent() -> None:
    sent = wire.text_headers(wire.headers(stored('{"outbox-cycle": "2", "outbox-version": "3"}')))
    assert (wire.cycle(sent), sent["outbox-version"]) == (2, "3")


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', "{", '"x"'])
def test_headers_that_are_no_object_of_text_are_a_decoding_error(text: str) -> None:
    with pytest.raises(DecodingError):
        wire.headers(stored(text))
