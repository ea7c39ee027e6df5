"""`outbox status`: relays that fell silent, and what consumers have before them."""

from __future__ import annotations

import re
import uuid
from typing import Any

import pytest

from tests.cli.command import quick
from tests.cli.conftest import Shop
from tests.cli.states import add, bury, relay, remember, wait


def status(shop: Shop) -> dict[str, Any]:
    found: dict[str, Any] = quick("status", "--json", "--database", shop.url).json()
    return found


def verdict(shop: Shop) -> str:
    said: str = status(shop)["verdict"]
    return said


def said(shop: Shop) -> str:
    return quick("status", "--database", shop.url).out


# ---------------------------------------------------------------- relays


def test_a_killed_relay_is_not_said_to_be_sending(shop: Shop) -> None:
    add(shop)
    relay(shop, silent=40, lease=60)
    assert re.fullmatch(
        r"Nothing is being sent: relay host:1 has been silent for 4\d\.\d s \(killed\?\), and its leases run out in (1\d|20) "
        r"s, at ....-..-.. ..:..:.. UTC; then a relay that runs goes on, and none does: start one with `outbox relay`\.",
        verdict(shop),
    )
    assert re.search(
        r"^host:1 +64 +4\d\.\d s ago +silent for 4\d\.\d s \(killed\? its share is free at ....-..-.. ..:..:.. UTC\)$",
        said(shop),
        re.M,
    )
    (found,) = status(shop)["relays"]
    assert (found["alive"], 59 < found["lease"] < 65, 10 < found["lease_left"] <= 20) == (False, True, True)


def test_a_relay_that_beats_every_third_of_its_lease_is_alive(shop: Shop) -> None:
    add(shop)
    relay(shop, silent=21, lease=60)
    assert verdict(shop) == "Messages are being sent; 1 waits."


def test_the_share_of_a_killed_relay_goes_to_the_other_one_and_it_says_when(shop: Shop) -> None:
    add(shop)
    relay(shop, "host:1", buckets=range(40), silent=40, lease=60)
    relay(shop, "host:2", buckets=range(40, 64))
    assert re.fullmatch(
        r"Messages of 40 of 64 buckets wait: relay host:1 has been silent for 4\d\.\d s \(killed\?\), and host:2 takes them "
        r"over in (1\d|20) s, at ....-..-.. ..:..:.. UTC; the others are sent\.",
        verdict(shop),
    )
    assert "(killed? its share is taken over at " in said(shop)


def test_a_relay_that_was_started_anew_after_a_kill_owns_nothing_yet(shop: Shop) -> None:
    add(shop)
    relay(shop, "host:1", silent=40, lease=60)
    relay(shop, "host:2", buckets=range(0))
    assert verdict(shop).startswith("Messages of 64 of 64 buckets wait: relay host:1 has been silent for ")
    assert "the others are sent" not in verdict(shop)
    assert [r["alive"] for r in status(shop)["relays"]] == [False, True]


def test_a_relay_whose_share_went_to_another_one_is_silent_and_no_reason_to_wait(shop: Shop) -> None:
    add(shop)
    relay(shop, "host:1", buckets=range(0), silent=40)
    relay(shop, "host:2")
    assert verdict(shop) == "Messages are being sent; 1 waits."
    assert re.search(r"^host:1 +0 .*silent for 4\d\.\d s \(killed\? it owns nothing\)$", said(shop), re.M)


def test_a_relay_that_died_long_ago_is_named_as_the_last_one(shop: Shop) -> None:
    add(shop)
    relay(shop, silent=4000)
    assert verdict(shop) == (
        "No relay is running: start one with `outbox relay` (the last one, host:1, has been silent for 1 h 6 m)."
    )


def test_a_killed_relay_is_said_although_nothing_waits(shop: Shop) -> None:
    relay(shop, silent=40, lease=60)
    assert re.fullmatch(
        r"Nothing waits to be sent; relay host:1 has been silent for 4\d\.\d s \(killed\?\) and no other one is running\.",
        verdict(shop),
    )


# ---------------------------------------------------------------- consumers


def test_a_consumer_that_tries_again_is_in_the_sentence_although_all_is_sent(shop: Shop) -> None:
    relay(shop)
    wait(shop, uuid.uuid4(), "billing", 60, attempts=2)
    wait(shop, uuid.uuid4(), "billing", 90, attempts=5, last_error="KeyError: 'total'")
    assert re.fullmatch(
        r"Nothing waits to be sent; consumer billing tries 2 messages again, the next in ([345]\d\.\d s|1 m 0 s), after "
        r"up to 5 failed attempts \(ValueError: no such order\)\.",
        verdict(shop),
    )


def test_each_consumer_has_its_line(shop: Shop) -> None:
    first, second = add(shop, "1"), add(shop, "2")
    bury(shop, first, "billing")
    remember(shop, second.id, "search")
    for key in ("1", "1", "2", None):
        wait(shop, uuid.uuid4(), "billing", key=key)
    wait(shop, uuid.uuid4(), "mail", 0, state="replay", attempts=0)
    billing, mail, search = status(shop)["consumers"]
    assert (billing["consumer"], billing["waiting"], billing["blocked_keys"], billing["dead_letters"]) == (
        "billing",
        4,
        2,
        1,
    )
    assert 30 < billing["next_attempt_in"] <= 60
    assert (billing["attempts"], billing["last_error"], billing["replays"]) == (3, "ValueError: no such order", 0)
    assert (mail["consumer"], mail["waiting"], mail["replays"], mail["dead_letters"]) == ("mail", 0, 1, 0)
    assert (search["consumer"], search["waiting"], search["next_attempt_in"]) == ("search", 0, None)
    text = said(shop)
    head = r"^consumer +waiting +next attempt +failed +blocked keys +replays +dead letters +last error$"
    assert re.search(head, text, re.M)
    assert re.search(r"^billing +4 +in ([345]\d\.\d s|1 m 0 s) +3 +2 +0 +1 +ValueError: no such order$", text, re.M)
    assert re.search(r"^search +0 +- +- +0 +0 +0 +-$", text, re.M)


def test_what_is_due_for_long_asks_whether_the_consumer_runs(shop: Shop) -> None:
    wait(shop, uuid.uuid4(), "billing", -300)
    wait(shop, uuid.uuid4(), "mail", -30, state="replay", attempts=0)
    assert "; consumer billing has 1 message to try again, due for 5 m " in verdict(shop)
    assert "1 replay waits for consumer mail, for 3" in verdict(shop)
    assert verdict(shop).count("is it running?") == 2
    assert re.search(r"^billing +1 +5 m \d s ago ", said(shop), re.M)


def test_an_outbox_without_consumers_has_no_such_table(shop: Shop) -> None:
    assert status(shop)["consumers"] == []
    assert "consumer" not in said(shop)


@pytest.mark.parametrize("count", [1, 2])
def test_one_message_and_two_messages(shop: Shop, count: int) -> None:
    relay(shop)
    for number in range(count):
        bury(shop, add(shop, str(number)))
        wait(shop, uuid.uuid4(), "billing")
    letters, messages = (("1 dead letter is", "1 message"), ("2 dead letters are", "2 messages"))[count - 1]
    assert f"; {letters} open" in verdict(shop)
    assert f"tries {messages} again" in verdict(shop)
