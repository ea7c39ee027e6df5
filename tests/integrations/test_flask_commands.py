"""`flask outbox …`: the command `outbox` with the app's own outbox and database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import Result

from outbox_flask.commands import group
from tests.integrations.test_flask import OrderPlaced, Shop, shop, url, visits

__all__ = ["shop", "url", "visits"]


def flask_outbox(shop: Shop, *arguments: str) -> Result:
    return shop.app.test_cli_runner().invoke(group, arguments)


def add(shop: Shop) -> str:
    with shop.app.app_context():
        message = shop.outbox.add(OrderPlaced(1))
        shop.db.session.commit()
    return str(message.id)


def test_status_is_that_of_the_apps_database(shop: Shop) -> None:
    add(shop)
    done = flask_outbox(shop, "status", "--json")
    assert (done.exit_code, json.loads(done.stdout)["pending"]) == (0, 1)


def test_the_apps_pool_is_still_in_use_afterwards(shop: Shop) -> None:
    with shop.app.app_context():
        pool = shop.db.engine.pool
        flask_outbox(shop, "status")
        assert shop.db.engine.pool is pool  # disposing of an engine replaces it


def test_a_message_is_sent_and_traced(shop: Shop, tmp_path: Path) -> None:
    id = add(shop)
    traced = flask_outbox(shop, "trace", id)
    assert traced.stdout.endswith("This message is committed and waits for the relay.\n")
    drained = flask_outbox(shop, "relay", "--drain", "--transport", f"local://{tmp_path}/broker.db")
    assert json.loads(drained.stdout) == {"sent": 1, "parked": 0, "dead": 0}
    assert flask_outbox(shop, "trace", id).exit_code == 1


def test_dead_letters_are_those_of_the_app(shop: Shop) -> None:
    assert flask_outbox(shop, "dlq", "groups").stdout == "No dead letters are open.\n"
    assert flask_outbox(shop, "dlq", "list", "--json").stdout == "[]\n"


def test_migrate_finds_the_tables_as_they_are(shop: Shop) -> None:
    assert flask_outbox(shop, "migrate").stdout == "outbox tables are at version 2, as they were\n"


def test_the_outbox_of_a_bind_is_chosen_by_its_key(visits: Shop) -> None:
    assert flask_outbox(visits, "--bind", "visits", "status").exit_code == 0
    done = flask_outbox(visits, "status")
    assert done.exit_code == 2
    assert "this app has no outbox on its default bind; it has those of --bind visits" in done.stderr


def test_an_app_without_an_outbox_is_told_what_is_missing(shop: Shop) -> None:
    del shop.app.extensions["outbox"]
    done = flask_outbox(shop, "status")
    assert done.exit_code == 2
    assert "this app has no outbox on its default bind: call outbox.init_app(app)" in done.stderr


@pytest.mark.parametrize("arguments", [["status", "--app", "x:y"], ["status", "--database", "sqlite://"]])
def test_what_the_app_says_cannot_be_said_otherwise(shop: Shop, arguments: Sequence[str]) -> None:
    done = flask_outbox(shop, *arguments)
    assert done.exit_code == 2
    assert "usage: flask outbox" in done.stderr
    assert "unrecognized arguments" in done.stderr


def test_errors_are_a_line_and_a_status(shop: Shop) -> None:
    with shop.app.app_context():
        shop.db.drop_all()
    done = flask_outbox(shop, "status")
    assert done.exit_code == 2
    assert done.stderr.startswith("flask outbox status: no outbox tables here")


def test_help_is_that_of_the_verb(shop: Shop) -> None:
    assert "usage: flask outbox status" in flask_outbox(shop, "status", "--help").stdout
    assert "dlq" in flask_outbox(shop, "--help").stdout


def test_flask_finds_the_commands_by_itself(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "from flask import Flask\nfrom flask_sqlalchemy import SQLAlchemy\nfrom outbox_flask import Outbox\n"
        "db = SQLAlchemy()\noutbox = Outbox(db)\n\n\ndef create_app():\n    app = Flask(__name__)\n"
        f"    app.config['SQLALCHEMY_DATABASE_URI'] = 'sqlite:///{tmp_path}/shop.db'\n"
        "    db.init_app(app)\n    outbox.init_app(app)\n    return app\n"
    )

    def flask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flask", "outbox", *arguments]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    assert flask("migrate").stdout == "outbox tables are at version 2 (ran 0001_tables, 0002_storage_and_closed)\n"
    done = flask("status")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Nothing waits to be sent.")
    assert flask("status", "--fail-if-older", "soon").returncode == 2


def test_where_there_is_no_flask_sqlalchemy_other_commands_of_flask_still_work() -> None:
    """Every `flask` command imports our group; only what needs Flask-SQLAlchemy may miss it."""
    script = (
        "import sys; sys.modules['flask_sqlalchemy'] = None\n"
        "import outbox, outbox_flask.commands\n"
        "assert 'outbox.cli' not in sys.modules\n"
        "try:\n    outbox_flask.Outbox\n"
        "except outbox.MissingExtra as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout == (
        "outbox_flask needs Flask-SQLAlchemy, which is not installed: pip install 'pyoutbox[flask]'\n"
    )
