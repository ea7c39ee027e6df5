"""`outbox status`, `trace` and `migrate`: what they say of an outbox in each of its states."""

from __future__ import annotations

import datetime as dt
import re
import uuid

import pytest
import sqlalchemy as sa

from outbox.dialects import clock
from tests.cli.command import Done, outbox, quick
from tests.cli.conftest import Shop
from tests.cli.states import add, age, bury, park, relay


def status(shop: Shop, *options: str) -> Done:
    return quick("status", *options, "--database", shop.url)


def verdict(shop: Shop) -> str:
    found: str = status(shop, "--json").json()["verdict"]
    return found


# ---------------------------------------------------------------- status


def test_an_empty_outbox_has_nothing_to_send(shop: Shop) -> None:
    done = status(shop)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("Nothing waits to be sent.\n")
    assert re.search(r"^pending +0$", done.out, re.M)
    assert "oldest" not in done.out


def test_status_counts_what_is_in_each_place(shop: Shop) -> None:
    park(shop, add(shop, "1"))
    bury(shop, add(shop, "2"))
    add(shop, "3")
    add(shop, "4")
    add(shop, "5", deliver_at=dt.timedelta(hours=3))
    found = status(shop, "--json").json()
    counts = {name: found[name] for name in ("pending", "scheduled", "parked", "parked_keys", "dead_letters", "inbox")}
    assert counts == {"pending": 2, "scheduled": 1, "parked": 1, "parked_keys": 1, "dead_letters": 1, "inbox": 0}
    assert 10_700 < found["next_due"] <= 10_800
    text = status(shop).out
    assert re.search(r"^pending +2$", text, re.M)
    assert re.search(r"^scheduled +1, the next in 2 h 59 m$", text, re.M)
    assert re.search(r"^parked +1 of 1 key$", text, re.M)
    assert re.search(r"^dead letters +1 open$", text, re.M)


def test_without_a_relay_it_says_so(shop: Shop) -> None:
    add(shop)
    assert verdict(shop) == "No relay is running: start one with `outbox relay`."


def test_a_relay_that_is_gone_is_told_from_one_that_never_was(shop: Shop) -> None:
    add(shop)
    tables = shop.outbox.tables
    shop.execute(sa.update(tables.lease).values(owner="host:1", expires_at=clock(20)))
    assert re.fullmatch(
        r"Nothing is being sent: the relay that held the leases is gone, and they run out in (19|20) s, .*",
        verdict(shop),
    )
    shop.execute(sa.update(tables.lease).values(expires_at=clock(-20)))
    assert verdict(shop).startswith("No relay is running")


def test_with_a_relay_messages_are_being_sent(shop: Shop) -> None:
    add(shop)
    relay(shop)
    assert verdict(shop) == "Messages are being sent; 1 waits."
    assert re.search(r"^host:1 +64 +\d\.\d s ago +sending$", status(shop).out, re.M)
    age(shop, shop.outbox.tables.message, 90)
    assert re.fullmatch(r"Messages are being sent, and 1 waits, the oldest for 9\d s\.", verdict(shop))


def test_a_broker_that_is_away_is_the_reason_and_nothing_is_lost(shop: Shop) -> None:
    add(shop)
    relay(shop, state='{"circuits": {"*": {"since": 1795370472.0, "reason": "kafka: cannot reach a broker"}}}')
    assert verdict(shop) == (
        "The broker is unavailable since 2026-11-22 18:01:12 UTC (kafka: cannot reach a broker); nothing is lost, sending "
        "goes on when it is back."
    )
    assert "broker: kafka: cannot reach a broker" in status(shop).out


def test_a_topic_that_is_away_is_the_reason_for_its_messages_only(shop: Shop) -> None:
    add(shop)
    relay(shop, state='{"circuits": {"orders": {"since": 1795370472.0, "reason": "not authorised"}}}')
    assert verdict(shop) == ("Messages for orders wait, since it is unavailable (not authorised); others are sent.")


def test_one_of_several_brokers_that_is_away_is_the_reason_for_its_messages_only(shop: Shop) -> None:
    add(shop)
    away = '{"since": 1795370472.0, "reason": "no answer"}'
    relay(shop, state=f'{{"circuits": {{"kafka (*)": {away}, "mail": {away}}}}}')
    assert verdict(shop) == (
        "Messages for kafka (*), mail wait, since they are unavailable (no answer); others are sent."
    )
    assert "kafka (*): no answer; mail: no answer" in status(shop).out


def test_buckets_that_nobody_owns_are_the_reason(shop: Shop) -> None:
    add(shop)
    relay(shop, buckets=range(60))
    assert verdict(shop).startswith("4 of 64 buckets have no relay at the moment")


def test_parked_messages_are_explained_by_what_the_broker_said(shop: Shop) -> None:
    park(shop, add(shop))
    assert verdict(shop).startswith("No relay is running")
    relay(shop)
    parked = "1 message of 1 key is parked after a failure and will be tried again (Refused: too warm)"
    assert verdict(shop) == f"{parked}; all others are sent."
    add(shop, "2")
    assert verdict(shop) == f"Messages are being sent; 1 waits; {parked}."


def test_what_is_scheduled_is_not_late(shop: Shop) -> None:
    add(shop, deliver_at=dt.timedelta(hours=3))
    age(shop, shop.outbox.tables.scheduled, 3600)
    assert verdict(shop).startswith("The 1 message that is left is scheduled for later, in 10")
    assert verdict(shop).endswith("but no relay is running.")
    assert status(shop, "--fail-if-older", "1s").status == 0
    relay(shop)
    assert verdict(shop).endswith(" s.")


def test_only_dead_letters_are_left(shop: Shop) -> None:
    bury(shop, add(shop))
    assert verdict(shop) == "Nothing waits to be sent; 1 dead letter is open: see `outbox dlq groups`."


@pytest.mark.parametrize("where", ["message", "parked", "scheduled"])
def test_fail_if_older_fails_wherever_the_oldest_message_waits(shop: Shop, where: str) -> None:
    message = add(shop, deliver_at=dt.timedelta(seconds=-600) if where == "scheduled" else None)
    if where != "scheduled":
        age(shop, shop.outbox.tables.message, 600)
    if where == "parked":
        park(shop, message)
    late = status(shop, "--fail-if-older", "5m")
    assert late.status == 1
    assert late.err == "outbox status: the oldest message has waited longer than 5m\n"
    assert re.search(r"^oldest unsent +10 m \d s$", late.out, re.M)
    assert status(shop, "--fail-if-older", "11m").status == 0
    assert status(shop, "--fail-if-older", "5m", "--json").json()["oldest"] > 599


@pytest.mark.parametrize("text", ["5 minutes", "", "-5m", "m"])
def test_an_age_that_cannot_be_read_is_wrong_usage(sqlite: Shop, text: str) -> None:
    done = status(sqlite, f"--fail-if-older={text}")
    assert done.status == 2
    assert f"{text!r} is no age: write 90s, 5m, 2h or 1d" in done.err


# ---------------------------------------------------------------- trace


def trace(shop: Shop, *what: str) -> tuple[int, str]:
    """Exit status and verdict, the same in both forms of output."""
    plain, machine = (quick("trace", *what, *form, "--database", shop.url) for form in ((), ("--json",)))
    said: str = machine.json()["verdict"]
    assert plain.out.splitlines()[-1] == said
    assert plain.status == machine.status
    return plain.status, said


def test_a_committed_message_waits_for_the_relay(shop: Shop) -> None:
    message = add(shop, "42")
    assert trace(shop, str(message.id)) == (0, "This message is committed and waits for the relay.")


def test_a_scheduled_message_says_when(shop: Shop) -> None:
    message = add(shop, deliver_at=dt.datetime(2031, 5, 4, 3, 2, tzinfo=dt.UTC))
    assert trace(shop, str(message.id))[1].startswith("This message is scheduled for 2031-05-04 03:02:00")


def test_a_parked_message_says_why_and_until_when_and_its_successor_for_whom(shop: Shop) -> None:
    first, second = add(shop), add(shop)
    park(shop, first)
    park(shop, second, "behind")
    assert trace(shop, str(first.id))[1].startswith(
        "This message failed twice (Refused: too warm) and is tried again at 20"
    )
    assert trace(shop, str(second.id))[1] == "This message waits behind an earlier message of its key that failed."


def test_a_dead_letter_of_the_relay_could_not_be_sent(shop: Shop) -> None:
    message = add(shop)
    bury(shop, message)
    assert trace(shop, str(message.id))[1] == "This message could not be sent and is a dead letter (retries-exhausted)."


def test_a_message_that_somebody_wrote_down_as_sent_says_when(shop: Shop) -> None:
    id = uuid.uuid4()
    shop.execute(sa.insert(shop.outbox.tables.sent).values(position=1, id=id, topic="orders"))
    assert trace(shop, str(id))[1].startswith("This message was sent to orders at 20")


@pytest.mark.parametrize("what", [[str(uuid.uuid4())], ["not-one-of-our-ids"]])
def test_an_unknown_message_is_the_answer_no(shop: Shop, what: list[str]) -> None:
    exit_status, said = trace(shop, *what)
    assert exit_status == 1
    assert "it was never committed here, or it was sent" in said
    assert "history" not in said


def test_a_trace_shows_the_rows_and_no_payload(shop: Shop) -> None:
    message = add(shop)
    done = quick("trace", str(message.id), "--database", shop.url)
    assert done.out.startswith("message\n  position         1\n")
    found = quick("trace", str(message.id), "--json", "--database", shop.url).json()["found"]
    assert [row["table"] for row in found] == ["message"]
    assert (found[0]["id"], found[0]["topic"], found[0]["key"]) == (str(message.id), "orders", "1")
    assert "payload" not in found[0]


@pytest.mark.parametrize("arguments", [[], ["x", "--key", "1"]])
def test_a_trace_is_of_an_id_or_of_a_key(sqlite: Shop, arguments: list[str]) -> None:
    done = quick("trace", *arguments, "--database", sqlite.url)
    assert done.status == 2
    assert "--key" in done.err


# ---------------------------------------------------------------- migrate


def test_migrate_makes_the_tables_and_then_leaves_them(shop: Shop) -> None:
    made = outbox("migrate", "--prefix", "mine_", "--database", shop.url)
    said = "outbox tables are at version 2 (ran 0001_tables, 0002_storage_and_closed)\n"
    assert (made.status, made.out, made.err) == (0, said, "")
    again = outbox("migrate", "--prefix", "mine_", "--database", shop.url)
    assert (again.status, again.out) == (0, "outbox tables are at version 2, as they were\n")
    assert outbox("status", "--prefix", "mine_", "--database", shop.url).status == 0
