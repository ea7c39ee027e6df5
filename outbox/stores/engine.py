"""From whatever a user calls their database to a SQLAlchemy engine, for the relay, the consumer and the dead letters."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import sqlalchemy as sa

from outbox.dialects import MYSQL
from outbox.errors import ConfigurationError, MissingExtra, StoreUnavailable
from outbox.stores import pooler

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

Database: TypeAlias = "str | sa.URL | sa.Engine | AsyncEngine"

SUPPORTED: Final = ("postgresql", "sqlite", *MYSQL)
READ_COMMITTED: Final = "READ COMMITTED"
SQLITE_BUSY_SECONDS: Final = 10.0
ENCODED: Final = (
    "the characters / ? # @ : % of a user name or password are percent-encoded (urllib.parse.quote(password, safe=''))"
)

# dialect -> (the driver for sync use, the driver for async use)
_DRIVERS: Final = {
    "postgresql": ("psycopg", "psycopg"),
    "sqlite": ("pysqlite", "aiosqlite"),
    "mysql": ("pymysql", "asyncmy"),
    "mariadb": ("pymysql", "asyncmy"),
}
_EXTRAS: Final = {
    "psycopg": "postgresql",
    "pymysql": "mysql",
    "asyncmy": "mysql",
    "aiosqlite": "sqlite",
    "greenlet": "async",
}
_PACKAGES: Final = {"MySQLdb": "mysqlclient"}  # those with another name than their module


def from_environment(name: str) -> str | None:
    """The value of the environment variable ``name``, or the content of the file that ``{name}_FILE`` names (a mounted
    secret), without surrounding white space. None where neither is set or the value is empty.

    Raises `ConfigurationError` where both are set, or the file cannot be read; never prints the value.
    """
    value, file = os.environ.get(name, "").strip(), os.environ.get(f"{name}_FILE", "").strip()
    if value and file:
        raise ConfigurationError(f"{name} and {name}_FILE are both set: unset one of them")
    if not file:
        return value or None
    try:
        value = Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigurationError(f"{name}_FILE names {file!r}, which cannot be read: {reason}") from error
    if not value:
        raise ConfigurationError(f"{name}_FILE names {file!r}, which is empty")
    return value


def engine_for(
    database: Database | None, *, pool_size: int | None = None, create: bool = False
) -> sa.Engine | AsyncEngine:
    """The engine of a database, sync or async as its driver is.

    ``database``: an ``Engine`` or ``AsyncEngine`` is returned as it is (it stays the caller's: whoever got one made here,
    which is when ``is_engine(database)`` is false, disposes of it); a URL (text or ``sqlalchemy.URL``) becomes a new
    engine; None means ``OUTBOX_DATABASE`` or ``OUTBOX_DATABASE_FILE``. ``postgresql://`` means psycopg 3; ``mysql://`` and
    ``mariadb://``, which are one here, mean mysqlclient where it is installed, as they do for SQLAlchemy, else PyMySQL.
    ``pool_size`` (connections) is how many a new engine keeps.

    MySQL and MariaDB engines made here are READ COMMITTED and speak UTF-8.

    SQLite engines made here get WAL and wait up to 10 s for another writer; foreign keys stay as SQLite has them. Their
    file has to be there: to connect raises `StoreUnavailable` where it is not, since SQLite would make an empty database
    out of a typing error. ``create`` allows that.

    Raises `ConfigurationError` (no database, no URL, a password of ``***``, a database that is not supported)
    and `MissingExtra` (the driver is not installed). Connects to nothing, and never prints a password.
    """
    given = _given(database)
    if given is not None:
        _check_dialect(given.dialect.name)
        return given
    url = database_url(database)
    return _create_async(url, pool_size, create=create) if _is_async(url) else _create(url, pool_size, create=create)


def sync_engine_for(
    database: Database | None, *, pool_size: int | None = None, pre_ping: bool = True, create: bool = False
) -> sa.Engine:
    """As `engine_for`, always a sync engine: a URL with an async driver is read as that database's sync driver.
    ``pre_ping``: ask each connection whether it still lives before it is used, which is a round trip. Raises
    `ConfigurationError` for an ``AsyncEngine``, which has none."""
    given = _given(database)
    if given is not None:
        if not isinstance(given, sa.Engine):
            raise ConfigurationError(
                f"database is an AsyncEngine ({given.dialect.driver}); this is sync code: pass a URL or a sync Engine"
            )
        _check_dialect(given.dialect.name)
        return given
    url = database_url(database)
    return _create(_with_driver(url, 0) if _is_async(url) else url, pool_size, pre_ping, create)


def async_engine_for(
    database: Database | None, *, pool_size: int | None = None, pre_ping: bool = True, create: bool = False
) -> AsyncEngine:
    """As `engine_for`, always an async engine: a URL with a sync driver is read as that database's async driver.
    Raises `ConfigurationError` for a sync ``Engine``, which has none."""
    given = _given(database)
    if given is not None:
        if isinstance(given, sa.Engine):
            raise ConfigurationError(
                f"database is a sync Engine ({given.dialect.driver}); async code needs a URL or an AsyncEngine"
            )
        _check_dialect(given.dialect.name)
        return given
    url = database_url(database)
    return _create_async(url if _is_async(url) else _with_driver(url, 1), pool_size, pre_ping, create)


@contextmanager
def transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction of our own: READ COMMITTED whatever the engine says. Under a higher level leases and parking are refused
    now and then, and on MySQL whoever looks for a row that is not there keeps others from inserting it; in autocommit it
    would be no transaction. Raises `ConfigurationError` for an SQLite engine in autocommit mode: that has no other level."""
    with engine.connect() as connection:
        if _is_other_level(engine):
            # the connection, since an engine made with execution_options() keeps its level in engines made from it
            connection = connection.execution_options(isolation_level=READ_COMMITTED)
        with connection.begin():
            yield connection


@asynccontextmanager
async def async_transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """The same on an `AsyncEngine`."""
    async with engine.connect() as connection:
        if _is_other_level(engine.sync_engine):
            connection = await connection.execution_options(isolation_level=READ_COMMITTED)
        async with connection.begin():
            yield connection


def _is_other_level(engine: sa.Engine) -> bool:
    level = engine.get_execution_options().get("isolation_level")
    level = level or getattr(engine.dialect, "_on_connect_isolation_level", None)
    if engine.dialect.name != "sqlite":
        return level != READ_COMMITTED
    if level == "AUTOCOMMIT":
        raise ConfigurationError(
            "this SQLite engine is in autocommit mode, in which nothing is a transaction: pass a URL, or an engine without "
            "isolation_level='AUTOCOMMIT'"
        )
    return False


def is_engine(database: object) -> bool:
    """Whether this is an engine of the caller's, which only the caller disposes of."""
    return _given(database) is not None


def _given(database: object) -> sa.Engine | AsyncEngine | None:
    if isinstance(database, sa.Engine):
        return database
    # an AsyncEngine can exist only if its module is loaded: nothing is imported to ask
    module = sys.modules.get("sqlalchemy.ext.asyncio")
    if module is not None and isinstance(database, module.AsyncEngine):
        found: AsyncEngine = database
        return found
    return None


def database_url(database: Database | None) -> sa.URL:
    """The URL of a database, checked, with the sync driver of `engine_for` unless it names another. Raises as that does."""
    url = _checked_url(database)
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    elif url.drivername in MYSQL and find_spec("MySQLdb") is None:
        url = url.set(drivername=f"{url.drivername}+pymysql")
    return url


def names_its_driver(database: Database | None) -> bool:
    """Whether it is an engine, or a URL that says which driver."""
    return _given(database) is not None or "+" in _checked_url(database).drivername


def _checked_url(database: Database | None) -> sa.URL:
    if database is None:
        database = from_environment("OUTBOX_DATABASE")
        if database is None:
            raise ConfigurationError(
                "no database given: pass database=… (a URL or an engine) or --database, or set OUTBOX_DATABASE "
                "or OUTBOX_DATABASE_FILE"
            )
    if isinstance(database, str):
        try:
            url = sa.make_url(database)
        except (sa.exc.ArgumentError, ValueError):
            # from None: SQLAlchemy's own text quotes the URL, password and all
            raise ConfigurationError(
                "database is no URL that SQLAlchemy can read; it looks like postgresql://user:password@host:5432/name, "
                f"mysql://user:password@host:3306/name or sqlite:////path/to/file.db; {ENCODED}"
            ) from None
        if "@" in (url.host or "") or (url.password is not None and "@" in (url.database or "")):
            # what comes after the first @ would be taken for the host, and shown as such wherever the URL is
            raise ConfigurationError(
                f"database: the URL has one '@' too many, so where its password ends is not known; {ENCODED}"
            )
    elif isinstance(database, sa.URL):
        url = database
    else:
        raise ConfigurationError(
            f"database is a {type(database).__name__}; it must be a URL, an Engine or an AsyncEngine"
        )
    if url.password == "***":
        raise ConfigurationError(
            f"the password in {url!r} is ***: that is str(engine.url); "
            "use engine.url.render_as_string(hide_password=False), or pass the engine itself"
        )
    backend = url.get_backend_name()
    if backend == "postgres":  # what some hosting platforms still hand out; SQLAlchemy knows only the long name
        url, backend = url.set(drivername=url.drivername.replace("postgres", "postgresql", 1)), "postgresql"
    _check_dialect(backend)
    return url


def _check_dialect(name: str) -> None:
    if name not in SUPPORTED:
        raise ConfigurationError(f"database {name!r} is not supported here: PostgreSQL, MySQL, MariaDB and SQLite are")


def _is_async(url: sa.URL) -> bool:
    try:
        return bool(url.get_dialect().is_async)
    except sa.exc.NoSuchModuleError as error:
        raise ConfigurationError(f"database driver {url.drivername!r} is unknown to SQLAlchemy") from error
    except ImportError as error:
        raise _missing(url, error) from error


def _with_driver(url: sa.URL, which: int) -> sa.URL:
    """The same database through its usual sync (0) or async (1) driver."""
    backend = url.get_backend_name()
    return url.set(drivername=f"{backend}+{_DRIVERS[backend][which]}")


def _options(url: sa.URL, pool_size: int | None, pre_ping: bool) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if url.get_backend_name() == "sqlite":
        options["connect_args"] = {"timeout": SQLITE_BUSY_SECONDS}
        if url.database in (None, "", ":memory:"):
            return options  # such a database has a pool of its own kind, of one connection a thread
    else:
        if url.get_driver_name() == "asyncpg" and url.query.get("prepared_statement_cache_size") == "0":
            # asyncpg's own cache cannot be named in a URL; without either of them, statements have no names
            options["connect_args"] = {"statement_cache_size": 0}
        # a connection that died while it waited in the pool is found out before it is used
        options["pool_pre_ping"] = pre_ping
    if url.get_backend_name() in MYSQL:
        options["isolation_level"] = READ_COMMITTED  # for each connection, once
        if "charset" not in url.query and url.get_driver_name() != "mariadbconnector":
            options["connect_args"] = {"charset": "utf8mb4"}  # libmysqlclient's own choice may be latin1
    if pool_size is not None:
        options["pool_size"] = pool_size
    return options


def _create(url: sa.URL, pool_size: int | None, pre_ping: bool = True, create: bool = False) -> sa.Engine:
    try:
        engine = sa.create_engine(url, **_options(url, pool_size, pre_ping))
    except ImportError as error:
        raise _missing(url, error) from error
    _prepare(engine, create)
    return engine


def _create_async(url: sa.URL, pool_size: int | None, pre_ping: bool = True, create: bool = False) -> AsyncEngine:
    try:
        import_module("greenlet")  # SQLAlchemy 2.0 misses it at the first await only
        from sqlalchemy.ext.asyncio import create_async_engine

        engine = create_async_engine(url, **_options(url, pool_size, pre_ping))
    except (ImportError, ValueError) as error:
        # SQLAlchemy says a missing greenlet with a ValueError
        if isinstance(error, ValueError) and "greenlet" not in str(error):
            raise
        raise _missing(url, error) from error
    _prepare(engine.sync_engine, create)
    return engine


def _prepare(engine: sa.Engine, create: bool) -> None:
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _prepare_sqlite)
        if not create:
            # at each connect, so that a file that is there by then does, and one that is gone does not come back empty
            sa.event.listen(engine, "do_connect", _require_file)
    elif engine.dialect.name == "postgresql" and engine.dialect.driver == "psycopg":
        sa.event.listen(engine, "connect", pooler.prepare_nothing_behind_one)


def _require_file(dialect: object, record: object, arguments: list[Any], options: dict[str, Any]) -> None:
    file = str(arguments[0]) if arguments else ":memory:"
    if file != ":memory:" and not options.get("uri") and not os.path.exists(file):
        raise _no_such_file(file)


def require_file(database: Database | None) -> None:
    """Raises `StoreUnavailable` for an SQLite file that is not there, before anybody connects. Raises `ConfigurationError`
    for no database, or no URL."""
    given = _given(database)
    url = database_url(database) if given is None else given.url
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:") or "uri" in url.query:
        return
    if not os.path.exists(str(url.database)):
        raise _no_such_file(os.path.abspath(str(url.database)))


def _no_such_file(file: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"sqlite:///{file}: there is no such file. Correct the path in the database's URL; a new database is made by your "
        "application (create_all, Alembic) or by `outbox migrate`"
    )


def _prepare_sqlite(connection: Any, record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # a reader does not keep the one writer waiting
    cursor.close()


def _missing(url: sa.URL, error: Exception) -> MissingExtra:
    name = getattr(error, "name", None) or ("greenlet" if "greenlet" in str(error) else url.drivername.split("+")[-1])
    module = name.split(".")[0]
    extra = _EXTRAS.get(module)
    command = f"pip install 'pyoutbox[{extra}]'" if extra else f"pip install {_PACKAGES.get(module, module)}"
    return MissingExtra(f"database {url.get_backend_name()!r} needs {module}, which is not installed: {command}")
