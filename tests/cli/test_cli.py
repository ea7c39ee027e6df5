"""What goes wrong at the command line: a line that names it, the right exit status, no traceback, no password."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from outbox._version import __version__
from tests.cli.command import PASSWORD, Done, outbox, refused
from tests.cli.conftest import Shop
from tests.services.process import free_port

WORDS = {
    "status": ["status"],
    "trace": ["trace", "--key", "1"],
    "dlq": ["dlq", "groups"],
    "migrate": ["migrate"],
    # without --drain the relay waits for a database that is away, for as long as it takes
    "relay": ["relay", "--drain", "--transport", "local:///nowhere/x.db"],
}
VERBS = tuple(WORDS)


def run(verb: str, *options: str, folder: Path | None = None, **environment: str) -> Done:
    """A verb with the arguments that it cannot do without."""
    return outbox(*WORDS[verb], *options, folder=folder, patient=verb != "relay", **environment)


# ---------------------------------------------------------------- usage


def test_the_version_is_that_of_the_package() -> None:
    assert outbox("--version") == Done(0, f"outbox {__version__}\n", "")


def test_a_verb_that_does_not_exist_gets_the_list_of_those_that_do() -> None:
    refused(outbox("statsu"), 2, "invalid choice: 'statsu'", "relay", "migrate")


def test_no_verb_at_all_is_wrong_usage() -> None:
    refused(outbox(), 2, "COMMAND")


def test_an_unknown_option_is_wrong_usage() -> None:
    refused(outbox("status", "--jsno"), 2, "outbox status: error: unrecognized arguments: --jsno")
    refused(outbox("dlq", "replay", "--al"), 2, "outbox dlq replay: error: unrecognized arguments: --al")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--lease", "soon", "no number above zero"),
        ("--lease", "-1", "no number above zero"),
        ("--poll", "nan", "no number above zero"),
        ("--batch", "0", "no whole number from 1 on"),
        ("--drain-timeout", "0", "no number above zero"),
    ],
)
def test_numbers_that_make_no_sense_are_wrong_usage(option: str, value: str, words: str) -> None:
    refused(run("relay", option, value), 2, option, words)


def test_a_lease_that_a_busy_moment_would_lose_is_refused(sqlite: Shop) -> None:
    refused(run("relay", "--lease", "0.1", "--database", sqlite.url), 2, "lease=0.1", "at least 0.5 seconds")


# ---------------------------------------------------------------- --app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text("from outbox import Outbox\noutbox = Outbox()\norders = []\n")
    (tmp_path / "broken.py").write_text("x = 1\nimport a_module_that_nobody_has\n")
    return tmp_path


@pytest.mark.parametrize(
    ("app", "words"),
    [
        ("shop", ["write module:name"]),
        ("shop:", ["write module:name"]),
        (":outbox", ["write module:name"]),
        ("./shop.py:outbox", ["write module:name"]),
        ("shpo:outbox", ["no module 'shpo'"]),
        ("shop.messaging:outbox", ["no module 'shop.messaging'"]),
        ("shop:otubox", ["shop has no 'otubox'"]),
        ("shop:orders", ["this is a list, not an Outbox"]),
        ("broken:outbox", ["importing broken failed", "a_module_that_nobody_has", "broken.py:2"]),
    ],
)
@pytest.mark.parametrize("verb", ["status", "relay"])
def test_an_app_that_cannot_be_had_is_named(folder: Path, verb: str, app: str, words: list[str]) -> None:
    refused(run(verb, "--app", app, "--database", "sqlite:///shop.db", folder=folder), 2, app, *words)


@pytest.mark.parametrize(
    ("consumer", "words"),
    [
        ("shop", "write module:name"),
        ("shpo:billing", "no module 'shpo'"),
        ("shop:billing", "shop has no 'billing'"),
        ("shop:outbox", "this is an Outbox, not a Consumer"),
    ],
)
def test_a_consumer_that_cannot_be_had_is_named(folder: Path, consumer: str, words: str) -> None:
    refused(outbox("consume", consumer, folder=folder), 2, consumer, words)


def test_an_app_and_a_schema_contradict_each_other(folder: Path) -> None:
    done = run("status", "--app", "shop:outbox", "--prefix", "x_", folder=folder)
    refused(done, 2, "--schema and --prefix say nothing beside --app")


def test_the_app_in_the_current_folder_is_found(folder: Path) -> None:
    done = run("migrate", "--app", "shop:outbox", "--database", "sqlite:///shop.db", folder=folder)
    assert (done.status, done.err) == (0, "")


# ---------------------------------------------------------------- the database


@pytest.mark.parametrize("verb", VERBS)
def test_without_a_database_every_way_to_give_one_is_named(verb: str) -> None:
    refused(run(verb), 2, "no database given", "--database", "OUTBOX_DATABASE", "OUTBOX_DATABASE_FILE")


@pytest.mark.parametrize("verb", VERBS)
def test_a_printed_url_with_asterisks_for_its_password_is_refused(verb: str) -> None:
    done = run(verb, "--database", "postgresql://app:***@127.0.0.1/shop")
    refused(done, 2, "password", "is ***", "render_as_string(hide_password=False)")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"postgresql//app:{PASSWORD}@127.0.0.1/shop", "no URL that SQLAlchemy can read"),
        (f"oracle://app:{PASSWORD}@127.0.0.1/shop", "database 'oracle' is not supported"),
        (f"postgresql+nonsense://app:{PASSWORD}@127.0.0.1/shop", "'postgresql+nonsense' is unknown"),
    ],
)
def test_a_database_that_cannot_be_is_wrong_configuration(url: str, words: str) -> None:
    refused(outbox("status", "--database", url), 2, words)
    refused(outbox("status", OUTBOX_DATABASE=url), 2, words)


def test_a_database_given_twice_by_the_environment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("sqlite:///shop.db")
    done = outbox("status", OUTBOX_DATABASE="sqlite:///shop.db", OUTBOX_DATABASE_FILE=str(tmp_path / "secret"))
    refused(done, 2, "OUTBOX_DATABASE and OUTBOX_DATABASE_FILE are both set")


def test_a_database_comes_from_a_mounted_secret(sqlite: Shop, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{sqlite.url}\n")
    assert outbox("status", OUTBOX_DATABASE_FILE=str(tmp_path / "secret")).status == 0


@pytest.mark.parametrize("query", ["", f"?password={PASSWORD}"], ids=["in the authority", "in the query"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_server_that_cannot_be_reached_is_named(verb: str, query: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    done = run(verb, "--database", f"postgresql://app:{PASSWORD}@{address}/shop{query}")
    refused(done, 3, address, "Connection refused")


@pytest.mark.parametrize("way", [["--transport", "memory://x"], ["--route", "*=memory://x"]])
def test_the_relay_does_not_empty_an_outbox_into_its_own_memory(sqlite: Shop, way: list[str]) -> None:
    refused(outbox("relay", "--drain", *way, "--database", sqlite.url), 2, "memory:", "local:broker.db")


@pytest.mark.parametrize(
    ("routes", "said"),
    [
        (["kafka://user:hunter2-and-more@broker"], "a route is PATTERN=URL, for example"),
        (["audit.*="], "a route is PATTERN=URL"),
        (["a=local:hunter2-and-more.db", "a=local:b.db"], "the route 'a' is given twice"),
        (["a=local:a.db", "*=carrier:hunter2-and-more"], "carrier: there is no such transport"),
    ],
)
def test_wrong_routes_are_told_without_their_secrets(sqlite: Shop, routes: list[str], said: str) -> None:
    options = [option for route in routes for option in ("--route", route)]
    refused(outbox("relay", "--drain", *options, "--database", sqlite.url), 2, said)


@pytest.mark.parametrize("by_environment", [True, False])
def test_routes_send_each_topic_to_its_own_log(sqlite: Shop, tmp_path: Path, by_environment: bool) -> None:
    for topic in ("audit.login", "orders", "audit.logout"):
        with sqlite.engine.begin() as connection:
            sqlite.outbox.add(connection, topic, {"n": 1}, key="1")
    logs, rest = tmp_path / "audit.db", tmp_path / "rest.db"
    routes = [f"audit.*=local:{logs}", f"*=local:{rest}"]
    environment = {"OUTBOX_ROUTES": "\n".join(routes)} if by_environment else {}
    options = [] if by_environment else [option for route in routes for option in ("--route", route)]
    done = outbox("relay", "--drain", *options, "--database", sqlite.url, **environment)
    assert done.json() == {"sent": 3, "parked": 0, "dead": 0}
    assert [topics_of(log) for log in (logs, rest)] == [["audit.login", "audit.logout"], ["orders"]]


def topics_of(log: Path) -> list[str]:
    with closing(sqlite3.connect(log)) as connection:
        return sorted(topic for (topic,) in connection.execute("select name from topic"))


def test_the_relay_waits_for_a_database_that_is_away_and_says_so_until_it_is_told_to_stop() -> None:
    address = f"127.0.0.1:{free_port()}"
    words = [
        "relay",
        "--transport",
        "local:///nowhere/x.db",
        "--database",
        f"postgresql://app:{PASSWORD}@{address}/shop",
    ]
    # what is said once a minute is said each time
    often = (
        "from outbox.cli import main; from outbox.relay import troubles; troubles.NEWS = 0.0; raise SystemExit(main())"
    )
    relay = subprocess.Popen([sys.executable, "-c", often, *words], stderr=subprocess.PIPE, text=True)
    assert relay.stderr is not None
    said = relay.stderr.readline() + relay.stderr.readline()
    relay.terminate()
    said += relay.communicate(timeout=30)[1]
    assert relay.returncode == 0
    assert said.count("waiting for the database") >= 2
    assert f"app:***@{address}/shop: connection failed" in said
    assert PASSWORD not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_password_is_said_without_saying_it(verb: str, refusing_server: str) -> None:
    done = run(verb, "--database", f"postgresql://app:{PASSWORD}@{refusing_server}/shop")
    refused(done, 3, refusing_server, 'password authentication failed for user "app"')


@pytest.fixture
def refusing_server() -> Iterator[str]:
    """Speaks as much of PostgreSQL's protocol as it takes to ask for a password and refuse it: the tests' own server
    trusts everybody. Gives its address."""

    def message(kind: bytes, body: bytes) -> bytes:
        return kind + (len(body) + 4).to_bytes(4, "big") + body

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            with client, client.makefile("rb") as incoming:
                while True:
                    length = int.from_bytes(incoming.read(4), "big")
                    code = int.from_bytes(incoming.read(4), "big")
                    incoming.read(length - 8)
                    if code == 196608:  # the start-up message; before it the client asks for encryption
                        break
                    client.sendall(b"N")
                client.sendall(message(b"R", (3).to_bytes(4, "big")))
                incoming.read(1)
                incoming.read(int.from_bytes(incoming.read(4), "big") - 4)
                fields = b'SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed for user "app"\0\0'
                client.sendall(message(b"E", fields))

    server = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve)
    thread.start()
    yield f"127.0.0.1:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


@pytest.mark.parametrize("verb", ["status", "trace", "dlq", "relay"])
def test_a_misspelt_sqlite_file_is_not_made(verb: str, tmp_path: Path) -> None:
    refused(run(verb, "--database", f"sqlite:///{tmp_path}/shpo.db"), 3, "no such file", f"{tmp_path}/shpo.db")
    assert not (tmp_path / "shpo.db").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    refused(run("migrate", "--database", f"sqlite:///{tmp_path}/no/shop.db"), 3, "unable to open database file")


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "shop.db").write_text("This is a text about a shop, and no database at all. " * 20)
    refused(run("status", "--database", f"sqlite:///{tmp_path}/shop.db"), 3, "file is not a database")


@pytest.mark.parametrize("verb", ["status", "migrate", "relay"])
def test_a_read_only_database_is_named(verb: str, sqlite: Shop) -> None:
    read_only = sqlite.url.replace("sqlite:///", "sqlite:///file:") + "?mode=ro&uri=true"
    refused(run(verb, "--database", read_only), 3, "readonly database", "not writable for this user")


def test_a_role_that_may_not_read_is_named(postgres: Shop) -> None:
    role = f"clerk_{sa.make_url(postgres.url).database}"
    postgres.execute(f"create role {role} login")
    try:
        url = sa.make_url(postgres.url).set(username=role).render_as_string()
        for verb in ("status", "trace", "dlq", "relay"):
            refused(
                run(verb, "--database", url),
                3,
                "permission denied for table outbox_checkpoint; `outbox migrate --grants`",
            )
        owner = "who migrates owns the tables"  # no grant of use is enough for it
        refused(run("migrate", "--prefix", "new_", "--database", url), 3, "permission denied for schema public", owner)
        postgres.execute(f"grant select on all tables in schema public to {role}")
        refused(run("migrate", "--to", "1", "--downgrade", "--database", url), 3, "must be owner of", owner)
    finally:
        postgres.execute(f"drop owned by {role}")
        postgres.execute(f"drop role {role}")


# ---------------------------------------------------------------- the tables


@pytest.mark.parametrize("verb", ["status", "trace", "dlq", "relay"])
def test_without_tables_the_command_that_makes_them_is_named(verb: str, shop: Shop) -> None:
    refused(
        run(verb, "--prefix", "other_", "--database", shop.url),
        2,
        "no outbox tables here (looked for other_message)",
        "found outbox_message: pass neither --schema nor --prefix, or Outbox()",
    )
    shop.execute("drop table outbox_message")
    shop.execute("drop table outbox_inbox")
    refused(run(verb, "--prefix", "other_", "--database", shop.url), 2, "no outbox tables here", "Run `outbox migrate`")


def test_tables_in_another_schema_are_found_and_named(postgres: Shop) -> None:
    postgres.execute("create schema app")
    assert run("migrate", "--schema", "app", "--prefix", "shop_", "--database", postgres.url).status == 0
    for name in [table.name for table in postgres.outbox.tables.all]:
        postgres.execute(f"drop table {name}")
    done = run("status", "--database", postgres.url)
    refused(done, 2, "found app.shop_message: pass --schema app --prefix shop_")
    assert run("status", "--schema", "app", "--prefix", "shop_", "--database", postgres.url).status == 0


@pytest.mark.parametrize("verb", ["status", "trace", "dlq", "migrate", "relay"])
def test_tables_of_a_newer_version_are_left_alone(verb: str, shop: Shop) -> None:
    shop.execute("update outbox_checkpoint set value = '9' where name = 'schema_version'")
    refused(run(verb, "--database", shop.url), 2, "have version 9, made by a newer pyoutbox", "pip install -U pyoutbox")


def test_a_missing_table_is_named(shop: Shop) -> None:
    shop.execute("drop table outbox_parked")
    refused(run("status", "--database", shop.url), 2, "outbox tables are incomplete: outbox_parked is missing")
    refused(run("migrate", "--database", shop.url), 2, "outbox_parked is not", "then try again")


@pytest.mark.parametrize(("option", "words"), [("--prefix", "must match"), ("--schema", "must be an SQL identifier")])
def test_names_that_are_no_identifiers_are_refused(option: str, words: str, sqlite: Shop) -> None:
    refused(run("status", option, "a b;", "--database", sqlite.url), 2, "'a b;'", words)


def test_a_schema_that_does_not_exist_is_named_by_migrate(postgres: Shop) -> None:
    refused(run("migrate", "--schema", "app", "--database", postgres.url), 2, "no schema 'app'", "CREATE SCHEMA app")


# ---------------------------------------------------------------- the broker


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("carrier-pigeon://loft", ["carrier-pigeon: there is no such transport", "amqp, amqps, kafka, local, memory"]),
        (f"sqs://key:{PASSWORD}@eu-central-1/queue", ["sqs: write sqs://region/?endpoint_url=…"]),
        ("amqp://guest@127.0.0.1", ["amqp: a user name and a password go together"]),
        (f"amqp://app:{PASSWORD}@127.0.0.1?heartbeat=0", ["heartbeat='0': must be a whole number from 1"]),
        ("broker:9092/topic", ["there is no such transport"]),
        (f"kafka://app:{PASSWORD}@127.0.0.1:9092?pasword={PASSWORD}", ["no URL parameter pasword"]),
        ("kafka://app:***@127.0.0.1:9092", ["password is ***"]),
        ("", ["no transport given", "--transport", "OUTBOX_TRANSPORT"]),
    ],
)
def test_a_transport_that_cannot_be_is_wrong_configuration(sqlite: Shop, url: str, words: list[str]) -> None:
    refused(outbox("relay", "--database", sqlite.url, "--transport", url), 2, *words)
    refused(outbox("relay", OUTBOX_DATABASE=sqlite.url, OUTBOX_TRANSPORT=url), 2, *words)


def test_a_wrong_transport_is_said_before_the_database_is_waited_for() -> None:
    nowhere = f"postgresql://app@127.0.0.1:{free_port()}/shop"
    refused(outbox("relay", "--database", nowhere, "--transport", "kafak://broker"), 2, "kafak")


def test_draining_into_a_broker_that_is_away_says_that_the_rest_is_still_there(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        shop.outbox.add(connection, "orders", {"n": 1})
    broker = f"kafka://127.0.0.1:{free_port()}"
    done = outbox("relay", "--drain", "--database", shop.url, "--transport", broker)
    refused(done, 3, "stopped draining, the rest is still in the outbox")
    assert outbox("status", "--json", "--database", shop.url).json()["pending"] == 1


# ---------------------------------------------------------------- output


def test_a_reader_that_has_seen_enough_is_no_error(sqlite: Shop) -> None:
    command = f"{sys.executable} -m outbox status --database {sqlite.url} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_that_cannot_show_a_character_is_no_error(sqlite: Shop) -> None:
    with sqlite.engine.begin() as connection:
        sqlite.outbox.add(connection, "orders", {"n": 1}, key="Größe")
    done = outbox("trace", "--key", "Größe", "--database", sqlite.url, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.status == 0
    assert "Gr\\xf6\\xdfe" in done.out


def test_both_names_of_the_command_are_the_same() -> None:
    script = Path(sys.executable).with_name("outbox")
    assert (
        subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60).stdout
        == outbox("--version").out
    )
    assert os.access(script, os.X_OK)
