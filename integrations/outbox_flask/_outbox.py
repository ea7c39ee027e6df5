"""The outbox of a Flask-SQLAlchemy database."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping
from typing import Any, overload

import sqlalchemy as sa
from flask import Flask, current_app, has_app_context
from flask.ctx import AppContext
from flask_sqlalchemy import SQLAlchemy

import outbox
from outbox import ConfigurationError, Message
from outbox._message import ABSENT, Key, _Absent  # what the signature of add is made of
from outbox._outbox import Where
from outbox.encoding import Codec


class Outbox(outbox.Outbox):
    """The outbox of ``db``: an `outbox.Outbox` on its metadata, so that ``db.create_all()`` and Flask-Migrate see the
    tables, whose ``add`` need not be told the session.

    ``bind_key``: the database that the tables are in, as ``__bind_key__`` of the models whose messages it takes: a message
    commits with the data of its own database only. ``schema``, ``prefix``, ``codec``: as for `outbox.Outbox`.

    Raises `ConfigurationError` for what is no `SQLAlchemy`.
    """

    def __init__(
        self,
        db: SQLAlchemy,
        *,
        bind_key: str | None = None,
        schema: str | None = None,
        prefix: str = "outbox_",
        codec: Codec | None = None,
    ) -> None:
        if not isinstance(db, SQLAlchemy):
            raise ConfigurationError(f"Outbox() takes the SQLAlchemy of your app (db), not a {type(db).__name__}")
        super().__init__(_metadata(db, bind_key), schema=schema, prefix=prefix, codec=codec)
        self.db = db
        self.bind_key = bind_key
        self._app: Flask | None = None

    def init_app(self, app: Flask) -> None:
        """Make it known to the app, for ``flask outbox`` and for consumers. Raises `ConfigurationError` where the app has
        another outbox under the same bind key."""
        known: dict[str | None, Outbox] = app.extensions.setdefault("outbox", {})
        if known.setdefault(self.bind_key, self) is not self:
            raise ConfigurationError(f"the app has another outbox already, with bind_key={self.bind_key!r}")
        self._app = app

    def app_context(self) -> AppContext:
        """A new context of the app: the one that is current, else the last one that ``init_app`` was called with. Raises
        `ConfigurationError` where there is none."""
        if has_app_context() and current_app.extensions.get("outbox", {}).get(self.bind_key) is self:
            return current_app.app_context()
        if self._app is None:
            raise ConfigurationError(
                "this outbox belongs to no app yet: call outbox.init_app(app), and make the app before the consumer runs "
                "(`flask outbox consume …` does)"
            )
        return self._app.app_context()

    @property
    def engine(self) -> sa.Engine:
        """The engine of the tables' database."""
        with self.app_context():
            engines = self.db.engines
            if self.bind_key not in engines:
                raise ConfigurationError(f"bind key {self.bind_key!r} is not in the app's SQLALCHEMY_BINDS")
            found: sa.Engine = engines[self.bind_key]
            return found

    @overload
    def add(
        self,
        where: Where,
        topic: str,
        payload: Any,
        *,
        key: Key | _Absent = ABSENT,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
        deliver_at: dt.datetime | dt.timedelta | None = None,
        id: uuid.UUID | None = None,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> Message: ...

    @overload
    def add(
        self,
        where: Where,
        event: object,
        /,
        *,
        headers: Mapping[str, str] | None = None,
        deliver_at: dt.datetime | dt.timedelta | None = None,
        id: uuid.UUID | None = None,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> Message: ...

    @overload
    def add(
        self,
        topic: str,
        payload: Any,
        /,
        *,
        key: Key | _Absent = ABSENT,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
        deliver_at: dt.datetime | dt.timedelta | None = None,
        id: uuid.UUID | None = None,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> Message: ...

    @overload
    def add(
        self,
        event: object,
        /,
        *,
        headers: Mapping[str, str] | None = None,
        deliver_at: dt.datetime | dt.timedelta | None = None,
        id: uuid.UUID | None = None,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> Message: ...

    def add(self, *arguments: Any, **options: Any) -> Message:
        """As `outbox.Outbox.add`; where no session is given it is ``db.session``: ``outbox.add("orders", {…}, key=1)``,
        ``outbox.add(OrderPlaced(…))``, and still ``outbox.add(session, …)`` for another one."""
        named = "where" in options
        first = arguments and not isinstance(arguments[0], str) and (len(arguments) > 1 or "topic" in options)
        if not (named or first):
            arguments = (self.db.session, *arguments)
        return super().add(*arguments, **options)


def _metadata(db: SQLAlchemy, bind_key: str | None) -> sa.MetaData:
    if bind_key not in db.metadatas:
        # Flask-SQLAlchemy makes the metadata of a bind key when the first model asks for it: so one does
        type("OutboxBind", (db.Model,), {"__abstract__": True, "__bind_key__": bind_key})
    found: sa.MetaData = db.metadatas[bind_key]
    return found
