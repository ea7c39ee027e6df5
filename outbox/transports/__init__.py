"""The transports: one file each, opened by URL. Further ones come by the entry point group ``outbox.transports``, whose
entries are named for their scheme and load to a function from the URL to a `Transport`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Final

from outbox.errors import ConfigurationError, MissingExtra
from outbox.transport import Transport
from outbox.transports._url import parse, redacted

__all__ = ["open_transport", "redacted"]

ENTRY_POINTS: Final = "outbox.transports"


def open_transport(url: str | Transport) -> Transport:
    """The transport of a URL; a `Transport` comes back as it is. Nothing is connected yet.

    ``kafka://host:9092,host:9092?…``, ``amqp://user:password@host/vhost?…``, ``sqs://region/?…``,
    ``local:///path/to/file.db``, ``local:file.db``, ``memory://name``, and whatever installed packages offer. Raises
    `ConfigurationError` for an unknown scheme or parameter, listing the known ones, and
    `MissingExtra` where the driver is not installed. No error holds a password.
    """
    if not isinstance(url, str):
        if callable(getattr(url, "publish", None)):
            return url
        raise ConfigurationError(
            f"a transport is a URL or an object with publish and subscribe, not {type(url).__name__}"
        )
    scheme = url.partition(":")[0].lower()
    builder = _BUILT_IN.get(scheme)
    if builder is not None:
        return builder(url)
    return _from_entry_point(scheme, url)


def _kafka(url: str) -> Transport:
    try:
        from outbox.transports.kafka import from_url
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "aiokafka":
            raise
        raise MissingExtra("kafka:// needs aiokafka, which is not installed: pip install 'pyoutbox[kafka]'") from error
    return from_url(parse(url))


def _rabbitmq(url: str) -> Transport:
    try:
        from outbox.transports.rabbitmq import from_url
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "pika":
            raise
        raise MissingExtra("amqp:// needs pika, which is not installed: pip install 'pyoutbox[rabbitmq]'") from error
    return from_url(parse(url))


def _sqs(url: str) -> Transport:
    try:
        from outbox.transports.sqs import from_url
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("aiobotocore", "botocore"):
            raise
        raise MissingExtra("sqs:// needs aiobotocore, which is not installed: pip install 'pyoutbox[sqs]'") from error
    return from_url(parse(url))


def _local(url: str) -> Transport:
    from outbox.transports.local import from_url

    return from_url(parse(url))


def _memory(url: str) -> Transport:
    from outbox.transports.memory import from_url

    return from_url(parse(url))


_BUILT_IN: Final[dict[str, Callable[[str], Transport]]] = {
    "amqp": _rabbitmq,
    "amqps": _rabbitmq,
    "kafka": _kafka,
    "local": _local,
    "memory": _memory,
    "sqs": _sqs,
}


def _from_entry_point(scheme: str, url: str) -> Transport:
    offered = {entry.name.lower(): entry for entry in entry_points(group=ENTRY_POINTS)}
    entry = offered.get(scheme)
    if entry is None:
        parse(url)  # what is no URL at all is told so
        raise ConfigurationError(f"{scheme}: there is no such transport; known are {_known(offered)}")
    try:
        build: Callable[[str], Transport] = entry.load()
    except ImportError as error:
        raise MissingExtra(f"{scheme}: the transport {entry.value} cannot be imported: {error}") from error
    return build(url)


def _known(offered: Iterable[str]) -> str:
    return ", ".join(sorted({*_BUILT_IN, *offered}))
