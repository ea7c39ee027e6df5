"""Which argument of a handler gets what. Decided once, at registration; what cannot be served is said then."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from outbox import encoding
from outbox._message import Message, declaration
from outbox.consumer.annotations import Unresolved, resolve, role, strip, takes_none
from outbox.errors import ConfigurationError, DecodingError

SessionKind = Literal["sync", "async"]
_BY_NAME = {"session": "session", "message": "message"}


class Slot(NamedTuple):
    """One parameter: what it gets (``payload``, ``session``, ``message`` or ``provided``) and how it is passed."""

    name: str
    gets: str
    positional: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler:
    """A registered function. ``type`` None: whatever type of its topic has no handler of its own. ``into``: what the
    payload is decoded to. ``session``: the kind of session it asks for, if it does."""

    function: Callable[..., Any]
    name: str
    topic: str
    type: str | None
    is_async: bool
    into: Any
    optional: bool
    session: SessionKind | None
    slots: tuple[Slot, ...]

    @property
    def module(self) -> str | None:
        """Where it is defined: whose frames count as the user's code."""
        return getattr(inspect.unwrap(self.function), "__module__", None)

    def decode(self, message: Message, codec: encoding.Codec) -> Any:
        """The payload for the first argument. Raises `DecodingError`, also for a tombstone that it does not take."""
        if self.into is Message:
            return message
        if message.payload is None:
            if self.optional:
                return None
            wanted = getattr(self.into, "__name__", str(self.into))
            raise DecodingError(
                f"the message is a tombstone (no payload), and {self.name} takes a {wanted}; annotate "
                f"{self.slots[0].name}: {wanted} | None to have it"
            )
        if self.into is bytes:
            return message.payload
        return encoding.decode(message.payload, message.content_type, self.into, codec)

    def call(self, payload: Any, message: Message, session: Any, provide: Mapping[str, Any]) -> Any:
        """Call a sync handler, or make an async one's coroutine; whatever is provided is made first."""
        args, kwargs = self._arguments(payload, message, session)
        for slot in self.slots:
            if slot.gets == "provided":
                made = _made(provide[slot.name])
                args.append(made) if slot.positional else kwargs.__setitem__(slot.name, made)
        return self.function(*args, **kwargs)

    async def acall(self, payload: Any, message: Message, session: Any, provide: Mapping[str, Any]) -> Any:
        """Call an async handler; an async factory of ``provide`` is awaited."""
        args, kwargs = self._arguments(payload, message, session)
        for slot in self.slots:
            if slot.gets == "provided":
                made = _made(provide[slot.name])
                if isinstance(made, Awaitable):
                    made = await made
                args.append(made) if slot.positional else kwargs.__setitem__(slot.name, made)
        return await self.function(*args, **kwargs)
