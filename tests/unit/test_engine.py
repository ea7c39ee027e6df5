"""From whatever a user calls their database to an engine; what is refused says why, and shows no password."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox import ConfigurationError, MissingExtra, StoreUnavailable
from outbox.stores import engine as engines
from outbox.stores.engine import (
    async_engine_for,
    database_url,
    engine_for,
    from_environment,
    is_engine,
    sync_engine_for,
)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OUTBOX_DATABASE", "OUTBOX_DATABASE_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "driver"),
    [
        ("postgresql://app@db/app", "postgresql+psycopg"),
        ("postgres://app@db/app", "postgresql+psycopg"),
        ("postgresql+psycopg://app@db/app", "postgresql+psycopg"),
        ("postgresql+asyncpg://app@db/app", "postgresql+asyncpg"),
        ("sqlite:///shop.db", "sqlite"),
        (sa.URL.create("postgresql", "app", host="db", database="app"), "postgresql+psycopg"),
        ("mysql://app@db/app", "mysql+pymysql"),
        ("mariadb://app@db/app", "mariadb+pymysql"),
        ("mysql+aiomysql://app@db/app", "mysql+aiomysql"),
    ],
)
def test_the_driver_of_a_url(given: str | sa.URL, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda module: None)  # as if mysqlclient were not there
    assert database_url(given).drivername == driver


def test_mysqlclient_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda module: object())
    assert database_url("mysql://app@db/app").drivername == "mysql"  # which is SQLAlchemy's word for it
    assert database_url("mariadb+pymysql://app@db/app").drivername == "mariadb+pymysql"


def test_a_url_becomes_an_engine_of_its_drivers_kind() -> None:
    assert isinstance(engine_for("postgresql://app@db/app"), sa.Engine)
    assert isinstance(engine_for("sqlite:///shop.db"), sa.Engine)
    assert isinstance(engine_for("postgresql+asyncpg://app@db/app"), AsyncEngine)
    assert isinstance(engine_for("sqlite+aiosqlite:///shop.db"), AsyncEngine)
    assert isinstance(engine_for("mysql+pymysql://app@db/app"), sa.Engine)


def test_mysql_and_mariadb_have_a_driver_of_each_kind() -> None:
    for url in ("mysql://app@db/app", "mariadb://app@db/app"):
        assert engine_for(url).dialect.driver in ("pymysql", "mysqldb")
        assert sync_engine_for(url).dialect.driver in ("pymysql", "mysqldb")
        assert async_engine_for(url).dialect.driver == "asyncmy"


def test_sync_and_async_engines_of_one_url() -> None:
    for url in ("postgresql://app@db/app", "postgresql+asyncpg://app@db/app", "sqlite:///shop.db"):
        assert isinstance(sync_engine_for(url), sa.Engine)
        assert isinstance(async_engine_for(url), AsyncEngine)
    assert sync_engine_for("postgresql+asyncpg://app@db/app").dialect.driver == "psycopg"
    assert async_engine_for("postgresql+asyncpg://app@db/app").dialect.driver == "asyncpg"
    assert async_engine_for("postgresql://app@db/app").dialect.driver == "psycopg"


def test_an_engine_stays_what_it_is() -> None:
    sync, asynchronous = sa.create_engine("sqlite://"), create_async_engine("sqlite+aiosqlite://")
    assert engine_for(sync) is sync
    assert engine_for(asynchronous) is asynchronous
    assert [is_engine(one) for one in (sync, asynchronous, "sqlite://", None)] == [True, True, False, False]
    with pytest.raises(ConfigurationError, match="pass a URL or a sync Engine"):
        sync_engine_for(asynchronous)
    with pytest.raises(ConfigurationError, match="needs a URL or an AsyncEngine"):
        async_engine_for(sync)


def test_the_environment_and_a_file_are_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="set OUTBOX_DATABASE or OUTBOX_DATABASE_FILE"):
        engine_for(None)
    monkeypatch.setenv("OUTBOX_DATABASE", "sqlite:///one.db")
    assert engine_for(None).url.database == "one.db"
    secret = tmp_path / "database"
    secret.write_text("postgresql://app:s3cret@db/two\n")
    monkeypatch.setenv("OUTBOX_DATABASE_FILE", str(secret))
    with pytest.raises(ConfigurationError, match="both set"):
        engine_for(None)
    monkeypatch.delenv("OUTBOX_DATABASE")
    assert engine_for(None).url.database == "two"
    assert engine_for("sqlite:///given.db").url.database == "given.db"


def test_files_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for content, said in ((None, "cannot be read"), (b"", "is empty"), (b"\xff", "not UTF-8")):
        file = tmp_path / str(content)
        if content is not None:
            file.write_bytes(content)
        monkeypatch.setenv("OUTBOX_TRANSPORT_FILE", str(file))
        with pytest.raises(ConfigurationError, match=said):
            from_environment("OUTBOX_TRANSPORT")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("postgresql://app:***@db/app", r"str\(engine.url\); use engine.url.render_as_string\(hide_password=False\)"),
        ("oracle://app:s3cret@db/app", "'oracle' is not supported here: PostgreSQL, MySQL, MariaDB and SQLite are"),
        ("postgresql+nothing://app:s3cret@db/app", "unknown to SQLAlchemy"),
        ("not a url, s3cret", "no URL that SQLAlchemy can read"),
        ("postgresql://app:s3cret@db:port/app", "no URL that SQLAlchemy can read.* percent-encoded"),
        # a password with an @ that is not encoded: what follows it would be the host, and be shown
        ("postgresql://app:pa@s3cret@db/app", r"one '@' too many.*urllib\.parse\.quote"),
        ("mysql+pymysql://app:pa@ss/s3cret@db/app", "one '@' too many"),
        (7, "it must be a URL, an Engine or an AsyncEngine"),
        (sa.create_mock_engine("sqlite://", lambda *a, **k: None), "it must be a URL"),
    ],
)
def test_what_is_refused_shows_no_password(given: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        engine_for(given)
    shown = "".join(str(error) for error in (caught.value, caught.value.__cause__) if error is not None)
    assert "s3cret" not in shown


def test_the_printed_url_of_an_engine_is_refused() -> None:
    engine = sa.create_engine("postgresql+psycopg://app:s3cret@db/app")
    with pytest.raises(ConfigurationError, match=r"is \*\*\*"):
        engine_for(str(engine.url))
    assert engine_for(engine.url).url.password == "s3cret"


@pytest.mark.parametrize(
    ("module", "url", "said"),
    [
        ("psycopg", "postgresql://app:s3cret@db/app", "pip install 'pyoutbox[postgresql]'"),
        ("aiosqlite", "sqlite+aiosqlite:///x.db", "pip install 'pyoutbox[sqlite]'"),
        ("asyncpg", "postgresql+asyncpg://app:s3cret@db/app", "pip install asyncpg"),
        ("asyncmy", "mysql+asyncmy://app:s3cret@db/app", "pip install 'pyoutbox[mysql]'"),
        ("pymysql", "mysql+pymysql://app:s3cret@db/app", "pip install 'pyoutbox[mysql]'"),
        ("MySQLdb", "mysql+mysqldb://app:s3cret@db/app", "pip install mysqlclient"),
        ("greenlet", "sqlite+aiosqlite:///x.db", "pip install 'pyoutbox[async]'"),
    ],
)
def test_a_missing_driver_says_what_to_install(module: str, url: str, said: str) -> None:
    script = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from outbox.stores.engine import engine_for\n"
        "from outbox.errors import MissingExtra\n"
        f"try: engine_for({url!r})\n"
        "except MissingExtra as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert said in result.stdout, result.stderr
    assert "s3cret" not in result.stdout
    assert issubclass(MissingExtra, ConfigurationError)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_sqlite_has_wal_and_patience(tmp_path: Path, kind: str) -> None:
    url = f"sqlite:///{tmp_path / 'shop.db'}"

    def ask(connection: sa.Connection) -> tuple[str, int, int]:
        return (
            connection.exec_driver_sql("pragma journal_mode").scalar_one(),
            connection.exec_driver_sql("pragma busy_timeout").scalar_one(),
            connection.exec_driver_sql("pragma foreign_keys").scalar_one(),
        )

    if kind == "sync":
        engine = sync_engine_for(url, create=True)
        with engine.connect() as connection:
            found = ask(connection)
        engine.dispose()
    else:
        asynchronous = async_engine_for(url, create=True)
        async with asynchronous.connect() as connection_:
            found = await connection_.run_sync(ask)
        await asynchronous.dispose()
    assert found == ("wal", 10_000, 0)
    assert engines.SQLITE_BUSY_SECONDS == 10


@pytest.mark.parametrize("given", [str, sa.make_url], ids=["text", "URL"])
@pytest.mark.parametrize("make", [engine_for, sync_engine_for, async_engine_for])
async def test_a_misspelt_sqlite_file_is_not_made(make: Any, given: Any, tmp_path: Path) -> None:
    file = tmp_path / "shpo.db"
    engine = make(given(f"sqlite:///{file}"))
    said = f"sqlite:.*{file}: there is no such file.*outbox migrate"
    if isinstance(engine, sa.Engine):
        with pytest.raises(StoreUnavailable, match=said):
            engine.connect()
    else:
        with pytest.raises(StoreUnavailable, match=said):
            await engine.connect()
    assert not file.exists()

    file.touch()  # as if somebody had made it meanwhile
    if isinstance(engine, sa.Engine):
        engine.connect().close()
        engine.dispose()
    else:
        await (await engine.connect()).close()
        await engine.dispose()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:{}/new.db?mode=rwc&uri=true"])
def test_sqlite_in_memory_and_uris_of_its_own_say_themselves_what_is_made(url: str, tmp_path: Path) -> None:
    engine = sync_engine_for(url.format(tmp_path))
    engine.connect().close()
    engine.dispose()


def test_an_engine_of_the_users_makes_its_file(tmp_path: Path) -> None:
    engine = sync_engine_for(sa.create_engine(f"sqlite:///{tmp_path}/new.db"))
    engine.connect().close()
    engine.dispose()
    assert (tmp_path / "new.db").exists()
