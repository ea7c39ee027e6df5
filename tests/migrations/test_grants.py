"""The grants of `outbox migrate --grants` under real roles: they are enough, and each of them is needed."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from outbox import ConfigurationError, Outbox, OutboxError
from outbox.dialects import MYSQL
from outbox.observe import explain
from outbox.observe.status import status
from outbox.relay import _relay
from outbox_migrations import grants, migrate
from outbox_migrations._grants import USES, statement
from tests.cli.command import quick
from tests.migrations.uses import Uses

SOME = 1  # privileges of a use that are taken away by default; OUTBOX_TEST_ALL_GRANTS=1: each
READERS = ("message", "scheduled", "parked", "dead_letter", "inbox", "attempt", "checkpoint", "lease")


class Roles:
    """A role for each use, with a login, in one database that a superuser owns."""

    def __init__(self, owner: sa.Engine, schema: str | None) -> None:
        self.owner = owner
        self.uses = Uses(Outbox(schema=schema), owner)
        self.names = {use: f"role_{use}_{uuid.uuid4().hex[:8]}" for use in USES}
        self.mysql = owner.dialect.name in MYSQL
        with owner.begin() as connection:
            if schema is not None:
                connection.execute(sa.schema.CreateSchema(schema))
            for name in self.names.values():
                connection.execute(sa.text(f"create user {name}" if self.mysql else f"create role {name} login"))
        migrate(owner, schema=schema)
        self.run(grants(owner.dialect.name, self.names, schema=schema))

    def run(self, script: str) -> None:
        with self.owner.begin() as connection:
            for line in script.splitlines():
                if not line.startswith("--") and line:
                    connection.execute(sa.text(line.rstrip(";")))

    @contextmanager
    def engine(self, use: str) -> Iterator[sa.Engine]:
        engine = sa.create_engine(self.owner.url.set(username=self.names[use]))
        try:
            yield engine
        finally:
            engine.dispose()

    def close(self) -> None:
        with self.owner.begin() as connection:
            for name in self.names.values():
                drop = f"drop user {name}" if self.mysql else f"drop owned by {name}; drop role {name}"
                connection.execute(sa.text(drop))


class Denied:
    """Whether a statement of this engine was refused for want of a privilege; the relay's raw ones show in its error."""

    def __init__(self, engine: sa.Engine) -> None:
        self.seen = False
        sa.event.listen(engine, "handle_error", lambda context: self.look(context.original_exception))

    def look(self, error: BaseException | None) -> None:
        while error is not None:
            self.seen |= getattr(error, "sqlstate", None) == "42501"
            error = error.__cause__


@pytest.fixture(params=[None, "app"], ids=["default schema", "app"])
def roles(postgres: sa.Engine, request: pytest.FixtureRequest) -> Iterator[Roles]:
    found = Roles(postgres, request.param)
    yield found
    found.close()


def test_each_use_works_under_a_user_of_mysql_that_has_nothing_else(maria: sa.Engine) -> None:
    roles = Roles(maria, None)
    try:
        test_each_use_works_under_a_role_that_has_nothing_else(roles)
    finally:
        roles.close()


def test_each_use_works_under_a_role_that_has_nothing_else(roles: Roles) -> None:
    for use, run in roles.uses.all().items():
        roles.uses.empty()
        with roles.engine(use) as engine:
            run(engine)


@pytest.mark.parametrize("roles", [None], ids=["default schema"], indirect=True)
def test_each_privilege_is_needed(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_relay, "PATIENCE", 0.3)
    roles.uses.within = 5.0
    dialect = roles.owner.dialect
    everything = os.environ.get("OUTBOX_TEST_ALL_GRANTS")
    needless = []
    for use, run in roles.uses.all().items():
        privileges = list(USES[use])
        for privilege in privileges if everything else random.Random().sample(privileges, SOME):
            words = [
                statement(verb, privilege, roles.uses.outbox.tables, roles.names[use], dialect)
                for verb in ("REVOKE", "GRANT")
            ]
            roles.uses.empty()
            roles.run(words[0])
            with roles.engine(use) as engine:
                denied = Denied(engine)
                with suppress(OutboxError, sa.exc.DBAPIError, AssertionError):
                    try:
                        run(engine)
                    except BaseException as error:
                        denied.look(error)
                        raise
            if not denied.seen:
                needless.append((use, privilege))
            roles.run(words[1])
    assert needless == []


def test_an_application_that_adds_can_neither_read_nor_delete_nor_forge_an_order(roles: Roles) -> None:
    tables = roles.uses.outbox.tables
    with roles.engine("add") as engine:
        roles.uses.add(engine)
        for name in READERS:
            table = getattr(tables, name)
            for refused in (sa.select(sa.func.count()).select_from(table), sa.delete(table)):
                with engine.connect() as connection, pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
                    connection.execute(refused)
        row = {"id": uuid.uuid4(), "bucket": 0, "topic": "t"}
        for forged in ({"position": 1}, {"created_at": sa.func.now()}):
            with engine.connect() as connection, pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
                connection.execute(sa.insert(tables.message).values({**row, **forged}))


def test_status_names_an_old_transaction_or_says_that_it_cannot_see_those_of_others(
    roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "OLD", 0.0)
    tables = roles.uses.outbox.tables
    with roles.owner.connect() as other, roles.engine("operate") as engine:
        other.execute(sa.insert(tables.checkpoint).values(name="x", value="y"))  # open, and holds its snapshot
        with engine.connect() as connection:
            seen = status(connection, tables)
            found = seen.transactions
            assert found is not None
            assert (found.seen, found.who) == (True, f"process {pid(other)}, user postgres")
            assert "; a transaction has been open for " in seen.verdict
            assert f" s ({found.who}): what is deleted cannot be cleaned away until it ends" in seen.verdict
        roles.run(f"revoke pg_read_all_stats from {roles.names['operate']}")
        with engine.connect() as connection:
            found = status(connection, tables).transactions
            assert found is not None
            assert (found.seen, found.oldest) == (False, None)
        url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        schema = ("--schema", tables.schema) if tables.schema else ()
        assert "transactions of other roles cannot be seen" in quick("status", "--database", url, *schema).out


def pid(connection: sa.Connection) -> int:
    return int(connection.scalar(sa.text("select pg_backend_pid()")) or 0)


# ---------------------------------------------------------------- what is printed


def test_sqlite_has_no_roles() -> None:
    with pytest.raises(ConfigurationError, match="SQLite has no roles"):
        grants("sqlite")


def test_mysql_is_granted_what_its_roles_need_to_see_the_tables() -> None:
    script = grants("mariadb", {"add": "shop@localhost", "operate": "ops"}, schema="app")
    assert "GRANT INSERT (id, bucket, topic, `key`" in script
    assert "ON app.outbox_message TO 'shop'@'localhost';" in script
    assert "GRANT PROCESS ON *.* TO 'ops';" in script


@given(
    st.text(max_size=20) | st.text("ab;'\"` -@%.\n", max_size=8), st.sampled_from(["postgresql", "mysql", "mariadb"])
)
def test_a_role_is_an_identifier_or_refused(role: str, dialect: str) -> None:
    try:
        script = grants(dialect, {"add": role})
    except ConfigurationError:
        return
    statements = [line for line in script.splitlines() if line and not line.startswith("--")]
    assert all(line.startswith("GRANT ") and line.count(";") == 1 and line.endswith(";") for line in statements)
    assert all(role.split("@")[0] in line for line in statements)
    assert not set(role) & set(";'\"`\n ")


@pytest.mark.parametrize(
    ("roles_given", "said"),
    [
        ({"fly": "x"}, "'fly' is no use of the outbox: add, cancel"),
        ({"add": ""}, "role ''"),
        ({"add": "a b"}, "role 'a b'"),
    ],
)
def test_what_is_wrong_is_named(roles_given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        grants("postgresql", roles_given)
