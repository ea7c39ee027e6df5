"""A relay and consumers that live as long as the app."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from outbox import Consumer, Relay

Lifespan: TypeAlias = "Callable[[Any], AbstractAsyncContextManager[Any]]"
"""From the app to a context that gives the app's state (a mapping) or None, as Starlette takes it."""


@dataclass(frozen=True)
class Running:
    """What runs in the app's process; ``app.state.outbox``."""

    relay: Relay | None
    consumers: tuple[Consumer, ...]

    def trouble(self) -> dict[str, str]:
        """What is wrong, by "relay" and the consumers' names; empty while all is well. No secret is in it.

        For a page that people look at. Not for a readiness probe: an app whose broker is away still takes orders, and
        taking it out of service would stop them too.
        """
        found: dict[str, str] = {}
        if self.relay is not None and self.relay.error is not None:
            found["relay"] = f"has died: {self.relay.error}"
        for consumer in self.consumers:
            state = consumer.state
            if state.error is not None:
                found[consumer.name] = f"has died: {state.error}"
            elif wrong := [text for text in (state.database, state.broker) if text is not None]:
                found[consumer.name] = "; ".join(wrong)
        return found


def lifespan(
    relay: Relay | None = None,
    consumer: Consumer | Iterable[Consumer] | None = None,
    *,
    app_lifespan: Lifespan | None = None,
) -> Lifespan:
    """Run a relay, a consumer or several in the app's own process: ``FastAPI(lifespan=lifespan(relay, consumer))``.

    Fine for one process, and while there is little to send; with several workers each runs its own, which share the work.
    A process of its own (``outbox relay``) is not held up by a busy event loop.

    ``app_lifespan``: the app's own, entered first and left last, with its state. The other way round works too, in a
    lifespan of yours: ``async with lifespan(relay)(app): yield``.

    The app starts without a broker: nothing is lost meanwhile. Raised at the start are `ConfigurationError`,
    `SchemaMismatch` and, by a relay and after some seconds, `StoreUnavailable`. A relay or consumer that dies later never
    ends the app: it is logged as critical, and stays in ``app.state.outbox.trouble()``. At the shutdown what is in flight
    is finished.
    """
    consumers = () if consumer is None else (consumer,) if isinstance(consumer, Consumer) else tuple(consumer)

    @asynccontextmanager
    async def run(app: Any) -> AsyncIterator[Any]:
        async with AsyncExitStack() as stack:
            state = None if app_lifespan is None else await stack.enter_async_context(app_lifespan(app))
            app.state.outbox = Running(relay, consumers)
            # the relay is left last: it sends what the consumers' last handlers have added
            for part in (relay, *consumers):
                if part is not None:
                    await stack.enter_async_context(part)
            yield state

    return run


__all__ = ["Running", "lifespan"]
