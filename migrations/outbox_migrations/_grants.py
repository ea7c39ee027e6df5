"""Least privilege: what each use of the outbox needs of which table, as GRANT statements.

tests/migrations/test_grants.py runs the real thing under roles that have nothing else, and takes each of these away in turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import sqlalchemy as sa

from outbox import ConfigurationError
from outbox.tables import BODY, Tables, tables_for
from outbox_migrations._script import dialect_of

# Not position, which the database gives, nor created_at: an application cannot forge the order.
_ADDED: Final = tuple(name for name in BODY if name != "created_at")


class Privilege(NamedTuple):
    """``INSERT`` on a table, perhaps on some of its columns only."""

    table: str
    verb: str
    columns: tuple[str, ...] = ()


_ADD: Final = (
    Privilege("message", "INSERT", _ADDED),
    Privilege("scheduled", "INSERT", (*_ADDED, "deliver_at")),
)
_CHECK: Final = (Privilege("checkpoint", "SELECT"), Privilege("lease", "SELECT"))  # what whoever starts looks at

USES: Final[Mapping[str, tuple[Privilege, ...]]] = {
    "add": _ADD,
    "cancel": (Privilege("scheduled", "SELECT", ("id",)), Privilege("scheduled", "DELETE")),
    "claim": (
        Privilege("inbox", "INSERT", ("consumer", "message_id", "outcome")),
        # a replay of a dead letter
        Privilege("inbox", "SELECT", ("consumer", "message_id", "outcome", "cycle")),
        Privilege("inbox", "UPDATE", ("outcome", "processed_at")),
    ),
    "relay": (
        *_CHECK,
        Privilege("message", "SELECT"),
        Privilege("message", "DELETE"),
        Privilege("message", "INSERT", BODY),  # what is due
        Privilege("scheduled", "SELECT"),
        Privilege("scheduled", "DELETE"),
        Privilege("scheduled", "UPDATE", ("deliver_at",)),  # FOR UPDATE
        Privilege("parked", "SELECT"),
        Privilege("parked", "INSERT"),
        Privilege("parked", "UPDATE"),
        Privilege("parked", "DELETE"),
        Privilege("dead_letter", "INSERT"),
        Privilege("lease", "UPDATE"),
        Privilege("relay", "SELECT"),
        Privilege("relay", "INSERT"),
        Privilege("relay", "UPDATE"),
        Privilege("relay", "DELETE"),
    ),
    "cleanup": (
        *_CHECK,
        Privilege("checkpoint", "INSERT"),
        Privilege("checkpoint", "UPDATE"),
        Privilege("message", "SELECT", ("position", "created_at")),  # whether something has waited for as long
        Privilege("parked", "SELECT", ("position", "created_at")),
        Privilege("attempt", "SELECT", ("consumer", "message_id")),
        Privilege("sent", "SELECT"),
        Privilege("sent", "UPDATE", ("sent_at",)),  # FOR UPDATE, here and below
        Privilege("sent", "DELETE"),
        Privilege("dead_letter", "SELECT"),
        Privilege("dead_letter", "UPDATE", ("closed_at",)),
        Privilege("dead_letter", "DELETE"),
        Privilege("inbox", "SELECT"),
        Privilege("inbox", "UPDATE", ("processed_at",)),
        Privilege("inbox", "DELETE"),
        Privilege("audit", "SELECT"),
        Privilege("audit", "UPDATE", ("at",)),
        Privilege("audit", "DELETE"),
        Privilege("relay", "SELECT"),
        Privilege("relay", "UPDATE", ("heartbeat_at",)),
        Privilege("relay", "DELETE"),
    ),
    "consume": (
        *_CHECK,
        *_ADD,  # messages that a handler adds or returns
        Privilege("inbox", "SELECT"),
        Privilege("inbox", "INSERT"),
        Privilege("inbox", "UPDATE"),
        Privilege("attempt", "SELECT"),
        Privilege("attempt", "INSERT"),
        Privilege("attempt", "UPDATE"),
        Privilege("attempt", "DELETE"),
        Privilege("dead_letter", "INSERT"),
    ),
    "operate": (
        *(
            Privilege(name, "SELECT")
            for name in (
                *(
                    "message",
                    "scheduled",
                    "parked",
                    "dead_letter",
                    "audit",
                    "inbox",
                    "attempt",
                    "sent",
                    "lease",
                    "relay",
                ),
                "checkpoint",
            )
        ),
        # dead letters: replayed, discarded
        Privilege("dead_letter", "UPDATE", ("state", "closed_at")),
        Privilege("audit", "INSERT"),
        Privilege("message", "INSERT", _ADDED),
        Privilege("attempt", "INSERT"),
        Privilege("attempt", "DELETE"),
        Privilege("inbox", "INSERT"),
        Privilege("inbox", "UPDATE"),
    ),
}
"""By what is done: ``add``, ``cancel``, ``claim`` of the `Outbox`, a relay, the cleanup in it or ``outbox
cleanup``, a consumer, ``outbox status | trace | dlq``."""

# An insert that does nothing where the row is there is an update of its key to what it is, on MySQL; MariaDB wants the
# right to update whatever is inserted then.
_ON_MYSQL: Final[Mapping[str, tuple[Privilege, ...]]] = {
    "claim": (Privilege("inbox", "UPDATE"),),
    "relay": (Privilege("dead_letter", "UPDATE"),),
    "consume": (Privilege("dead_letter", "UPDATE"),),
    "operate": (Privilege("attempt", "UPDATE"),),
}

_SAID: Final = {
    "add": "an application that adds messages, and can neither read nor delete any",
    "cancel": "an application that takes back what is scheduled (outbox.cancel)",
    "claim": "an application with a loop of its own (outbox.claim)",
    "relay": "outbox relay",
    "cleanup": "outbox cleanup, and what a relay does of it in the background (or give it --no-cleanup)",
    "consume": "outbox consume (what its handlers write to is yours to grant)",
    "operate": "outbox status, trace, dlq",
}
_BY_DEFAULT: Final = {"add": "app", "relay": "relay", "cleanup": "relay", "consume": "consumer", "operate": "operator"}
_MYSQL: Final = ("mysql", "mariadb")


def privileges(use: str, dialect: str, tables: Tables) -> list[Privilege]:
    """What a use needs. MySQL shows a role only the tables on which it has something, and what they look like only with
    SELECT: whoever checks them needs it on all."""
    found = list(USES[use])
    if dialect in _MYSQL:
        found += _ON_MYSQL.get(use, ())
    if dialect in _MYSQL and any(privilege in found for privilege in _CHECK):
        everywhere = [Privilege(table.name.removeprefix(tables.prefix), "SELECT") for table in tables.all]
        found += [privilege for privilege in everywhere if privilege not in found]
    return found


def statement(verb: str, privilege: Privilege, tables: Tables, role: str, dialect: sa.Dialect) -> str:
    """``GRANT`` or ``REVOKE`` of one privilege."""
    table: sa.Table = getattr(tables, privilege.table)
    quote = dialect.identifier_preparer.quote
    columns = f" ({', '.join(quote(name) for name in privilege.columns)})" if privilege.columns else ""
    on = dialect.identifier_preparer.format_table(table)
    direction = "TO" if verb == "GRANT" else "FROM"
    return f"{verb} {privilege.verb}{columns} ON {on} {direction} {_quoted(role, dialect)}"


def grants(
    dialect: str, roles: Mapping[str, str] | None = None, *, schema: str | None = None, prefix: str = "outbox_"
) -> str:
    """GRANT statements of least privilege as a script, for a DBA to read and run. Connects to nothing.

    ``dialect``: ``postgresql``, ``mysql`` or ``mariadb``. ``roles``: for which uses (`USES`), to which roles, which exist
    already; several uses may be one role's. None: a role for each that most people have, called after the prefix.

    Raises `ConfigurationError` for SQLite, which has no roles, an unknown use, and a role that is no identifier.
    """
    if dialect == "sqlite":
        raise ConfigurationError("SQLite has no roles: whoever may write the file may do everything")
    found = dialect_of(dialect)
    tables = tables_for(sa.MetaData(), schema, prefix)
    chosen = {use: prefix + name for use, name in _BY_DEFAULT.items()} if roles is None else dict(roles)
    for use, role in chosen.items():
        _check(use, role, dialect)
    lines: list[str] = []
    for use, role in chosen.items():
        lines += ["", f"-- {use}: {_SAID[use]}", *_of(use, role, tables, found)]
    head = "-- The roles must exist, and belong to whoever logs in. Each use may be given to a role of its own."
    return "\n".join([head, *lines]) + "\n"


def _of(use: str, role: str, tables: Tables, dialect: sa.Dialect) -> Iterator[str]:
    name = _quoted(role, dialect)
    postgresql = dialect.name == "postgresql"
    if tables.schema is not None and postgresql:
        yield f"GRANT USAGE ON SCHEMA {dialect.identifier_preparer.quote_schema(tables.schema)} TO {name};"
    for privilege in privileges(use, dialect.name, tables):
        yield f"{statement('GRANT', privilege, tables, role, dialect)};"
    if use == "cleanup" and postgresql:
        yield "-- an inbox in partitions: these are made and dropped by the tables' owner, which nobody can be granted"
    if use == "operate":
        yield "-- without this, status cannot see that an old transaction of another role holds things up, and says so"
        yield f"GRANT pg_read_all_stats TO {name};" if postgresql else f"GRANT PROCESS ON *.* TO {name};"


def _check(use: str, role: str, dialect: str) -> None:
    if use not in USES:
        raise ConfigurationError(f"{use!r} is no use of the outbox: {', '.join(USES)}")
    host = r"(@[A-Za-z0-9_.%:-]{1,255})?" if dialect in _MYSQL else ""
    if not isinstance(role, str) or not re.fullmatch(rf"[A-Za-z_][A-Za-z0-9_$-]{{0,62}}{host}", role):
        raise ConfigurationError(f"role {role!r}: it must be an SQL identifier")


def _quoted(role: str, dialect: sa.Dialect) -> str:
    if dialect.name in _MYSQL:
        name, at, host = role.partition("@")
        return f"'{name}'{at}" + (f"'{host}'" if at else "")
    return str(dialect.identifier_preparer.quote(role))
