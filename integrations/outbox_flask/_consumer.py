"""A consumer whose handlers are Flask code."""

from __future__ import annotations

import asyncio
from typing import Any, Self

import outbox
from outbox import ConfigurationError
from outbox_flask._outbox import Outbox


class Consumer(outbox.Consumer):
    """An `outbox.Consumer` whose handlers may use ``current_app`` and ``db.session``: each message is handled in an app
    context of its own, and its transaction **is** that of ``db.session``. What a handler writes there, the inbox row, and
    the messages that it adds commit together, or not at all. A handler that commits by itself is an error.

    ``outbox``: an `outbox_flask.Outbox`, with ``init_app`` called before the consumer runs. ``options``: those of
    `outbox.Consumer`. The database is that of the outbox. Handlers are sync: an async one would run without the context.
    """

    def __init__(self, name: str, outbox: Outbox, **options: Any) -> None:
        if not isinstance(outbox, Outbox):
            raise ConfigurationError(
                f"consumer {name!r}: its outbox is a {type(outbox).__module__}.{type(outbox).__name__}; "
                "outbox_flask.Consumer takes an outbox_flask.Outbox"
            )
        options.setdefault("session", outbox.db.session)
        options.setdefault("around", outbox.app_context)
        super().__init__(name, outbox, **options)
        self._flask_outbox = outbox

    def run(self, **options: Any) -> None:
        self._take_database()
        super().run(**options)

    async def arun(self, stop: asyncio.Event, **options: Any) -> None:
        self._take_database()
        await super().arun(stop, **options)

    async def __aenter__(self) -> Self:
        self._take_database()
        return await super().__aenter__()

    def _take_database(self) -> None:
        """Now there is an app, or it is said that there is none. Attempts and dead letters are written beside the handlers'
        transactions, to the same database: ``db.session`` alone would not say which of several binds that is."""
        if self._database is None:
            self._database = self._flask_outbox.engine
