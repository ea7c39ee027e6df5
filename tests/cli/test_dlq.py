"""`outbox dlq`: which dead letters are meant, what a replay will do, and what the exit status says."""

from __future__ import annotations

import re
import uuid

import pytest

from tests.cli.command import Done, quick, refused
from tests.cli.conftest import Shop
from tests.cli.states import add, bury, remember, wait


def dlq(shop: Shop, *arguments: str) -> Done:
    return quick("dlq", *arguments, "--database", shop.url)


# ---------------------------------------------------------------- which one


def test_a_message_id_names_its_dead_letter(shop: Shop) -> None:
    message = add(shop)
    letter = bury(shop, message, "billing")
    for id in (letter, message.id):
        assert f"{letter}" in dlq(shop, "show", str(id)).out
    assert dlq(shop, "replay", str(message.id)).status == 0
    assert dlq(shop, "show", str(message.id), "--json").json()["state"] == "replayed"


def test_the_id_of_a_foreign_message_is_any_text(shop: Shop) -> None:
    from outbox._message import message_id

    message = add(shop)
    bury(shop, message, "billing", message_id=message_id("invoice-7"))
    assert dlq(shop, "discard", "invoice-7", "--why", "test").status == 0


def test_a_message_with_several_dead_letters_lists_them(shop: Shop) -> None:
    message = add(shop)
    letters = [bury(shop, message, consumer) for consumer in ("billing", "mail")]
    for verb in (["show"], ["replay"], ["discard", "--why", "test"]):
        done = dlq(shop, verb[0], str(message.id), *verb[1:])
        assert (done.status, done.out) == (2, "")
        first, *lines = done.err.splitlines()
        assert first == f"outbox dlq: message {message.id} has 2 dead letters; say which one by its own id:"
        assert [line.split()[:3] for line in lines] == [
            [str(letters[0]), "billing", "open"],
            [str(letters[1]), "mail", "open"],
        ]


def test_of_several_conditions_choose(shop: Shop) -> None:
    message = add(shop)
    for consumer in ("billing", "mail"):
        bury(shop, message, consumer)
    assert dlq(shop, "replay", str(message.id), "--consumer", "mail").status == 0
    assert [letter["consumer"] for letter in dlq(shop, "list", "--json").json()] == ["billing"]
    assert "that fits the rest" in dlq(shop, "replay", str(message.id), "--consumer", "search").err


def test_of_several_the_only_open_one_is_replayed(shop: Shop) -> None:
    message = add(shop)
    bury(shop, message, "billing", state="replayed")
    letter = bury(shop, message, "billing", cycle=1)
    assert dlq(shop, "replay", str(message.id)).status == 0
    assert dlq(shop, "show", str(letter), "--json").json()["state"] == "replayed"


@pytest.mark.parametrize("verb", ["show", "replay", "discard"])
def test_an_id_of_nothing_is_the_answer_no(shop: Shop, verb: str) -> None:
    id = str(uuid.uuid4())
    done = dlq(shop, verb, id, *(["--why", "test"] if verb == "discard" else []))
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        f"outbox dlq {verb}: there is no dead letter {id}, and none of a message of that id: see "
        f"`outbox dlq list --state any` and `outbox trace {id}`\n"
    )


def test_one_that_is_closed_already_is_the_answer_no(shop: Shop) -> None:
    letter = bury(shop, add(shop), "billing")
    assert dlq(shop, "discard", str(letter), "--why", "test").status == 0
    done = dlq(shop, "replay", str(letter))
    assert (done.status, done.err) == (1, f"outbox dlq replay: dead letter {letter} is discarded already\n")


# ---------------------------------------------------------------- groups


def test_the_first_letters_of_a_group_are_enough(shop: Shop) -> None:
    letter = bury(shop, add(shop), "billing", fingerprint="F3A9C012")
    bury(shop, add(shop), "billing", fingerprint="F3B00000")
    bury(shop, add(shop), "billing", fingerprint="F3B00000")
    assert [row["id"] for row in dlq(shop, "list", "--group", "f3a", "--json").json()] == [str(letter)]
    assert dlq(shop, "replay", "--group", "F3A9", "--json").json()["replayed"] == 1
    assert dlq(shop, "list", "--state", "replayed", "--group", "F3A9", "--json").json() != []
    assert dlq(shop, "discard", "--group", "F3B0", "--why", "test", "--dry-run", "--json").json() == {"would": 2}


@pytest.mark.parametrize("verb", ["list", "replay"])
def test_first_letters_of_several_groups_list_them(shop: Shop, verb: str) -> None:
    for fingerprint in ("F3A9C012", "F3B00000", "F3B00000"):
        bury(shop, add(shop), "billing", fingerprint=fingerprint)
    refused(
        dlq(shop, verb, "--group", "F3"),
        2,
        "group 'F3': several begin like this: F3A9C012 (1 dead letter), F3B00000 (2 dead letters)",
    )


@pytest.mark.parametrize("group", ["0BAD", "%", "F3A9C0123", ""])
def test_a_group_that_is_not_there_is_the_answer_no(shop: Shop, group: str) -> None:
    bury(shop, add(shop), "billing", fingerprint="F3A9C012")
    done = dlq(shop, "replay", "--group", group)
    assert (done.status, done.out) == (1, "")
    assert f"no open dead letter is of group {group!r}; `outbox dlq groups` lists them" in done.err


def test_groups_say_what_the_relays_label_means(shop: Shop) -> None:
    bury(shop, add(shop), "billing")
    note = "(relay): no consumer has seen these; the relay could not send them. Select them with --consumer '(relay)'."
    assert note not in dlq(shop, "groups").out
    bury(shop, add(shop))
    assert dlq(shop, "groups").out.endswith(f"{note}\n")
    assert dlq(shop, "list", "--consumer", "(relay)").out.splitlines()[-1] == note
    assert [g["consumer"] for g in dlq(shop, "groups", "--consumer", "(relay)", "--json").json()] == [""]
    assert dlq(shop, "replay", "--consumer", "(relay)", "--json").json()["replayed"] == 1


# ---------------------------------------------------------------- replay


def test_a_dry_run_says_to_whom_and_what_may_happen_twice(shop: Shop) -> None:
    bury(shop, add(shop, "1"), "billing")
    bury(shop, add(shop, "2"), "billing")
    done = dlq(shop, "replay", "--consumer", "billing", "--dry-run")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == [
        "Would replay 2 dead letters.",
        "2 to consumer billing alone, through outbox_attempt: handled while it runs (`outbox consume`), waiting there until "
        "then.",
        "  Its database is safe: what the failed attempts wrote was rolled back. What they did elsewhere (HTTP calls, mail) "
        "can happen again.",
        "  Order of their 2 keys: billing has handled nothing since they failed, so no later message came before them.",
    ]
    assert dlq(shop, "list", "--json").json()[0]["state"] == "open"


def test_a_replay_says_the_same_of_what_it_did(shop: Shop) -> None:
    bury(shop, add(shop, "1"), "billing")
    would = dlq(shop, "replay", "--consumer", "billing", "--dry-run").out.splitlines()
    did = dlq(shop, "replay", "--consumer", "billing").out.splitlines()
    assert (would[0], did[0]) == ("Would replay 1 dead letter.", "Handed back 1 dead letter.")
    assert would[1:] == did[1:]


def test_later_messages_of_the_key_are_counted_where_they_can_be(shop: Shop) -> None:
    first, known, open_ = (add(shop, "1") for _ in range(3))
    bury(shop, first, "billing", offset=1, partition=0)
    bury(shop, known, "billing", offset=2, partition=0, state="replayed", message_id=known.id)
    shop.execute("update outbox_inbox set outcome = 'done' where outcome = 'dead' and message_id <> "
                 f"'{first.id.hex if shop.engine.dialect.name == 'sqlite' else first.id}'")  # fmt: skip
    bury(shop, open_, "billing", offset=3, partition=0)
    for _ in range(4):
        remember(shop, uuid.uuid4(), "billing")
    plan = dlq(shop, "replay", "--consumer", "billing", "--limit", "1", "--dry-run", "--json").json()
    assert plan["would"] == 1
    (to,) = plan["to"]
    assert (to["consumer"], to["through"], to["count"], to["keys"]) == ("billing", "outbox_attempt", 1, 1)
    assert (to["handled_later"], to["later_open"]) == (1, 1)
    assert to["handled_later_at_most"] == 5
    assert (
        plan["notes"] == dlq(shop, "replay", "--consumer", "billing", "--limit", "1", "--dry-run").out.splitlines()[1:]
    )
    assert plan["notes"][-1] == (
        "  Order of its 1 key: later messages may have been handled already: at least 1 (as far as dead letters of these "
        "keys tell), at most 5 (all that billing has handled since; the inbox keeps no keys); 1 later dead letter of it "
        "stays open."
    )


def test_the_relays_go_back_into_its_queue(shop: Shop) -> None:
    bury(shop, add(shop, "1"), offset=1)
    add(shop, "1")
    done = dlq(shop, "replay", "--consumer", "", "--dry-run")
    assert done.out.splitlines() == [
        "Would replay 1 dead letter.",
        "1 to the relay's queue, outbox_message, under its old id: sent while a relay runs (`outbox relay`).",
        "  The broker never acknowledged it; a consumer that has it all the same skips it by its id.",
        "  Order of its 1 key: later messages may have been sent meanwhile, and how many cannot be known (what is sent "
        "leaves no row); 1 that waits now goes first.",
    ]


def test_a_replay_waits_behind_those_that_wait_already(shop: Shop) -> None:
    bury(shop, add(shop), "billing", key=None)
    wait(shop, uuid.uuid4(), "billing", 0, state="replay", attempts=0)
    out = dlq(shop, "replay", "--consumer", "billing", "--dry-run").out
    assert "waiting there until then (1 replay does already)." in out
    assert "Order: it has no key." in out


def test_what_no_handler_has_seen_cannot_have_happened(shop: Shop) -> None:
    bury(shop, add(shop), "billing", reason="undeserializable")
    assert "  Safe: no handler has run with it." in dlq(shop, "replay", "--group", "F3A9", "--dry-run").out


@pytest.mark.parametrize("verb", ["replay", "discard"])
def test_nothing_to_do_is_the_answer_no(shop: Shop, verb: str) -> None:
    why = ["--why", "test"] if verb == "discard" else []
    for more in ([], ["--dry-run"]):
        done = dlq(shop, verb, "--consumer", "nobody", *why, *more)
        assert (done.status, done.out) == (1, "")
        assert done.err == f"outbox dlq {verb}: no open dead letter matches\n"


def test_letters_that_stay_open_are_no_success(shop: Shop) -> None:
    letter = bury(shop, add(shop), headers="not JSON")
    would = dlq(shop, "replay", "--consumer", "", "--dry-run")
    assert "1 stays open: its headers cannot be read" in would.out
    done = dlq(shop, "replay", "--consumer", "")
    assert done.status == 1
    assert f"left open, its headers cannot be read: {letter}" in done.err


def test_an_error_names_the_verb_once(shop: Shop) -> None:
    refused(dlq(shop, "replay"), 2, "outbox dlq: replay: say which: an ID, or --group")


# ---------------------------------------------------------------- tables, exit status


@pytest.mark.parametrize("what", [["groups"], ["list"], ["replay", "--consumer", "x"]])
def test_tables_that_do_not_fit_are_said_as_by_every_verb(shop: Shop, what: list[str]) -> None:
    refused(dlq(shop, *what, "--prefix", "other_"), 2, "no outbox tables here (looked for other_message)")
    shop.execute("update outbox_checkpoint set value = '9' where name = 'schema_version'")
    refused(dlq(shop, *what), 2, "the tables outbox_* have version 9, made by a newer pyoutbox")


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        (["status"], "1 a message has waited longer than --fail-if-older"),
        (["trace"], "1 no trace of it"),
        (["migrate"], "0 done"),
        (["dlq", "groups"], "0 done, also where none is open"),
        (["dlq", "list"], "0 done, also where none matches"),
        (["dlq", "show"], "1 there is none of that id"),
        (["dlq", "replay"], "1 nothing open matches"),
        (["dlq", "discard"], "1 nothing open matches"),
    ],
)
def test_help_says_what_the_exit_status_means(verb: list[str], words: str) -> None:
    text = re.sub(r"\s+", " ", quick(*verb, "--help").out)
    assert f"exit status: {words}" in text or (text.count("exit status: 0 ") == 1 and words in text)
    assert "2 wrong usage or configuration" in text
    assert "3 the database" in text
