"""`Consumer`: a named group of handlers, each message's effect once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from sqlalchemy.orm import Session, scoped_session

from outbox._message import Message
from outbox._outbox import Outbox
from outbox.cleanup.retention import Retention
from outbox.consumer import effect, handing
from outbox.consumer.attempts import Attempts
from outbox.consumer.effect import DatabaseTrouble
from outbox.consumer.handlers import Handlers, Unknown
from outbox.consumer.incoming import Identify
from outbox.consumer.processing import Database as DatabaseWatch
from outbox.consumer.processing import Processing
from outbox.consumer.retries import Retries, retries_from
from outbox.consumer.runtime import Runtime
from outbox.consumer.state import State
from outbox.consumer.transactions import Transactions, check_sessions
from outbox.errors import ConfigurationError
from outbox.observe.cleanup import inbox_kept
from outbox.observe.schema import check_schema
from outbox.stores.engine import Database, from_environment
from outbox.tables import CONSUMER_LENGTH
from outbox.transport import Transport
from outbox.transports import open_transport

if TYPE_CHECKING:
    pass

log = logging.getLogger("outbox.consumer")

Function = TypeVar("Function", bound=Callable[..., Any])

DRAIN_SECONDS = 25.0  # below the 30 s after which Kubernetes kills


class Consumer:
    """A named group of handlers. Each message's effect happens once in ``outbox``'s database: inbox row, effect and the
    messages it adds commit together, then the message is acknowledged.

    ``name`` is the group at the broker and the name in the inbox: changing it reads everything again.

    ``database``: URL, `sqlalchemy.URL`, `Engine` or `AsyncEngine`; None takes it from ``OUTBOX_DATABASE``, when it starts.
    Of a URL, sync handlers get a sync engine and handlers with an ``AsyncSession`` an async one. ``transport``: URL or
    `Transport`; None takes it from ``OUTBOX_TRANSPORT``. ``session``: a sessionmaker, async_sessionmaker or scoped session
    (``db.session``) that makes the handlers' sessions, in place of plain ones on ``database``. ``around``: a context
    manager factory entered around each transaction (``app.app_context``). ``provide``: further arguments by name, each a
    value, or a function without arguments that is called for every message. ``retries``: `Retries`, or how many attempts.

    ``ordering``: "key" handles messages of one (topic, key) one after the other, in order, and lets a failing one hold up
    its successors until it is done or dead; "none" handles all side by side. ``concurrency``: handlers at work at once.
    ``window``: messages in memory, and out at the broker without an acknowledgement, at the most. ``member``: a name that
    this process keeps over restarts, so that its share comes back at once. ``message_id``: from a `Delivery` to an id that
    is the same whenever it is delivered again; needed for messages without ``outbox-id`` on brokers without offsets.

    ``unknown``: what becomes of a message whose topic it reads and whose type none of its handlers is for. "dead": a dead
    letter (reason ``no-handler``), so that nothing is lost silently. "ignore": it is acknowledged and counted in ``state``,
    and leaves no inbox row and no dead letter; said in the log once for each topic and type. A replay is never ignored.

    Raises `ConfigurationError` for what can never work. A killed process loses nothing: what was not committed comes
    again, what was is skipped. Attempts are counted in the database, so they survive too.
    """

    def __init__(
        self,
        name: str,
        outbox: Outbox,
        *,
        database: Database | None = None,
        transport: str | Transport | None = None,
        session: Any = None,
        around: Callable[[], Any] | None = None,
        provide: Mapping[str, Any] | None = None,
        retries: Retries | int | None = None,
        ordering: Literal["key", "none"] = "key",
        concurrency: int = 10,
        window: int = 500,
        member: str | None = None,
        message_id: Identify | None = None,
        unknown: Unknown = "dead",
    ) -> None:
        _check_arguments(name, outbox)
        if not isinstance(name, str) or not 0 < len(name) <= CONSUMER_LENGTH or "\x00" in name:
            raise ConfigurationError(f"consumer {name!r}: its name has 1 to {CONSUMER_LENGTH} characters")
        if ordering not in ("key", "none"):
            raise ConfigurationError(f"consumer {name!r}: ordering={ordering!r}; 'key' and 'none' are possible")
        if unknown not in ("dead", "ignore"):
            raise ConfigurationError(
                f"consumer {name!r}: unknown={unknown!r}; messages without a handler become dead letters ('dead') or are "
                "passed over ('ignore')"
            )
        for option, number in (("concurrency", concurrency), ("window", window)):
            if not isinstance(number, int) or number < 1:
                raise ConfigurationError(f"consumer {name!r}: {option}={number!r}; it is a number from 1 on")
        if around is not None and not callable(around):
            raise ConfigurationError(
                f"consumer {name!r}: around= is called for every message, as in around=app.app_context (no parentheses)"
            )
        check_sessions(name, session)
        self.name = name
        self.outbox = outbox
        self.retries = retries_from(retries)
        self.state = State()
        """What it is doing in this process; a fresh one for every run."""
        self._database, self._transport, self._session = database, transport, session
        self._around, self._provide = around, dict(provide or {})
        self._keep_order, self._concurrency, self._window = ordering == "key", concurrency, window
        self._member, self._identify = member, message_id
        self._handlers = Handlers(name, self._provide, outbox.codec, unknown)
        self._stop: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        effect.install()

    def __repr__(self) -> str:
        return f"Consumer({self.name!r}, topics={list(self.topics)})"

    @property
    def topics(self) -> tuple[str, ...]:
        """What it subscribes to: the topics of its handlers."""
        return self._handlers.topics

    # ------------------------------------------------------------ handlers

    # None has no meaning: with it, what is left out can be said by us, and not by Python
    def on(self, what: str | type | None = None, *, type: str | None = None) -> Callable[[Function], Function]:
        """Register a handler: ``@consumer.on(OrderPlaced)`` for a declared class, ``@consumer.on("orders",
        type="order.placed")`` for a topic and type, ``@consumer.on("orders")`` for the topic's types that have no handler
        of their own. What has none at all becomes a dead letter, or is ignored (``Consumer(unknown=…)``).

        The first parameter is the payload, decoded to its annotation: a dataclass, pydantic, attrs or msgspec class, dict,
        bytes, `Message`, Any. Without one, or with Any, it is what the content type says: str for ``text/…``, bytes for
        ``application/octet-stream``, else what the JSON holds. The others are bound by annotation (``Session``,
        ``AsyncSession``, `Message`), by name (``session``, ``message``), then from ``provide``. A handler may return a
        declared message, or a list of them: they are added in the same transaction. The function itself is returned
        unchanged.

        What it raises is logged by its type and the place in your code, and kept in the dead letter. Its text goes into the
        log only where it is ours (`Retry` and `Drop` included): others can quote payloads.

        Raises `ConfigurationError` for what cannot be served, naming handler and argument.
        """
        self._handlers.subject(what, type)  # said here: on(function) would never come to the next line

        def register(function: Function) -> Function:
            # The names around the decorated function: its annotations may be text and its classes local.
            self._handlers.add(function, what, type, sys._getframe(1).f_locals)
            return function

        return register

    @overload
    def handle(self, message: object, where: Session | scoped_session[Any]) -> bool: ...

    @overload
    def handle(self, message: Session | scoped_session[Any], where: object) -> bool: ...

    def handle(self, message: object, where: object) -> bool:
        """Handle one message in the transaction of a session of yours: claim, handler, outgoing messages; no commit. For
        tests, webhooks and other loops. ``message``: an object of a declared class, or a `Message`. False: nothing was done,
        since it was handled before, or has no handler and such messages are ignored. What the handler raises comes through;
        roll back then.

        Async: ``await session.run_sync(consumer.handle, event)``, which runs async handlers too.
        """
        return handing.handle(self.outbox, self.name, self._handlers, message, where)

    def handles(self, message: Message) -> bool:
        """Whether there is a handler for a message of this topic and type."""
        return self._handlers.find(message.topic, message.type) is not None

    # ------------------------------------------------------------ ways to run

    def run(
        self,
        *,
        database: Database | None = None,
        transport: str | Transport | None = None,
        member: str | None = None,
        deadline: float = DRAIN_SECONDS,
    ) -> None:
        """Run until SIGTERM or SIGINT, then drain: finish what is being handled, acknowledge it, leave the group; after
        ``deadline`` seconds what is left is abandoned, to be delivered again. A second signal stops at once.

        What is given here goes before what the consumer was made with. Raises `ConfigurationError`, `SchemaMismatch`, and
        `StoreUnavailable` for an SQLite file that is not there.
        """
        self._database = database if database is not None else self._database
        self._transport = transport if transport is not None else self._transport
        self._member = member if member is not None else self._member
        asyncio.run(self._run_until_signalled(deadline))

    async def _run_until_signalled(self, deadline: float) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        main = asyncio.current_task()

        def on_signal() -> None:
            if stop.is_set() and main is not None:
                main.cancel()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        with contextlib.suppress(asyncio.CancelledError):
            await self.arun(stop, deadline=deadline)

    async def __aenter__(self) -> Self:
        """Run beside an application. Does not fail because a broker or the database is away; `ConfigurationError`,
        `SchemaMismatch`, and `StoreUnavailable` for an SQLite file that is not there, are raised. A consumer that dies later
        is logged, is in ``state.error``, and never cancels the application."""
        transactions, transport, owned = self._open()
        try:
            with contextlib.suppress(DatabaseTrouble):  # waited for in the background
                await transactions.run(self._check_schema)
        except BaseException:
            self.state.running = False
            await _close(transactions, transport, owned)
            raise
        self._stop = asyncio.Event()
        work = self._work(transactions, transport, owned, self._stop, DRAIN_SECONDS)
        self._task = asyncio.create_task(work, name=f"outbox-consumer-{self.name}")
        self._task.add_done_callback(self._ended)
        return self

    async def __aexit__(self, *exc: object) -> None:
        task, stop = self._task, self._stop
        assert task is not None
        assert stop is not None
        stop.set()
        with contextlib.suppress(Exception):  # logged when it happened
            await task

    async def arun(self, stop: asyncio.Event, *, deadline: float = DRAIN_SECONDS) -> None:
        """Run until ``stop`` is set, then drain for ``deadline`` seconds at the most. Raises as `run` does."""
        transactions, transport, owned = self._open()
        await self._work(transactions, transport, owned, stop, deadline)

    # ------------------------------------------------------------ the work

    def _open(self) -> tuple[Transactions, Transport, bool]:
        """Everything that can be wrong without asking anybody is said here."""
        if self.state.running:
            raise ConfigurationError(f"consumer {self.name!r} is running in this process already")
        handlers = self._handlers.check()
        given = self._transport if self._transport is not None else from_environment("OUTBOX_TRANSPORT")
        if given is None:
            raise ConfigurationError(
                f"consumer {self.name!r}: no transport given: pass transport=… (a URL or a Transport) or --transport, or set "
                "OUTBOX_TRANSPORT or OUTBOX_TRANSPORT_FILE"
            )
        inbox = self.outbox.tables.inbox
        transactions = Transactions(self.name, inbox, self._database, self._session, self._around, self._concurrency)
        transactions.open(handlers)
        transport = open_transport(given)
        self.state = State(running=True)
        return transactions, transport, isinstance(given, str)

    async def _work(
        self, transactions: Transactions, transport: Transport, owned: bool, stop: asyncio.Event, deadline: float
    ) -> None:
        state = self.state
        attempts = Attempts(self.outbox.tables, self.name)
        database = DatabaseWatch(transactions, state)
        processing = Processing(
            self.outbox, self._handlers, attempts, transactions, database, self.retries, self._provide, state
        )
        runtime = Runtime(
            self.name,
            self.topics,
            transport,
            transactions,
            attempts,
            processing,
            state,
            keep_order=self._keep_order,
            concurrency=self._concurrency,
            window=self._window,
            member=self._member,
            identify=self._identify,
        )
        try:
            if await _before(stop, database.patiently(self._check_schema)):
                await runtime.run(stop, deadline)
        except Exception as error:
            state.error = error
            raise
        finally:
            state.running = False
            await database.close()
            await _close(transactions, transport, owned)

    def _check_schema(self, connection: Any) -> None:
        check_schema(connection, self.outbox.tables)
        kept = inbox_kept(connection, self.outbox.tables)
        if kept is not None:
            longest = self.retries.attempts * self.retries.backoff.most
            Retention(inbox=kept).require(longest, f"the retries of consumer {self.name!r}")

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("consumer %s in this process has died: %s", self.name, error, exc_info=error)


def _check_arguments(name: object, outbox: object) -> None:
    if isinstance(name, Outbox) and isinstance(outbox, str):
        raise ConfigurationError(
            f"Consumer(outbox, {outbox!r}): the arguments are swapped: write Consumer({outbox!r}, outbox)"
        )
    if isinstance(name, str) and not isinstance(outbox, Outbox):
        raise ConfigurationError(
            f"consumer {name!r}: its second argument is your Outbox, not a {type(outbox).__name__}: write "
            f"Consumer({name!r}, outbox)"
        )


async def _before(stop: asyncio.Event, work: Any) -> bool:
    """Await ``work`` unless ``stop`` comes first. Whether the work was done; what it raises comes through."""
    task, stopping = asyncio.ensure_future(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
            return True
        return False
    finally:
        for one in (task, stopping):
            one.cancel()
        await asyncio.gather(task, stopping, return_exceptions=True)


async def _close(transactions: Transactions, transport: Transport, owned: bool) -> None:
    if owned:
        await transport.close()
    await transactions.close()
