"""``outbox dlq``: dead letters seen, explained and replayed."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from typing import Any, Final

from outbox.cli._common import count, exit_status, outbox_of, outbox_options, print_json, print_table
from outbox.dead_letters import DeadLetter, DeadLetters, Plan
from outbox.errors import ConfigurationError
from outbox.observe.words import some

CONFIRM_ABOVE: Final = 100  # dead letters; a terminal is asked before more are replayed at once

RELAY: Final = "(relay)"
"""What is shown, and taken, where the relay has given up and no consumer."""

RELAY_NOTE: Final = (
    f"{RELAY}: no consumer has seen these; the relay could not send them. Select them with --consumer '{RELAY}'."
)


class Nothing(Exception):
    """There is nothing of that name, or nothing to do: exit status 1."""


def register(commands: Any) -> None:
    parser = commands.add_parser("dlq", help="dead letters: groups, list, show, replay, discard")
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)

    groups = verbs.add_parser("groups", help="open dead letters by cause, the largest group first")
    groups.add_argument("--consumer", help=f"the consumer that gave up; '{RELAY}' or '' is the relay")
    groups.add_argument("--topic")
    exit_status(groups, {0: "done, also where none is open"})
    groups.set_defaults(do=do_groups)

    listing = verbs.add_parser("list", help="dead letters, oldest first")
    _filters(listing)
    listing.add_argument("--state", choices=("open", "replayed", "discarded", "any"), default="open")
    listing.add_argument("--limit", type=count, default=50, metavar="ROWS")
    exit_status(listing, {0: "done, also where none matches"})
    listing.set_defaults(do=do_list)

    show = verbs.add_parser("show", help="one dead letter: what happened, where, and the exception")
    show.add_argument("id", metavar="ID", help="the dead letter's, or the message's (which logs print)")
    exit_status(show, {0: "done", 1: "there is none of that id"})
    show.add_argument("--payload", action="store_true", help="print the message's payload too")
    show.set_defaults(do=do_show)

    for name, what, run in (
        ("replay", "hand dead letters back: to their consumer, or to the relay", do_replay),
        ("discard", "close dead letters for good", do_discard),
    ):
        verb = verbs.add_parser(name, help=what)
        verb.add_argument("id", nargs="?", metavar="ID", help="the dead letter's, or the message's (which logs print)")
        _filters(verb)
        verb.add_argument("--why", required=name == "discard", help="goes into the audit")
        verb.add_argument("--who", help="goes into the audit (default: this user and host)")
        verb.add_argument("--dry-run", action="store_true", help="say what it would do, change nothing")
        verb.add_argument("--yes", action="store_true", help=f"do not ask before more than {CONFIRM_ABOVE}")
        if name == "replay":
            verb.add_argument("--limit", type=count, metavar="ROWS", help="at most so many, the oldest")
        no = "nothing open matches, or you said no"
        exit_status(
            verb,
            {
                0: "done; with --dry-run: there is something to do",
                1: f"{no}, or some stay open since their headers cannot be read" if name == "replay" else no,
            },
        )
        verb.set_defaults(do=run)

    for verb in verbs.choices.values():
        outbox_options(verb)
        verb.add_argument("--json", action="store_true")


def _filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--group", metavar="F3A9…", help="as `dlq groups` shows it; its first letters are enough")
    parser.add_argument("--consumer", help=f"the consumer that gave up; '{RELAY}' or '' is the relay")
    parser.add_argument("--topic")
    parser.add_argument("--type")
    parser.add_argument("--key")


def _letters(options: argparse.Namespace) -> DeadLetters:
    return DeadLetters(outbox_of(options), database=options.database)


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    names = ("group", "consumer", "topic", "type", "key")
    asked = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    if asked.get("consumer") == RELAY:
        asked["consumer"] = ""
    return asked


def _whole_group(letters: DeadLetters, asked: dict[str, Any], state: str) -> None:
    """Where a group is asked for by its first letters: the one that begins like this."""
    if "group" not in asked:
        return
    given = asked["group"]
    found = letters.fingerprints(given, state=state) if given.strip() else {}  # type: ignore[arg-type]
    if given.strip().upper() in found:
        found = {given.strip().upper(): 1}
    if not found:
        which = "dead letter" if state == "any" else f"{state} dead letter"
        raise Nothing(f"no {which} is of group {given!r}; `outbox dlq groups` lists them")
    if len(found) > 1:
        which = ", ".join(f"{name} ({some(number, 'dead letter')})" for name, number in found.items())
        raise ConfigurationError(f"group {given!r}: several begin like this: {which}. Write more of the one you mean")
    asked["group"] = next(iter(found))


def _named(letters: DeadLetters, id: str, asked: dict[str, Any], *, closed: bool) -> DeadLetter:
    """The dead letter of that id, or of the message of that id, that meets what else is asked. ``closed``: also one that is
    not open."""
    wanted = {"fingerprint" if name == "group" else name: value for name, value in asked.items()}
    found = [
        letter for letter in letters.named(id) if all(getattr(letter, name) == value for name, value in wanted.items())
    ]
    if not found:
        rest = " that fits the rest" if asked else ""
        raise Nothing(
            f"there is no dead letter {id}, and none of a message of that id{rest}: see `outbox dlq list --state any` and "
            f"`outbox trace {id}`"
        )
    fits = found if closed else [letter for letter in found if letter.state == "open"]
    if not fits:
        states = ", ".join(f"dead letter {letter.id} is {letter.state} already" for letter in found)
        raise Nothing(states)
    if len(fits) > 1:
        lines = "".join(
            f"\n  {letter.id}  {letter.consumer or RELAY}  {letter.state}  cycle {letter.cycle}  "
            f"{letter.exception_type or letter.reason}  {letter.dead_at:%Y-%m-%d %H:%M:%S}"
            for letter in fits
        )
        raise ConfigurationError(
            f"message {fits[0].message_id} has {len(fits)} dead letters; say which one by its own id:{lines}"
        )
    return fits[0]


def _nothing(options: argparse.Namespace, why: Nothing) -> int:
    print(f"outbox dlq {options.what}: {why}", file=sys.stderr)
    return 1


def do_groups(options: argparse.Namespace) -> int:
    with _letters(options) as letters:
        asked = _asked(options)
        groups = letters.groups(consumer=asked.get("consumer"), topic=asked.get("topic"))
    if options.json:
        print_json([dataclasses.asdict(group) for group in groups])
    elif not groups:
        print("No dead letters are open.")
    else:
        rows = [
            {
                "group": g.fingerprint,
                "count": g.count,
                "consumer": g.consumer or RELAY,
                "type": g.type,
                "reason": g.reason,
                "exception": g.exception_type,
                "last": g.last_dead_at,
                "example": g.example,
            }
            for g in groups
        ]
        print_table(rows, tuple(rows[0]))
        _explain_relay(not g.consumer for g in groups)
    return 0


def _explain_relay(there: Iterable[bool]) -> None:
    if any(there):
        print(f"\n{RELAY_NOTE}")


def do_list(options: argparse.Namespace) -> int:
    asked = _asked(options)
    try:
        with _letters(options) as letters:
            _whole_group(letters, asked, options.state)
            found = letters.find(**asked, state=options.state, limit=options.limit)
    except Nothing:
        found = []
    if options.json:
        print_json([_plain(letter, payload=False) for letter in found])
    elif not found:
        print("No dead letters match.")
    else:
        columns = ("id", "consumer", "topic", "key", "type", "reason", "exception_type", "attempts", "state", "dead_at")
        shown = [{c: getattr(letter, c) for c in columns} | {"consumer": letter.consumer or RELAY} for letter in found]
        print_table(shown, columns)
        _explain_relay(not letter.consumer for letter in found)
        if len(found) == options.limit:
            print(f"({options.limit} shown; --limit shows more)", file=sys.stderr)
    return 0


def do_show(options: argparse.Namespace) -> int:
    """Exit status 1 if there is none of that id."""
    try:
        with _letters(options) as letters:
            letter = _named(letters, options.id, {}, closed=True)
    except Nothing as why:
        return _nothing(options, why)
    found = _plain(letter, payload=options.payload)
    if options.json:
        print_json(found)
        return 0
    stack = found.pop("stack")
    for name, value in found.items():
        if value is not None:
            print(f"{name:<18} {value if (name, value) != ('consumer', '') else RELAY}")
    if stack:
        print(f"\n{stack.rstrip()}")
    return 0


def _plain(letter: DeadLetter, *, payload: bool) -> dict[str, Any]:
    found = {f.name: getattr(letter, f.name) for f in dataclasses.fields(letter)}
    body = found.pop("payload")
    found.pop("raw_key")
    found["payload_bytes"] = None if body is None else len(body)
    if payload:
        found["payload"] = None if body is None else body.decode(errors="backslashreplace")
    return found


def do_replay(options: argparse.Namespace) -> int:
    try:
        with _letters(options) as letters:
            which = _which(letters, options)
            plan = letters.plan(**which, limit=options.limit)
            if options.dry_run:
                return _would(options, plan.count, plan)
            if not _confirmed(options, plan.count):
                return 1
            done = letters.replay(**which, limit=options.limit, who=options.who, why=options.why)
    except Nothing as why:
        return _nothing(options, why)
    if options.json:
        print_json({"replayed": done.count, "skipped": [str(id) for id in done.skipped], **plan.as_dict()})
    else:
        print(f"Handed back {some(done.count, 'dead letter')}.")
        print(*plan.notes(), sep="\n")
        for id in done.skipped:
            print(f"left open, its headers cannot be read: {id}", file=sys.stderr)
    return 1 if done.skipped or not done.count else 0


def do_discard(options: argparse.Namespace) -> int:
    try:
        with _letters(options) as letters:
            which = _which(letters, options)
            number = 1 if "id" in which else letters.count(**which)
            if options.dry_run:
                return _would(options, number, None)
            if not _confirmed(options, number):
                return 1
            number = letters.discard(**which, who=options.who, why=options.why)
    except Nothing as why:
        return _nothing(options, why)
    if options.json:
        print_json({"discarded": number})
    else:
        print(f"Discarded {some(number, 'dead letter')}.")
    return 0 if number else 1


def _which(letters: DeadLetters, options: argparse.Namespace) -> dict[str, Any]:
    """What is asked for, as `DeadLetters.replay` takes it. Raises `Nothing` where that is nothing."""
    asked = _asked(options)
    if options.id is not None:
        _whole_group(letters, asked, "open")
        return {"id": _named(letters, options.id, asked, closed=False).id}
    if not asked:
        raise ConfigurationError(f"{options.what}: say which: an ID, or --group, --consumer, --topic, --type or --key")
    _whole_group(letters, asked, "open")
    if not letters.count(**asked):
        raise Nothing("no open dead letter matches")
    return asked


def _would(options: argparse.Namespace, number: int, plan: Plan | None) -> int:
    if options.json:
        print_json({"would": number, **(plan.as_dict() if plan else {})})
    else:
        print(f"Would {options.what} {some(number, 'dead letter')}.")
        if plan:
            print(*plan.notes(), sep="\n")
    return 0 if number else 1


def _confirmed(options: argparse.Namespace, number: int) -> bool:
    if number <= CONFIRM_ABOVE or options.yes or not sys.stdin.isatty():
        return True
    answer = input(f"{options.what.capitalize()} {some(number, 'dead letter')}? [y/N] ")
    return answer.strip().lower() in ("y", "yes")
