"""Dead letters found by what is known of them, and grouped by cause."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import sqlalchemy as sa

from outbox import ConfigurationError, Outbox, SchemaMismatch, StoreUnavailable
from outbox._message import new_id
from outbox.dead_letters import DeadLetters
from outbox.dead_letters.record import Failure
from tests.dead_letters.conftest import ON_EACH
from tests.dead_letters.graveyard import Graveyard


@ON_EACH
def test_they_are_found_by_each_condition_oldest_first(graveyard: Graveyard) -> None:
    first = graveyard.bury()
    second = graveyard.bury(consumer="shipping", topic="parcels", type="parcel.sent", key="8")
    third = graveyard.bury(key=None, type=None)
    graveyard.bury_unsent(1)

    def found(**wanted: str) -> list[uuid.UUID]:
        return [letter.id for letter in graveyard.letters.find(**wanted)]  # type: ignore[arg-type]

    assert found()[:3] == [first, second, third]
    assert len(found()) == 4
    assert found(consumer="billing") == [first, third]
    assert found(topic="parcels") == found(type="parcel.sent") == found(key="8") == [second]
    assert found(consumer="billing", key="7") == [first]
    assert found(consumer="nobody") == []
    assert len(found(consumer="")) == 1
    group = graveyard.letters.find(consumer="shipping")[0].fingerprint
    assert found(group=group) == found(group=f" {group.lower()} ") == [second]
    assert [letter.id for letter in graveyard.letters.find(limit=2)] == [first, second]


def test_by_state(graveyard: Graveyard) -> None:
    ids = [graveyard.bury() for _ in range(3)]
    graveyard.letters.replay(ids[0])
    graveyard.letters.discard(ids[1], why="test")

    def states(state: str) -> list[uuid.UUID]:
        return [letter.id for letter in graveyard.letters.find(state=state)]  # type: ignore[arg-type]

    assert (states("replayed"), states("discarded"), states("open")) == ([ids[0]], [ids[1]], [ids[2]])
    assert states("any") == ids
    with pytest.raises(ConfigurationError, match="state 'closed'"):
        states("closed")


def test_one_by_its_id(graveyard: Graveyard) -> None:
    id = graveyard.bury()
    for same in (id, str(id)):
        letter = graveyard.letters.get(same)
        assert letter is not None
        assert letter.id == id
    assert graveyard.letters.get(uuid.uuid4()) is None
    with pytest.raises(ConfigurationError, match="its id is a UUID"):
        graveyard.letters.get("seven")


def test_groups_put_one_cause_together(graveyard: Graveyard) -> None:
    for number in range(5):
        graveyard.bury(Failure("retries-exhausted", "ValueError", f"order {number}"))
    for topic in ("orders", "returns"):
        graveyard.bury(Failure("retries-exhausted", "KeyError", "'total'", frame="shop:charge"), topic=topic)
    discarded = graveyard.bury(Failure("retries-exhausted", "ValueError", "another"))
    graveyard.letters.discard(discarded, why="test")

    first, second = graveyard.letters.groups()
    assert (first.count, first.exception_type, first.topics, first.consumer) == (
        5,
        "ValueError",
        ("orders",),
        "billing",
    )
    assert first.example == "order 0"
    assert (second.count, second.exception_type, second.topics) == (2, "KeyError", ("orders", "returns"))
    assert first.first_dead_at <= first.last_dead_at
    assert len(graveyard.letters.find(group=first.fingerprint)) == 5
    assert graveyard.letters.groups(consumer="shipping") == []
    assert [group.count for group in graveyard.letters.groups(topic="returns")] == [1]


def test_headers_that_cannot_be_read_do_not_hide_a_dead_letter(graveyard: Graveyard) -> None:
    graveyard.bury_unsent(1, headers="not JSON")
    (letter,) = graveyard.letters.find()
    assert letter.headers == {}


def test_a_database_that_cannot_be_asked_is_said_without_its_password(graveyard: Graveyard, tmp_path: Path) -> None:
    url = "postgresql://someone:secret@127.0.0.1:1/none"
    with DeadLetters(graveyard.outbox, database=url) as letters, pytest.raises(StoreUnavailable) as caught:
        letters.groups()
    assert "secret" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


def test_tables_that_are_not_there_are_no_empty_answer(tmp_path: Path) -> None:
    (tmp_path / "other.db").touch()
    with DeadLetters(Outbox(), database=f"sqlite:///{tmp_path}/other.db") as letters:
        for ask in (letters.groups, letters.find, letters.count, lambda: letters.replay(consumer="x")):
            with pytest.raises(SchemaMismatch, match="no outbox tables here"):
                ask()


def test_tables_of_a_newer_version_are_left_alone(graveyard: Graveyard) -> None:
    graveyard.bury()
    with graveyard.engine.begin() as connection:
        connection.execute(
            sa.text("update outbox_checkpoint set value = '9' where name = 'schema_version'"),
        )
    with pytest.raises(SchemaMismatch, match="made by a newer pyoutbox"):
        graveyard.letters.replay(consumer="billing")


def test_by_its_own_id_or_by_its_messages(graveyard: Graveyard) -> None:
    message = new_id()
    ids = [graveyard.bury(message_id=message, consumer=consumer) for consumer in ("billing", "mail")]
    graveyard.bury()
    named = graveyard.letters.named
    assert [letter.id for letter in named(message)] == [letter.id for letter in named(str(message))] == ids
    assert [letter.id for letter in named(ids[1])] == [ids[1]]
    assert named(uuid.uuid4()) == named("invoice-7") == []
    assert [letter.id for letter in graveyard.letters.find(message_id=message)] == ids


def test_groups_by_the_first_letters_of_their_name(graveyard: Graveyard) -> None:
    graveyard.bury()
    (group,) = graveyard.letters.groups()
    for prefix in ("", group.fingerprint[:2], group.fingerprint, f" {group.fingerprint[:3].lower()} "):
        assert graveyard.letters.fingerprints(prefix) == {group.fingerprint: 1}
    assert graveyard.letters.fingerprints("%") == {}
    assert graveyard.letters.fingerprints(group.fingerprint, state="discarded") == {}
