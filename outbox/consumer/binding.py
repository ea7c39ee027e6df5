"""Which argument of a handler gets what. Decided once, at registration; what cannot be served is said then."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from outbox import encoding
from outbox._message import Message, declaration
from outbox.consumer.annotations import Unresolved, plain_function, resolve, role, strip, takes_none
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
        return getattr(plain_function(self.function), "__module__", None)

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
        """Call a sync handler, or make an async one's coroutine; what is provided is made first."""
        made = {slot.name: _made(provide[slot.name]) for slot in self.slots if slot.gets == "provided"}
        return self._call(payload, message, session, made)

    async def acall(self, payload: Any, message: Message, session: Any, provide: Mapping[str, Any]) -> Any:
        """Call an async handler; what an async factory of ``provide`` makes is awaited."""
        made = {slot.name: _made(provide[slot.name]) for slot in self.slots if slot.gets == "provided"}
        for name, value in made.items():
            if inspect.isawaitable(value):
                made[name] = await value
        return await self._call(payload, message, session, made)

    def _call(self, payload: Any, message: Message, session: Any, made: Mapping[str, Any]) -> Any:
        values = {"payload": payload, "message": message, "session": session}
        args, kwargs = [], {}
        for slot in self.slots:
            value = made[slot.name] if slot.gets == "provided" else values[slot.gets]
            if slot.positional:
                args.append(value)
            else:
                kwargs[slot.name] = value
        return self.function(*args, **kwargs)


def _made(provided: Any) -> Any:
    return provided() if callable(provided) else provided


def bind(
    function: Callable[..., Any],
    *,
    consumer: str,
    topic: str,
    type: str | None,
    declared: Any,
    provide: Mapping[str, Any],
    local: Mapping[str, Any],
) -> Handler:
    """Look at a handler's signature. ``declared`` is the message class it was registered for, or None; ``local`` are the
    names of the place where that happened.

    Raises `ConfigurationError` naming the handler and the argument, and `Unresolved` for an annotation of the payload
    that names nothing (yet: a class may follow further down in the module).
    """
    name = handler_name(function)
    whose = f"consumer {consumer!r}, handler {name}"
    is_async = is_coroutine_function(function)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(f"{whose} is a generator; it must be a function, or an async function, that returns")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{whose} is no function whose arguments can be seen: {error}") from error
    parameters = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not parameters:
        raise ConfigurationError(f"{whose} takes no argument; its first one is the payload")
    first = parameters[0]
    into, optional = _payload(first, function, whose, declared, local)
    slots = [Slot(first.name, "payload", first.kind is not first.KEYWORD_ONLY)]
    session: SessionKind | None = None
    for parameter in parameters[1:]:
        gets, kind = _serve(parameter, function, whose, is_async, provide, local)
        if gets is None:
            continue
        session = kind or session
        # by name, so that a parameter before it can keep its default
        positional = parameter.kind is parameter.POSITIONAL_ONLY
        slots.append(Slot(parameter.name, gets, positional))
    return Handler(
        function=function,
        name=name,
        topic=topic,
        type=type,
        is_async=is_async,
        into=into,
        optional=optional,
        session=session,
        slots=tuple(slots),
    )


def _payload(
    parameter: inspect.Parameter,
    function: Callable[..., Any],
    whose: str,
    declared: Any,
    local: Mapping[str, Any],
) -> tuple[Any, bool]:
    """What the first argument is decoded to, and whether it takes None."""
    if parameter.annotation is parameter.empty:
        return (Any, True) if declared is None else (declared, False)
    into = _annotation(parameter, function, local, declared)
    if role(into) in ("sync", "async"):
        raise ConfigurationError(
            f"{whose}: its first argument, {parameter.name!r}, is annotated as a session; the first one is the payload"
        )
    plain = strip(into)
    other = declaration(plain)
    if declared is not None and other is not None and plain is not declared:
        raise ConfigurationError(
            f"{whose}: argument {parameter.name!r} is a {plain.__name__} (type {other.type!r}), but it is registered for "
            f"{declared.__name__}"
        )
    if hasattr(plain, "model_validate_json") or plain in (Message, bytes):
        return plain, takes_none(into)  # their own decoding knows no "| None"
    return into, takes_none(into)


def _annotation(
    parameter: inspect.Parameter, function: Callable[..., Any], local: Mapping[str, Any], declared: Any
) -> Any:
    try:
        return resolve(parameter.annotation, function, local)
    except Unresolved:
        # written for a class that was imported under TYPE_CHECKING, which the decorator names anyway
        last = str(parameter.annotation).rpartition(".")[2]
        if declared is not None and last == declared.__name__:
            return declared
        if role(parameter.annotation) == "message":
            return Message
        raise


def _serve(
    parameter: inspect.Parameter,
    function: Callable[..., Any],
    whose: str,
    is_async: bool,
    provide: Mapping[str, Any],
    local: Mapping[str, Any],
) -> tuple[str | None, SessionKind | None]:
    """What an argument after the first gets: by annotation, by name, from ``provide``, or its default (None)."""
    try:
        annotation = resolve(parameter.annotation, function, local)
    except Unresolved:
        annotation = parameter.annotation  # the word alone may tell
    wanted = role(annotation)
    by_name = None if wanted or parameter.annotation is not parameter.empty else _BY_NAME.get(parameter.name)
    if wanted == "message" or by_name == "message":
        return "message", None
    if wanted in ("sync", "async") or by_name == "session":
        kind: SessionKind = "async" if wanted == "async" or (wanted is None and is_async) else "sync"
        if kind == "async" and not is_async:
            raise ConfigurationError(
                f"{whose}: argument {parameter.name!r} is an AsyncSession, but the handler is sync: "
                "write async def, or take a Session"
            )
        if kind == "sync" and is_async:
            raise ConfigurationError(
                f"{whose}: argument {parameter.name!r} is a Session, which would block the event loop: "
                "take an AsyncSession, or write def instead of async def"
            )
        return "session", kind
    if parameter.name in provide:
        if is_coroutine_function(provide[parameter.name]) and not is_async:
            raise ConfigurationError(
                f"{whose}: argument {parameter.name!r} is provided by an async function, but the handler is sync"
            )
        return "provided", None
    if parameter.default is not parameter.empty:
        return None, None
    known = ", ".join(sorted(provide)) or "nothing"
    raise ConfigurationError(
        f"{whose}: nothing is known for argument {parameter.name!r}; annotate it with Session, AsyncSession or Message, "
        f"or give Consumer(provide={{{parameter.name!r}: …}}) (provided now: {known})"
    )


def is_coroutine_function(function: Any) -> bool:
    """Also for a partial, a decorated function and an object with ``async def __call__``."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(plain_function(function))


def handler_name(function: Callable[..., Any]) -> str:
    """As errors show it."""
    plain = plain_function(function)
    return getattr(plain, "__qualname__", None) or type(plain).__name__
