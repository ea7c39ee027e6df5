"""``flask outbox …``: the command ``outbox`` with the app's own outbox and database. One implementation: `outbox.cli`.

Imported by every ``flask`` command, so it imports nothing of ours until one of these is used.
"""

from __future__ import annotations

import sys
from typing import Final

import click
from flask import current_app
from flask.cli import with_appcontext

VERBS: Final = {
    "status": "What waits, how old it is, who sends it, and why nothing is sent.",
    "relay": "Send what is committed to the broker; SIGTERM drains.",
    "consume": "Run a consumer's handlers; SIGTERM drains.",
    "trace": "One message, or all of a key, through every table.",
    "dlq": "Dead letters: groups, list, show, replay, discard.",
    "migrate": "Make or upgrade the outbox tables, where there is no Alembic.",
}


@click.group(help="Messages of this app: see them, send them, mend them.")
@click.option("--bind", "bind_key", metavar="KEY", help="The outbox in this bind of SQLALCHEMY_BINDS.")
def group(bind_key: str | None) -> None:
    """The verbs read the option from the context."""


def _command(verb: str, what: str) -> click.Command:
    # everything behind the verb, --help too, is for our own parser
    @click.command(
        verb,
        help=what,
        context_settings={"ignore_unknown_options": True, "help_option_names": []},
        add_help_option=False,
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @click.pass_context
    @with_appcontext
    def run(context: click.Context, arguments: tuple[str, ...]) -> None:
        assert context.parent is not None
        sys.exit(_run(verb, arguments, context.parent.params["bind_key"]))

    return run


def _run(verb: str, arguments: tuple[str, ...], bind_key: str | None) -> int:
    from outbox.cli import main
    from outbox.cli._common import GIVEN, Given

    outboxes = current_app.extensions.get("outbox", {})
    outbox = outboxes.get(bind_key)
    if outbox is None:
        known = ", ".join(f"--bind {key}" if key else "none" for key in outboxes)
        what = f"with --bind {bind_key}" if bind_key else "on its default bind"
        hint = f"; it has those of {known}" if known else ": call outbox.init_app(app) where the app is made"
        raise click.UsageError(f"this app has no outbox {what}{hint}")
    token = GIVEN.set(Given(outbox, outbox.engine))
    try:
        return main([verb, *arguments], prog="flask outbox")
    finally:
        GIVEN.reset(token)


for _verb, _what in VERBS.items():
    group.add_command(_command(_verb, _what))
