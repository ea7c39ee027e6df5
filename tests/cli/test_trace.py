"""`outbox trace`: what consumers did with a message, and who did what with its dead letters."""

from __future__ import annotations

import re
import uuid
from typing import Any

from tests.cli.command import quick
from tests.cli.conftest import Shop
from tests.cli.states import add, bury, park, remember, wait


def trace(shop: Shop, *what: str) -> str:
    """The verdict."""
    said: str = quick("trace", *what, "--json", "--database", shop.url).json()["verdict"]
    return said


def rows(shop: Shop, table: str, *what: str) -> list[dict[str, Any]]:
    found = quick("trace", *what, "--json", "--database", shop.url).json()["found"]
    return [row for row in found if row["table"] == table]


def dlq(shop: Shop, *arguments: str) -> None:
    done = quick("dlq", *arguments, "--who", "ada@ops", "--database", shop.url)
    assert done.status == 0, done


def test_what_each_consumer_did_with_it_and_when(shop: Shop) -> None:
    message = add(shop)
    bury(shop, message, "mail")
    remember(shop, message.id, "billing")
    wait(shop, message.id, "search", attempts=2)
    assert re.fullmatch(
        r"This message has left this outbox; billing handled it at 20..-..-.. ..:..:.. UTC; it is an open dead letter of "
        r"mail since 20..-..-.. ..:..:.. UTC \(retries-exhausted, ValueError\); search failed with it twice and tries it "
        r"again at 20..-..-.. ..:..:.. UTC \(ValueError: no such order\)\.",
        trace(shop, str(message.id)),
    )


def test_a_retry_that_nobody_takes_says_since_when_it_is_due(shop: Shop) -> None:
    message = add(shop)
    wait(shop, message.id, "search", -600)
    assert re.search(r"; search failed with it 3 times, and the next attempt is due since 20.* UTC: is it running\?",
                     trace(shop, str(message.id)))  # fmt: skip


def test_who_replayed_it_and_what_became_of_that(shop: Shop) -> None:
    message = add(shop)
    letter = bury(shop, message, "billing")
    dlq(shop, "replay", str(letter), "--why", "price mended")
    (audit,) = rows(shop, "audit", str(message.id))
    assert (audit["action"], audit["who"], audit["why"], audit["dead_letter"]) == (
        "replay",
        "ada@ops",
        "price mended",
        str(letter),
    )
    assert re.search(
        r"; ada@ops replayed it for billing at 20..-..-.. ..:..:.. UTC \(price mended\), and it waits for billing to run\.$",
        trace(shop, str(message.id)),
    )
    with shop.engine.begin() as connection:  # what the consumer does
        assert shop.outbox.claim(connection, "billing", message.id, cycle=1)
    shop.execute("delete from outbox_attempt")
    assert re.search(
        r"; billing handled it at 20..-..-.. ..:..:.. UTC, after ada@ops replayed it at 20..-..-.. ..:..:.. UTC \(price",
        trace(shop, str(message.id)),
    )


def test_who_discarded_it_by_group(shop: Shop) -> None:
    message, other = add(shop, "1"), add(shop, "2")
    bury(shop, message, "billing")
    bury(shop, other, "billing", fingerprint="00000000")
    dlq(shop, "discard", "--group", "F3A9C012", "--why", "test orders")
    assert re.search(
        r"; ada@ops discarded it for billing at 20..-..-.. ..:..:.. UTC \(test orders\)\.$",
        trace(shop, str(message.id)),
    )
    assert rows(shop, "audit", str(other.id)) == []
    assert rows(shop, "audit", "--key", "1") != []


def test_a_replay_whose_line_in_the_audit_is_gone_says_that_nobody_knows(shop: Shop) -> None:
    message = add(shop)
    dlq(shop, "replay", str(bury(shop, message, "billing")))
    shop.execute("delete from outbox_audit")
    assert "; somebody (no line of the audit fits) replayed it for billing at " in trace(shop, str(message.id))


def test_a_replay_of_the_relays_dead_letter_waits_in_the_outbox(shop: Shop) -> None:
    message = add(shop)
    dlq(shop, "replay", str(bury(shop, message)))
    assert re.fullmatch(
        r"This message is committed and waits for the relay; ada@ops replayed it at 20..-..-.. ..:..:.. UTC\.",
        trace(shop, str(message.id)),
    )


def test_a_dead_letters_own_id_leads_to_its_message(shop: Shop) -> None:
    message = add(shop)
    letter = bury(shop, message, "billing")
    assert rows(shop, "inbox", str(letter))[0]["message_id"] == str(message.id)
    assert f"This message ({message.id}, whose dead letter {letter} is)" in trace(shop, str(letter))


def test_a_key_is_joined_to_the_inbox_through_the_ids_that_are_known(shop: Shop) -> None:
    dead, failing, handled, waiting = (add(shop, "42") for _ in range(4))
    park(shop, add(shop, "42"))
    bury(shop, dead, "billing")
    remember(shop, dead.id, "search")
    remember(shop, handled.id, "billing")
    wait(shop, failing.id, "billing", key="42")
    for gone in (handled, failing):
        shop.execute(f"delete from outbox_message where id = '{_text(shop, gone.id)}'")
    assert {(row["consumer"], row["outcome"]) for row in rows(shop, "inbox", "--key", "42")} == {
        ("billing", "dead"),
        ("search", "done"),
    }
    assert re.fullmatch(
        r"Key '42': a message failed twice \(Refused: too warm\) and is tried again at 20..-..-.. ..:..:.. UTC; 1 message is "
        r"committed and waits for the relay; billing tries 1 message again at 20..-..-.. ..:..:.. UTC; 1 open dead letter of "
        r"billing; search handled 1 message; of what was sent and handled no row has the key, so there may be more: trace "
        r"those by id\.",
        trace(shop, "--key", "42"),
    )
    assert waiting.key == "42"


def test_a_key_that_nobody_knows_says_what_cannot_be_known(shop: Shop) -> None:
    done = quick("trace", "--key", "nobody", "--database", shop.url)
    assert done.status == 1
    assert done.out == (
        "Key 'nobody' is in none of these tables: nothing of it waits, and none of it is a dead letter; of what was sent and "
        "handled no row has the key, so there may be more: trace those by id.\n"
    )


def test_more_rows_than_are_shown_are_said(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        for _ in range(201):
            shop.outbox.add(connection, "orders", {}, key="7")
    done = quick("trace", "--key", "7", "--database", shop.url)
    assert "(the first 200 rows of outbox_message; there are more)" in done.err
    assert trace(shop, "--key", "7").startswith("Key '7': 200 or more messages are committed and wait for the relay;")


def _text(shop: Shop, id: uuid.UUID) -> str:
    return id.hex if shop.engine.dialect.name == "sqlite" else str(id)
