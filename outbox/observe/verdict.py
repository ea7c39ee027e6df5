"""One sentence about where a message is, or all of a key: what `trace` found, read as an operator would."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outbox.observe.words import at, some, times, word

if TYPE_CHECKING:
    from outbox.observe.trace import Sighting

Rows = list[dict[str, Any]]

HANDLED_UNSEEN = "of what was sent and handled no row has the key, so there may be more: trace those by id"

NOWHERE = (
    "it was never committed here, or it was sent, which leaves no row, and no consumer with its inbox here handled it"
)


def of_message(found: Sequence[Sighting], subject: str, now: dt.datetime) -> str:
    """The first table that holds it decides; what was done with its dead letters, and what consumers did, is added."""
    where = _by_table(found)
    if not found:
        return f"{subject} is in none of these tables: {NOWHERE}."
    letters = where.get("dead_letter", [])
    said = [f"{subject} {_in_outbox(where)}"]
    relays = [letter for letter in letters if not letter["consumer"]]
    if relays and (last := relays[-1])["state"] != "open":
        said.append(_closed(last, where))
    names = {row["consumer"] for name in ("inbox", "attempt", "dead_letter") for row in where.get(name, [])} - {""}
    for name in sorted(names, key=lambda name: (_rank(where, name), name)):
        said.append(_in_consumer(where, name, now))
    return f"{'; '.join(said)}."


def _by_table(found: Sequence[Sighting]) -> dict[str, Rows]:
    where: dict[str, Rows] = {}
    for sighting in found:
        where.setdefault(sighting.table, []).append(sighting.row)
    for row in where.get("dead_letter", []):
        row.setdefault("cycle", 0)
    where.get("dead_letter", []).sort(key=lambda row: row["cycle"])
    return where


def _in_outbox(where: dict[str, Rows]) -> str:
    if "parked" in where:
        row = where["parked"][0]
        return _head(row) if row["role"] == "head" else "waits behind an earlier message of its key that failed"
    if "message" in where:
        return "is committed and waits for the relay"
    if "scheduled" in where:
        return f"is scheduled for {at(where['scheduled'][0]['deliver_at'])}"
    open_ = [row for row in where.get("dead_letter", []) if not row["consumer"] and row["state"] == "open"]
    if open_:
        return f"could not be sent and is a dead letter ({open_[0]['reason']})"
    if "sent" in where:
        row = where["sent"][0]
        return f"was sent to {row['topic']} at {at(row['sent_at'])}"
    return "has left this outbox"


def _head(row: dict[str, Any]) -> str:
    again = f"is tried again at {at(row['next_attempt_at'])}" if row["next_attempt_at"] else "is tried again now"
    if not row["attempts"]:
        return f"{again}, after an earlier message of its key"
    return f"failed {times(row['attempts'])} ({row['last_error']}) and {again}"


def _rank(where: dict[str, Rows], consumer: str) -> int:
    """First those that have handled it, then its dead letters, then those that try it again."""
    if any(row["consumer"] == consumer and row["outcome"] == "done" for row in where.get("inbox", [])):
        return 0
    return 1 if any(row["consumer"] == consumer for row in where.get("dead_letter", [])) else 2


def _in_consumer(where: dict[str, Rows], name: str, now: dt.datetime) -> str:
    inbox, attempts, letters = (
        [row for row in where.get(table, []) if row["consumer"] == name]
        for table in ("inbox", "attempt", "dead_letter")
    )
    last = letters[-1] if letters else None
    if inbox and inbox[0]["outcome"] == "done":
        if not inbox[0]["cycle"]:
            return f"{name} handled it at {at(inbox[0]['processed_at'])}"
        if last is None or last["closed_at"] is None:
            return f"{name} handled it after a replay"
        return f"{name} handled it at {at(inbox[0]['processed_at'])}, after {_who(last, where)}"
    if last is not None and last["state"] == "open":
        cause = ", ".join(text for text in (last["reason"], last["exception_type"]) if text)
        return f"it is an open dead letter of {name} since {at(last['dead_at'])} ({cause})"
    if attempts and attempts[0]["state"] != "replay":
        return _waiting(attempts[0], name, now)
    if last is None:
        return f"{name} gave it up, and its dead letter is not there any more" if inbox else f"{name} has it to replay"
    if attempts:
        if attempts[0]["attempts"]:
            return f"{_closed(last, where)}; since then {_waiting(attempts[0], name, now)}"
        return f"{_closed(last, where)}, and it waits for {name} to run"
    return _closed(last, where)


def _waiting(row: dict[str, Any], name: str, now: dt.datetime) -> str:
    text = f"{name} failed with it {times(row['attempts'])}" if row["attempts"] else f"{name} has it before it"
    due, error = row["next_attempt_at"], f" ({row['last_error']})" if row["last_error"] else ""
    if due is not None and due < now - dt.timedelta(seconds=60):
        return f"{text}, and the next attempt is due since {at(due)}: is it running?{error}"
    return f"{text} and tries it again {f'at {at(due)}' if due is not None else 'now'}{error}"


def _closed(letter: dict[str, Any], where: dict[str, Rows]) -> str:
    return _who(letter, where, f" for {letter['consumer']}" if letter["consumer"] else "")


def _who(letter: dict[str, Any], where: dict[str, Rows], for_whom: str = "") -> str:
    line = next((row for row in where.get("audit", []) if row["dead_letter"] == letter["id"]), None)
    who = line["who"] if line else "somebody (no line of the audit fits)"
    why = f" ({line['why']})" if line and line["why"] else ""
    return f"{who} {letter['state']} it{for_whom} at {at(letter['closed_at'])}{why}"


# ---------------------------------------------------------------- a key


def of_key(found: Sequence[Sighting], key: str, now: dt.datetime, cut: Sequence[str]) -> str:
    """How many of its messages are where."""
    where = _by_table(found)
    if not found:
        nothing = "nothing of it waits, and none of it is a dead letter"
        return f"Key {key!r} is in none of these tables: {nothing}; {HANDLED_UNSEEN}."
    said = []
    parked = where.get("parked", [])
    behind = sum(row["role"] != "head" for row in parked)
    for row in parked:
        if row["role"] == "head":
            said.append(f"a message {_head(row)}")
    if behind:
        said.append(f"{some(behind, 'message')} {word(behind, 'waits', 'wait')} behind it")
    if waiting := len(where.get("message", [])):
        more = " or more" if any(name.endswith("message") for name in cut) else ""
        are = word(waiting, "is committed and waits", "are committed and wait")
        said.append(f"{waiting}{more} {word(waiting, 'message', 'messages')} {are} for the relay")
    if scheduled := where.get("scheduled"):
        first, number = at(min(row["deliver_at"] for row in scheduled)), len(scheduled)
        said.append(f"{some(number, 'message')} {word(number, 'is scheduled', 'are scheduled, the first')} for {first}")
    unsent = sum(not row["consumer"] and row["state"] == "open" for row in where.get("dead_letter", []))
    if unsent:
        dead = word(unsent, "is a dead letter", "are dead letters")
        said.append(f"{some(unsent, 'message')} could not be sent and {dead}")
    names = {row["consumer"] for name in ("inbox", "attempt", "dead_letter") for row in where.get(name, [])} - {""}
    for name in sorted(names):
        said += _key_in_consumer(where, name, now)
    return f"Key {key!r}: {'; '.join([*said, HANDLED_UNSEEN])}."


def _key_in_consumer(where: dict[str, Rows], name: str, now: dt.datetime) -> list[str]:
    inbox, attempts, letters = (
        [row for row in where.get(table, []) if row["consumer"] == name]
        for table in ("inbox", "attempt", "dead_letter")
    )
    said = []
    if waiting := [row for row in attempts if row["state"] != "replay"]:
        due = [row["next_attempt_at"] for row in waiting if row["next_attempt_at"] is not None]
        late = due and min(due) < now - dt.timedelta(seconds=60)
        when = "now" if not due else f"due since {at(min(due))}: is it running?" if late else f"at {at(min(due))}"
        said.append(f"{name} tries {some(len(waiting), 'message')} again{',' if late else ''} {when}")
    if replays := len(attempts) - len(waiting):
        said.append(f"{some(replays, 'replay')} {word(replays, 'waits', 'wait')} for {name}")
    for state in ("open", "discarded"):
        if number := sum(row["state"] == state for row in letters):
            said.append(f"{some(number, f'{state} dead letter')} of {name}")
    if done := sum(row["outcome"] == "done" for row in inbox):
        said.append(f"{name} handled {some(done, 'message')}")
    return said
