"""The outbox's tables, as they are in this version of pyoutbox."""

from __future__ import annotations

from django.db import connection, migrations

from shop.messaging import outbox


class Migration(migrations.Migration):
    dependencies = [("shop", "0001_initial")]
    operations = [migrations.RunSQL(outbox.ddl(connection.vendor))]
