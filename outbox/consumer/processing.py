"""What becomes of one message: its effect, another attempt, or a dead letter."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import sqlalchemy as sa

from outbox._outbox import Outbox
from outbox._refusals import words
from outbox.backoff import Backoff
from outbox.consumer.attempts import Attempts
from outbox.consumer.binding import Handler
from outbox.consumer.effect import DatabaseTrouble, Effect, NoRoom
from outbox.consumer.handlers import Handlers
from outbox.consumer.incoming import Incoming
from outbox.consumer.retries import Retries
from outbox.consumer.state import State
from outbox.consumer.transactions import Transactions
from outbox.dead_letters.exception_text import own_words
from outbox.dead_letters.record import Failure, Reason
from outbox.errors import DecodingError, Drop
from outbox.stores._run import advice

log = logging.getLogger("outbox.consumer")

T = TypeVar("T")

SPARED: Final = 5
"""How often one message's failure is put down to a lost connection or a busy SQLite while the database answers at once
afterwards. Beyond that it counts: a message whose handler kills its connection must not be tried for ever."""

KINDS: Final = 1000  # of ignored messages, by topic and type, that are logged: foreign producers may have any number


class Next(enum.Enum):
    DONE = enum.auto()
    AGAIN = enum.auto()


@dataclass(frozen=True, slots=True)
class Wait:
    """The next attempt is due in ``seconds``."""

    seconds: float


class Database:
    """Whether the database answers. While it does not, nothing is begun, and one question is asked at a time."""

    PROBE: Final = Backoff(first=0.2, factor=2.0, most=10.0)

    def __init__(self, transactions: Transactions, state: State) -> None:
        self._transactions = transactions
        self._state = state
        self._up = asyncio.Event()
        self._up.set()
        self._probe: asyncio.Task[None] | None = None
        self._troubles = 0

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    async def up(self) -> None:
        """Wait until it can be asked."""
        await self._up.wait()

    def worked(self) -> None:
        """A transaction has succeeded. Of one that committed before the database failed it may be heard after that: it says
        nothing then."""
        if self._up.is_set():
            self._troubles = 0
            self._state.database = None

    def failed(self, trouble: DatabaseTrouble) -> None:
        """It failed: nothing is begun until a probe succeeds, which is tried after a back-off that grows while troubles
        follow each other."""
        if not self._up.is_set():
            return
        self._troubles += 1
        cause = getattr(trouble.__cause__, "orig", None) or trouble.__cause__ or trouble
        what = words(cause)
        self._state.database = f"{type(cause).__name__}: {what}{advice(what)}"
        log.error("the database failed, no attempt is spent; trying again: %s", self._state.database)
        self._up.clear()
        self._probe = asyncio.create_task(self._until_it_answers())

    async def _until_it_answers(self) -> None:
        while True:
            await asyncio.sleep(self.PROBE.delay(self._troubles))
            try:
                await self._transactions.run(lambda connection: connection.execute(sa.select(1)).scalar())
            except DatabaseTrouble:
                self._troubles += 1
            else:
                self._up.set()
                return

    async def patiently(self, work: Callable[[sa.Connection], T]) -> T:
        """Run ``work`` in a transaction, however long the database is away."""
        while True:
            try:
                result = await self._transactions.run(work)
            except DatabaseTrouble as trouble:
                self.failed(trouble)
                await self.up()
            else:
                self.worked()
                return result

    async def close(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)


class Processing:
    """One message at a time, as often as it is called."""

    def __init__(
        self,
        outbox: Outbox,
        handlers: Handlers,
        attempts: Attempts,
        transactions: Transactions,
        database: Database,
        retries: Retries,
        provide: dict[str, Any],
        state: State,
    ) -> None:
        self.outbox = outbox
        self.handlers = handlers
        self.attempts = attempts
        self.transactions = transactions
        self.database = database
        self.retries = retries
        self.provide = provide
        self.state = state
        self._passed_over: set[tuple[str, str | None]] = set()

    async def process(self, incoming: Incoming) -> Next | Wait:
        """Try a message once. ``DONE``: its effect or its dead letter is committed, or it is ignored: acknowledge it. Raises
        what is a defect of this library only."""
        counts = self.state.counts
        message = incoming.message
        handler = self.handlers.find(message.topic, message.type)
        if handler is None and self.handlers.unknown == "ignore" and not incoming.replay:
            return await self._ignored(incoming)
        if incoming.trouble is not None:
            return await self._dead(incoming, None, "undeserializable", incoming.trouble)
        if handler is None:
            return await self._dead(incoming, None, "no-handler", self.handlers.missing(message))
        try:
            payload = handler.decode(message, self.outbox.codec)
        except DecodingError as error:
            return await self._dead(incoming, handler, "undeserializable", error)
        effect = Effect(self.outbox, self.attempts, incoming, handler)
        try:
            handled = await self.transactions.handle(effect, payload, self.provide)
        except DatabaseTrouble as trouble:
            if effect.claimed and trouble.__cause__ is not None and not isinstance(trouble, NoRoom):
                # the handler was reached: perhaps it is what breaks the connection
                incoming.spared += 1
                if incoming.spared > SPARED:
                    return await self._failed(incoming, handler, trouble.__cause__)
            self.database.failed(trouble)
            return Next.AGAIN
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # a handler's own, not ours: it gave up waiting for something
            return await self._failed(incoming, handler, TimeoutError("the handler was cancelled from inside"))
        except (Exception, SystemExit) as error:
            return await self._failed(incoming, handler, error)
        self.database.worked()
        if handled:
            counts.handled += 1
        else:
            counts.skipped += 1
            log.debug("message %s of %s is done already", message.id, message.topic)
        return Next.DONE

    async def _failed(self, incoming: Incoming, handler: Handler, error: BaseException) -> Next | Wait:
        """The transaction is rolled back: record the attempt in one of its own."""
        self.state.counts.failed += 1
        if isinstance(error, Drop):
            return await self._dead(incoming, handler, "rejected", error)
        failure = Failure.of("retries-exhausted", error, module=handler.module)
        retries = self.retries
        delays: list[float] = []

        def delay(attempt: int) -> float:
            # drawn once, so that what is written and what is waited are one
            if not delays:
                delays.append(retries.delay(attempt, error))
            return delays[0]

        attempts, dead = await self.database.patiently(
            lambda c: self.attempts.failed(c, incoming, failure, retries.attempts, delay)
        )
        incoming.failures = attempts
        message = incoming.message
        if dead:
            self._is_dead(incoming, failure, error)
            return Next.DONE
        log.warning(
            "message %s of %s failed in %s (attempt %d of %d), again in %.1f s: %s",
            message.id, message.topic, handler.name, attempts, retries.attempts, delays[0], _shown(failure, error),
        )  # fmt: skip
        return Wait(delays[0])

    async def _dead(self, incoming: Incoming, handler: Handler | None, reason: Reason, error: BaseException) -> Next:
        """Give the message up at once."""
        failure = Failure.of(reason, error, module=handler.module if handler else None)
        tried = int(reason == "rejected")
        written = await self.database.patiently(lambda c: self.attempts.dead(c, incoming, failure, tried=tried))
        if written:
            self._is_dead(incoming, failure, error)
        else:
            self.state.counts.skipped += 1
        return Next.DONE

    def _is_dead(self, incoming: Incoming, failure: Failure, error: BaseException) -> None:
        self.state.counts.dead += 1
        log.error(
            "message %s of %s is a dead letter of consumer %s (%s): %s",
            incoming.message.id, incoming.message.topic, self.attempts.consumer, failure.reason, _shown(failure, error),
        )  # fmt: skip

    async def _ignored(self, incoming: Incoming) -> Next:
        """Of a type without a handler, where the consumer was told to pass such messages over."""
        message = incoming.message
        if incoming.failures:  # it had a handler once
            await self.database.patiently(lambda c: self.attempts.forget(c, incoming))
        self.state.counts.ignored += 1
        kind = message.topic, message.type
        if kind not in self._passed_over and len(self._passed_over) < KINDS:
            self._passed_over.add(kind)
            log.info(
                "consumer %s ignores messages of %s (unknown='ignore'): it has no handler for them",
                repr(self.attempts.consumer), self.handlers.kind(message),
            )  # fmt: skip
        return Next.DONE


def _shown(failure: Failure, error: BaseException) -> str:
    """What a log says of an exception: its type, the place in the user's code, and its text where that is ours. Others can
    quote payloads and the parameters of statements; the dead letter has them."""
    place = f" at {failure.place}" if failure.place else ""
    words = own_words(error)
    return f"{failure.exception_type}{place}" + (f": {words}" if words else "")
