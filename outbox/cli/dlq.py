"""``outbox dlq``: dead letters seen, explained and replayed."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from outbox.cli._common import outbox_of, outbox_options, print_json, print_table
from outbox.dead_letters import DeadLetters
from outbox.dead_letters.letter import DeadLetter
from outbox.errors import ConfigurationError

CONFIRM_ABOVE = 100  # dead letters; a terminal is asked before more are replayed at once


def register(commands: Any) -> None:
    parser = commands.add_parser("dlq", help="dead letters: groups, list, show, replay, discard")
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)

    groups = verbs.add_parser("groups", help="open dead letters by cause, the largest group first")
    groups.add_argument("--consumer")
    groups.add_argument("--topic")
    groups.set_defaults(do=do_groups)

    listing = verbs.add_parser("list", help="dead letters, oldest first")
    _filters(listing)
    listing.add_argument("--state", choices=("open", "replayed", "discarded", "any"), default="open")
    listing.add_argument("--limit", type=int, default=50, metavar="ROWS")
    listing.set_defaults(do=do_list)

    show = verbs.add_parser("show", help="one dead letter: what happened, where, and the exception")
    show.add_argument("id", metavar="ID")
    show.add_argument("--payload", action="store_true", help="print the message's payload too")
    show.set_defaults(do=do_show)

    for name, what, run in (
        ("replay", "hand dead letters back: to their consumer, or to the relay", do_replay),
        ("discard", "close dead letters for good", do_discard),
    ):
        verb = verbs.add_parser(name, help=what)
        verb.add_argument("id", nargs="?", metavar="ID")
        _filters(verb)
        verb.add_argument("--why", required=name == "discard", help="goes into the audit")
        verb.add_argument("--who", help="goes into the audit (default: this user and host)")
        verb.add_argument("--dry-run", action="store_true", help="say how many, change nothing")
        verb.add_argument("--yes", action="store_true", help=f"do not ask before more than {CONFIRM_ABOVE}")
        if name == "replay":
            verb.add_argument("--limit", type=int, metavar="ROWS", help="at most so many, the oldest")
        verb.set_defaults(do=run)

    for verb in verbs.choices.values():
        outbox_options(verb)
        verb.add_argument("--json", action="store_true")


def _filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--group", metavar="F3A9…", help="fingerprint, as `dlq groups` shows it")
    parser.add_argument("--consumer", help="the consumer that gave up; '' is the relay")
    parser.add_argument("--topic")
    parser.add_argument("--type")
    parser.add_argument("--key")


def _letters(options: argparse.Namespace) -> DeadLetters:
    return DeadLetters(outbox_of(options), database=options.database)


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    names = ("group", "consumer", "topic", "type", "key")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def do_groups(options: argparse.Namespace) -> int:
    with _letters(options) as letters:
        groups = letters.groups(consumer=options.consumer, topic=options.topic)
    if options.json:
        print_json([dataclasses.asdict(group) for group in groups])
    elif not groups:
        print("No dead letters are open.")
    else:
        rows = [
            {
                "group": g.fingerprint,
                "count": g.count,
                "consumer": g.consumer or "(relay)",
                "type": g.type,
                "reason": g.reason,
                "exception": g.exception_type,
                "last": g.last_dead_at,
                "example": g.example,
            }
            for g in groups
        ]
        print_table(rows, tuple(rows[0]))
    return 0


def do_list(options: argparse.Namespace) -> int:
    with _letters(options) as letters:
        found = letters.find(**_asked(options), state=options.state, limit=options.limit)
    if options.json:
        print_json([_plain(letter, payload=False) for letter in found])
    elif not found:
        print("No dead letters match.")
    else:
        columns = ("id", "consumer", "topic", "key", "type", "reason", "exception_type", "attempts", "state", "dead_at")
        print_table([{c: getattr(letter, c) for c in columns} for letter in found], columns)
        if len(found) == options.limit:
            print(f"({options.limit} shown; --limit shows more)", file=sys.stderr)
    return 0


def do_show(options: argparse.Namespace) -> int:
    """Exit status 1 if there is none of that id."""
    with _letters(options) as letters:
        letter = letters.get(options.id)
    if letter is None:
        print(f"outbox dlq show: there is no dead letter {options.id}", file=sys.stderr)
        return 1
    found = _plain(letter, payload=options.payload)
    if options.json:
        print_json(found)
        return 0
    stack = found.pop("stack")
    for name, value in found.items():
        if value is not None:
            print(f"{name:<18} {value if value != '' else '(relay)'}")
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
    with _letters(options) as letters:
        count = _how_many(letters, options, "replay", options.limit)
        if count is None:
            return 1
        done = letters.replay(options.id, **_asked(options), limit=options.limit, who=options.who, why=options.why)
    if options.json:
        print_json({"replayed": done.count, "skipped": [str(id) for id in done.skipped]})
    else:
        print(f"{done.count} dead letters handed back.")
        for id in done.skipped:
            print(f"left open, its headers cannot be read: {id}", file=sys.stderr)
    return 0


def do_discard(options: argparse.Namespace) -> int:
    with _letters(options) as letters:
        if _how_many(letters, options, "discard", None) is None:
            return 1
        count = letters.discard(options.id, **_asked(options), who=options.who, why=options.why)
    if options.json:
        print_json({"discarded": count})
    else:
        print(f"{count} dead letters discarded.")
    return 0


def _how_many(letters: DeadLetters, options: argparse.Namespace, verb: str, limit: int | None) -> int | None:
    """How many it would be; None if nothing is to be done (a dry run, or the answer was no)."""
    asked = _asked(options)
    if options.id is None and not asked:
        raise ConfigurationError(f"dlq {verb}: say which: an ID, or --group, --consumer, --topic, --type or --key")
    if options.id is not None:
        letter = letters.get(options.id)
        if letter is None:
            raise ConfigurationError(f"dlq {verb}: there is no dead letter {options.id}")
        if letter.state != "open":
            raise ConfigurationError(f"dlq {verb}: dead letter {options.id} is {letter.state} already")
        count = 1
    else:
        count = letters.count(**asked)
        if not count and options.group and not any(g.fingerprint == options.group.upper() for g in letters.groups()):
            raise ConfigurationError(f"dlq {verb}: there is no open group {options.group}; see `outbox dlq groups`")
    count = count if limit is None else min(count, limit)
    if options.dry_run:
        if options.json:
            print_json({"would": count})
        else:
            print(f"Would {verb} {count} dead letters.")
        return None
    if count > CONFIRM_ABOVE and not options.yes and sys.stdin.isatty():
        answer = input(f"{verb.capitalize()} {count} dead letters? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            return None
    return count
