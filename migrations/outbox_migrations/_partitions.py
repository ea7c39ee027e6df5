"""An inbox in daily partitions, and back (PostgreSQL). Not a version of the tables: each outbox is asked for it by itself.

Each way is one statement, so that nobody ever sees an inbox that is half of it: a block that locks the inbox, changes
names, and commits. What is in the inbox already becomes the default partition, and is deleted by age as before; cleanup and
relays make a partition for each of the next days (`outbox.cleanup.days`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import sqlalchemy as sa

from outbox import ConfigurationError
from outbox.observe.partitions import DEFAULT
from outbox.storage import STORAGE, listed
from outbox.tables import Tables, tables_for
from outbox_migrations._operations import Operation, is_partitioned

# Owner and privileges of {old}, also those on columns, are given to {new}.
_GRANTS: Final = """
    EXECUTE format('ALTER TABLE {new} OWNER TO %I', (SELECT rolname FROM pg_roles r JOIN pg_class c ON c.relowner = r.oid
      WHERE c.oid = '{old}'::regclass));
    FOR given IN SELECT a.privilege_type, a.is_grantable, '' AS col, a.grantee FROM pg_class c, aclexplode(c.relacl) a
      WHERE c.oid = '{old}'::regclass AND a.grantee <> c.relowner
      UNION ALL SELECT a.privilege_type, a.is_grantable, format(' (%I)', t.attname), a.grantee
      FROM pg_attribute t, aclexplode(t.attacl) a WHERE t.attrelid = '{old}'::regclass AND NOT t.attisdropped
    LOOP
      EXECUTE format('GRANT %s%s ON {new} TO %s%s', given.privilege_type, given.col,
        CASE given.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(given.grantee)) END,
        CASE WHEN given.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
    END LOOP;
"""

# The index behind the primary key may have a name of the user's.
_RENAME_KEY: Final = """
    EXECUTE format('ALTER TABLE {table} RENAME CONSTRAINT %I TO {to}',
      (SELECT conname FROM pg_constraint WHERE conrelid = '{table}'::regclass AND contype = 'p'));
"""

_PARTITION: Final = (
    """DO $outbox$
  DECLARE given record;
  BEGIN
    LOCK TABLE {inbox} IN ACCESS EXCLUSIVE MODE;
    ALTER TABLE {inbox} RENAME TO {default_name};
"""
    + _RENAME_KEY.format(table="{default}", to="{default_name}_pkey")
    + """
    ALTER INDEX IF EXISTS {schema}{index} RENAME TO {default_name}_processed_at_idx;
    CREATE TABLE {inbox} (LIKE {default} INCLUDING ALL EXCLUDING INDEXES) PARTITION BY RANGE (message_id);
    EXECUTE format('ALTER TABLE {inbox} SET SCHEMA %I',
      (SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = '{default}'::regclass));
    ALTER TABLE {inbox} ADD CONSTRAINT {key} PRIMARY KEY (consumer, message_id);
    CREATE INDEX {index} ON {inbox} (processed_at);
"""
    + _GRANTS.format(old="{default}", new="{inbox}")
    + """
    ALTER TABLE {inbox} ATTACH PARTITION {default} DEFAULT;
  END
$outbox$"""
)

# With the snapshot of a transaction, which is older than the lock, what was claimed while the lock was waited for would not
# be copied, and its effect come twice.
_UNITE: Final = (
    """DO $outbox$
  DECLARE given record;
  BEGIN
    IF current_setting('transaction_isolation') NOT LIKE 'read %' THEN
      RAISE EXCEPTION 'the inbox is copied at READ COMMITTED only, this is %', current_setting('transaction_isolation');
    END IF;
    LOCK TABLE {inbox} IN ACCESS EXCLUSIVE MODE;
    ALTER TABLE {inbox} DETACH PARTITION {default};
    ALTER TABLE {inbox} RENAME TO {name}_days;
    ALTER TABLE {days} RENAME CONSTRAINT {key} TO {name}_days_pkey;
    ALTER INDEX {schema}{index} RENAME TO {name}_days_processed_at_idx;
    ALTER TABLE {default} RENAME TO {name};
"""
    + _RENAME_KEY.format(table="{inbox}", to="{key}")
    + """
    ALTER INDEX IF EXISTS {schema}{default_name}_processed_at_idx RENAME TO {index};
    INSERT INTO {inbox} SELECT * FROM {days};
    ALTER TABLE {inbox} SET ({storage});
"""
    + _GRANTS.format(old="{days}", new="{inbox}")
    + """
    DROP TABLE {days};
  END
$outbox$"""
)


def operation(dialect: str, schema: str | None, prefix: str, *, partitioned: bool) -> Operation:
    """The one operation. Raises `ConfigurationError` where the database is not PostgreSQL."""
    if dialect != "postgresql":
        raise ConfigurationError(
            f"an inbox in partitions: PostgreSQL only, this is {dialect}. Cleanup deletes by row here"
        )
    from sqlalchemy.dialects import postgresql

    tables = tables_for(sa.MetaData(), schema, prefix)
    quote = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]
    name, full = tables.inbox.name, quote.format_table
    names = {
        "schema": f"{quote.quote_schema(tables.schema)}." if tables.schema else "",
        "inbox": full(tables.inbox),
        "default": full(sa.table(prefix + DEFAULT, schema=tables.schema)),
        "days": full(sa.table(f"{name}_days", schema=tables.schema)),
        "name": name,
        "default_name": prefix + DEFAULT,
        "key": f"{name}_pkey",
        "index": f"{name}_processed_at_idx",
        "storage": listed(STORAGE["inbox"]),
    }
    what = f"put {tables.inbox.fullname} into daily partitions"
    if not partitioned:
        what = f"make one table of the partitions of {tables.inbox.fullname}, copying their rows under the lock"
    text = (_PARTITION if partitioned else _UNITE).format(**names)
    ddl: Any = sa.DDL(text.replace("%", "%%"))  # type: ignore[no-untyped-call]
    return Operation(what, tables.inbox, ddl, _is(tables, partitioned), "ACCESS EXCLUSIVE")


def require_read_committed(connection: sa.Connection) -> None:
    """Raises `ConfigurationError` where the copy would be of a snapshot that is older than its lock."""
    level = connection.scalar(sa.text("SHOW transaction_isolation"))
    if not str(level).startswith("read "):
        raise ConfigurationError(
            f"unpartition_inbox: this transaction is {str(level).upper()}, and would leave behind what consumers claim while "
            "it waits for its lock. Give it an Engine, or a transaction at READ COMMITTED"
        )


def _is(tables: Tables, partitioned: bool) -> Callable[[sa.Connection], bool]:
    return lambda connection: is_partitioned(connection, tables.inbox) is partitioned
