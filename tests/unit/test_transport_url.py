"""Opening transports by URL: what is understood, what is refused, and that no password is ever shown."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import outbox.transports
from outbox.errors import ConfigurationError, MissingExtra
from outbox.transports import open_transport, redacted
from outbox.transports._kafka_settings import PARAMETERS, settings
from outbox.transports._url import parse
from outbox.transports.kafka import KafkaTransport
from outbox.transports.local import LocalLog
from outbox.transports.memory import forget


def test_the_scheme_chooses(tmp_path: Path) -> None:
    assert open_transport("kafka://broker:9092").name == "kafka"
    assert open_transport("KAFKA://broker").name == "kafka"
    assert open_transport("amqp://broker").name == "rabbitmq"
    assert open_transport("amqps://broker/vhost").name == "rabbitmq"
    assert open_transport(f"local://{tmp_path}/log.db").name == "local"
    assert open_transport("memory:").name == "memory"


def test_a_transport_comes_back_as_it_is() -> None:
    transport = open_transport("memory:")
    assert open_transport(transport) is transport


def test_whatever_else_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not int"):
        open_transport(5)  # type: ignore[arg-type]


def test_an_unknown_scheme_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigurationError, match="pigeon: there is no such transport; known are amqp, amqps, kafka, local, memory, sqs"
    ):
        open_transport("pigeon://loft")


@pytest.mark.parametrize("url", ["", "broker:9092/x y", "no-scheme", "://host", "9p://x"])
def test_what_is_no_url_is_told_so(url: str) -> None:
    with pytest.raises(ConfigurationError):
        open_transport(url)


@pytest.mark.parametrize("url", ["kafka://broker", "local:x.db", "memory:"])
def test_an_unknown_parameter_lists_the_known_ones(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no URL parameter session_timout.*known are .*auto_create"):
        open_transport(f"{url}?session_timout=3")


def test_a_misspelt_parameter_is_put_right() -> None:
    with pytest.raises(ConfigurationError, match="did you mean session_timeout_ms"):
        open_transport("kafka://broker?session_timout_ms=3")


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("memory:?partitions=0", "partitions='0': must be a whole number from 1"),
        ("memory:?partitions=four", "partitions='four'"),
        ("memory:?session=-1", "session='-1': must be a number from 0.1"),
        ("memory:?session=nan", "session='nan'"),
        ("memory:?auto_create=maybe", "auto_create='maybe': must be true or false"),
        ("memory:?partitions=1&partitions=2", "partitions twice"),
        ("memory:?partitions", "name=value"),
        ("kafka://b?acks=1", "acks='1': must be one of all"),
        ("kafka://b?security_protocol=TLS", "must be one of PLAINTEXT, SSL"),
        ("kafka://b?compression_type=rar", "must be one of gzip"),
        ("kafka://b/topic", "a URL ends with its hosts"),
        ("kafka://", "names no broker"),
        ("local:", "names no file"),
        ("local://host/x.db", "three slashes"),
        ("local:///folder/", "names no file"),
        ("memory://user@x", "a name at the most"),
    ],
)
def test_a_value_that_cannot_be_is_named(url: str, what: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_transport(url)
    assert what in str(caught.value)


def test_kafka_takes_several_hosts_and_names_from_url_or_parameters() -> None:
    found = settings(parse("kafka://shop:p%40ss%2F@one,[::1]:9093,two:9094?security_protocol=sasl_plaintext"))
    assert found.servers == ("one:9092", "[::1]:9093", "two:9094")
    assert (found.username, found.password, found.sasl_mechanism) == ("shop", "p@ss/", "PLAIN")
    other = settings(
        parse(
            "kafka://one?security_protocol=SASL_SSL&sasl_mechanism=scram-sha-512&username=a&password=b%26c"
            "&delivery_timeout_ms=2500&client_id=shop"
        )
    )
    assert (other.username, other.password, other.sasl_mechanism) == ("a", "b&c", "SCRAM-SHA-512")
    assert (other.delivery_timeout, other.client_id) == (2.5, "shop")
    assert other.ssl_context is not None
    assert other.ssl_context.check_hostname
    assert "b&c" not in repr(other)


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("kafka://a:b@host", "add security_protocol=SASL_SSL"),
        ("kafka://host?security_protocol=SASL_SSL", "needs a user name and a password"),
        ("kafka://a:b@host?security_protocol=SASL_SSL&sasl_mechanism=OAUTHBEARER", "function that fetches tokens"),
        ("kafka://host?security_protocol=SSL&ssl_cafile=/nowhere.pem", "ssl_… files cannot be used"),
        ("kafka://host?security_protocol=SSL&ssl_keyfile=/nowhere.pem", "needs ssl_certfile"),
    ],
)
def test_kafka_settings_that_do_not_fit_together(url: str, what: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_transport(url)
    assert what in str(caught.value)


def test_every_kafka_parameter_is_read() -> None:
    source = Path(outbox.transports.__file__).with_name("_kafka_settings.py").read_text()
    body = source.partition("def settings")[2]
    assert [name for name in PARAMETERS if f'"{name}"' not in body] == []


async def test_kafka_with_tokens_is_made_in_code() -> None:
    async def token() -> str:
        return "secret"

    transport = KafkaTransport("kafka://host?security_protocol=SASL_SSL&sasl_mechanism=OAUTHBEARER", token=token)
    assert await transport._settings.token.token() == "secret"


def test_a_relative_path_is_relative_to_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = open_transport("local:data/log%20one.db")._log  # type: ignore[attr-defined]
    assert isinstance(log, LocalLog)
    assert log.path == tmp_path / "data" / "log one.db"


def test_memory_is_shared_by_name_until_it_is_forgotten() -> None:
    def log(url: str) -> object:
        return open_transport(url)._log  # type: ignore[attr-defined]

    assert log("memory://a") is log("memory://a?partitions=2")
    assert log("memory://a") is not log("memory://b")
    assert log("memory:") is log("memory://")
    before = log("memory://a")
    forget("a")
    assert log("memory://a") is not before


# ---- passwords

MASKED = [
    "kafka://user:***@host?security_protocol=SASL_SSL",
    "kafka://user:%2A%2A%2A@host?security_protocol=SASL_SSL",
    "kafka://host?security_protocol=SASL_SSL&username=u&password=***",
    "amqp://guest:***@broker",
]


@pytest.mark.parametrize("url", MASKED)
def test_a_url_that_was_printed_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"\*\*\*, which is what printing"):
        open_transport(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("kafka://host:9092,two:1?client_id=a%40b", "kafka://host:9092,two:1?client_id=a%40b"),
        ("kafka://user:secret@host:9092", "kafka://user:***@host:9092"),
        ("kafka://user@host", "kafka://user@host"),
        ("kafka://user:se:cret@host?x=1", "kafka://user:***@host?x=1"),
        ("kafka://user:secr/et@host", "kafka://user:***@host"),
        ("kafka://user:secr@et@host", "kafka://user:***@host"),
        ("kafka://user:secr?et@host", "kafka://***"),
        ("kafka://user:se@cr?et@host", "kafka://***"),
        ("kafka://user:12?et=1@host", "kafka://***"),
        (
            "kafka://h?password=secret&ssl_password=secret&client_id=x",
            "kafka://h?password=***&ssl_password=***&client_id=x",
        ),
        ("kafka://h?PassWord=secret", "kafka://h?PassWord=***"),
        ("kafka://h?p%61ssword=secret", "kafka://h?p%61ssword=***"),
        ("pigeon://h?api_token=secret", "pigeon://h?api_token=***"),
        ("local:/tmp/x.db?partitions=3", "local:/tmp/x.db?partitions=3"),
        ("postgresql://u:secret@h/db?sslpassword=secret", "postgresql://u:***@h/db?sslpassword=***"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "kafka://user:sec/ret@host?security_protocol=SASL_SSL",
        "kafka://user:sec?ret@host",
        "kafka://user:sec#ret@host",
        "kafka://user:sec@ret:x@host:y",
        "kafka://user:secret@host:port",
        "kafka://user:secret@host?unknown=1",
        "kafka://user:secret@host",
        "kafka://host?password=secret&password=secret",
        "kafka://host?security_protocol=SSL&password=secret",
        "kafka://host?secret",
        "pigeon://user:secret@loft",
        "memory://user:secret@x",
        "local://user:secret@x/y.db",
    ],
)
def test_no_error_holds_a_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_transport(url)
    for part in ("secret", "sec/ret", "sec?ret", "sec#ret", "sec@ret", "ret@"):
        assert part not in str(caught.value)


@given(password=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=4, max_size=12))
def test_no_password_survives_redaction_however_it_is_written(password: str) -> None:
    marked = f"Zq{password}qZ"
    for shown in (redacted(f"kafka://user:{marked}@host:9092"), redacted(f"kafka://user:{marked}@host/?client_id=x")):
        assert "Zq" not in shown
        assert "qZ" not in shown


# ---- packages that bring a transport, and drivers that are not there


def offer(monkeypatch: pytest.MonkeyPatch, *entries: EntryPoint) -> None:
    def offered(*, group: str) -> EntryPoints:
        assert group == "outbox.transports"
        return EntryPoints(entries)

    monkeypatch.setattr(outbox.transports, "entry_points", offered)


def test_a_package_can_bring_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, EntryPoint("pigeon", f"{__name__}:pigeon", "outbox.transports"))
    assert open_transport("pigeon://loft").name == "memory"
    with pytest.raises(ConfigurationError, match="known are amqp, amqps, kafka, local, memory, pigeon"):
        open_transport("owl://tower")


def pigeon(url: str) -> outbox.transports.Transport:
    assert url == "pigeon://loft"
    return open_transport("memory:")


def test_a_package_that_cannot_be_imported_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, EntryPoint("pigeon", "no_such_module:open", "outbox.transports"))
    with pytest.raises(MissingExtra, match="no_such_module"):
        open_transport("pigeon://loft")


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": "."}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_missing_driver_says_how_to_install_it() -> None:
    told = run(
        "import sys; sys.modules['aiokafka'] = None\n"
        "from outbox.transports import open_transport\n"
        "from outbox.errors import MissingExtra\n"
        "try: open_transport('kafka://host')\n"
        "except MissingExtra as error: print(error)\n"
    )
    assert "pip install 'pyoutbox[kafka]'" in told


def test_opening_by_url_imports_no_driver_that_is_not_asked_for() -> None:
    loaded = run(
        "import sys, outbox.transports as t; t.open_transport('memory:'); t.open_transport('local:x.db')\n"
        "print([m for m in ('aiokafka', 'sqlalchemy.ext.asyncio') if m in sys.modules])\n"
    )
    assert loaded.strip() == "[]"
