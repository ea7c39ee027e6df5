"""The handlers of one consumer, by topic and type."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from outbox import encoding
from outbox._message import Message, check_topic, check_type, declaration
from outbox.consumer.annotations import Unresolved, strip
from outbox.consumer.binding import Handler, bind, handler_name
from outbox.errors import ConfigurationError, EncodingError

Unknown = Literal["dead", "ignore"]

_NOT_DECODED: Final = (Any, object, bytes, Message)


@dataclass(slots=True)
class _Registered:
    function: Callable[..., Any]
    topic: str
    type: str | None
    declared: Any
    local: Mapping[str, Any]
    handler: Handler | None = None


class Handlers:
    """``codec`` is the outbox's; with the default one, payload types it can never read are refused at the start.
    ``unknown``: what becomes of messages without a handler."""

    def __init__(
        self, consumer: str, provide: Mapping[str, Any], codec: encoding.Codec, unknown: Unknown = "dead"
    ) -> None:
        self.consumer = consumer
        self.provide = provide
        self.unknown = unknown
        self._codec = codec
        self._registered: dict[tuple[str, str | None], _Registered] = {}

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(sorted({topic for topic, _ in self._registered}))

    def add(self, function: Callable[..., Any], what: object, type: str | None, local: Mapping[str, Any]) -> None:
        """Register a handler for a declared class or a topic. Raises `ConfigurationError`; nothing is registered then."""
        if not callable(function):
            raise ConfigurationError(f"consumer {self.consumer!r}: {function!r} is no function")
        topic, type, declared = self.subject(what, type)
        known = self._registered.get((topic, type))
        if known is not None:
            raise ConfigurationError(
                f"consumer {self.consumer!r}: {handler_name(known.function)} and {handler_name(function)} are both for "
                f"{'type ' + repr(type) if type else 'any other type'} of topic {topic!r}; one message has one handler "
                "(effects that are independent of each other belong to consumers of different names)"
            )
        registered = _Registered(function, topic, type, declared, local)
        try:
            self._bind(registered)
        except Unresolved:
            pass  # a class that follows further down in the module: bound at the start, or said then
        else:
            registered.local = {}  # not needed any more, and it would keep a whole frame's objects alive
        self._registered[topic, type] = registered

    def find(self, topic: str, type: str | None) -> Handler | None:
        """The handler of a message: that of its type, else that of its topic's other types. Raises `ConfigurationError`
        for one whose annotations name nothing."""
        registered = self._registered.get((topic, type)) or self._registered.get((topic, None))
        return None if registered is None else self._bind(registered)

    def check(self) -> list[Handler]:
        """All handlers. Raises `ConfigurationError` for what can never work: no handler, an annotation that names nothing,
        a payload type that JSON cannot be read as."""
        if not self._registered:
            raise ConfigurationError(
                f"consumer {self.consumer!r} has no handler: decorate one with @{self._name}.on(…), and import its module"
            )
        handlers = [self._bind(registered) for registered in self._registered.values()]
        if self._codec is encoding.DEFAULT:
            for handler in handlers:
                self._check_payload(handler)
        return handlers

    def _bind(self, registered: _Registered) -> Handler:
        if registered.handler is None:
            try:
                registered.handler = bind(
                    registered.function,
                    consumer=self.consumer,
                    topic=registered.topic,
                    type=registered.type,
                    declared=registered.declared,
                    provide=self.provide,
                    local=registered.local,
                )
            except Unresolved as error:
                raise _UnresolvedArgument(
                    f"consumer {self.consumer!r}, handler {handler_name(registered.function)}: the annotation of its "
                    f"first argument cannot be resolved: {error}"
                ) from error
        return registered.handler

    def missing(self, message: Message) -> ConfigurationError:
        """What is said of a message without a handler."""
        what, more = "messages of ", ""
        if message.type is not None:
            what, more = "", f"a handler with @{self._name}.on({message.topic!r}, type={message.type!r}), "
        return ConfigurationError(
            f"consumer {self.consumer!r} has no handler for {what}{self.kind(message)}: add {more}a handler for all "
            f"that have none of their own with @{self._name}.on({message.topic!r}), or have them ignored with "
            f"Consumer({self.consumer!r}, …, unknown='ignore'). It has handlers for topics {list(self.topics)}"
        )

    @staticmethod
    def kind(message: Message) -> str:
        """The messages of which this is one, as the log shows them."""
        if message.type is None:
            return f"topic {message.topic!r} without a type"
        return f"type {message.type!r} of topic {message.topic!r}"

    @property
    def _name(self) -> str:
        """What the consumer is called in the user's module, most likely."""
        return self.consumer if self.consumer.isidentifier() else "consumer"

    def subject(self, what: object, type: str | None) -> tuple[str, str | None, Any]:
        """(topic, type, declared class) of what stands in ``on(…)``. Raises `ConfigurationError`."""
        if what is None or (callable(what) and not isinstance(what, builtins.type)):
            # @consumer.on without parentheses, where the function itself stands, or with empty ones
            whose, shown = "", "()" if type is None else f"(type={type!r})"
            if what is not None:
                whose, shown = f", handler {handler_name(what)}", ""
            raise ConfigurationError(
                f"consumer {self.consumer!r}{whose}: @{self._name}.on{shown} needs what it handles: write "
                f'@{self._name}.on(OrderPlaced) for a declared class, @{self._name}.on("orders", type="order.placed") for a '
                f'topic and type, or @{self._name}.on("orders") for a topic'
            )
        try:
            if isinstance(what, str):
                topic = check_topic(what)
                return topic, check_type(type, topic), None
        except EncodingError as error:
            raise ConfigurationError(f"consumer {self.consumer!r}: on({what!r}, type={type!r}): {error}") from None
        declared = declaration(what)
        if declared is None:
            shown = getattr(what, "__name__", repr(what))
            raise ConfigurationError(
                f"consumer {self.consumer!r}: on({shown}): it takes a topic, or a class declared with @event(topic, type=…)"
            )
        if type is not None:
            raise ConfigurationError(
                f"consumer {self.consumer!r}: on({getattr(what, '__name__', what)}, type={type!r}): the type comes from "
                "its declaration"
            )
        return declared.topic, declared.type, what

    def _check_payload(self, handler: Handler) -> None:
        plain = strip(handler.into)
        if plain in _NOT_DECODED or hasattr(plain, "model_validate_json"):
            return
        import msgspec

        try:
            foreign = isinstance(msgspec.inspect.type_info(handler.into), msgspec.inspect.CustomType)
        except Exception as error:
            raise ConfigurationError(
                f"consumer {self.consumer!r}, handler {handler.name}: JSON cannot be read as its first argument's "
                f"{getattr(plain, '__name__', plain)}: {error}"
            ) from error
        if foreign:
            raise ConfigurationError(
                f"consumer {self.consumer!r}, handler {handler.name}: its first argument is a {plain.__name__}, which "
                "JSON cannot be read as; use a dataclass, pydantic, attrs or msgspec class, a dict, bytes or Message"
            )


class _UnresolvedArgument(ConfigurationError, Unresolved):
    pass
