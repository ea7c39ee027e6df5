"""A connection to RabbitMQ and its channels, as coroutines; pika's errors become ours here, with their true cause."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any, Final

import pika
from pika import exceptions, frame, spec
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.channel import Channel as PikaChannel

from outbox.errors import ConfigurationError, OutboxError, Unavailable
from outbox.transports._rabbitmq_settings import Settings

ACCESS_REFUSED: Final = 403
NOT_FOUND: Final = 404
PRECONDITION_FAILED: Final = 406
COMMAND_INVALID: Final = 503

FRAME_MAX: Final = 131_072
"""Bytes of a frame, as brokers offer it; a message's headers must fit into one."""
ERRORS: Final = (exceptions.AMQPError, OSError, TimeoutError)
"""What talking to the broker raises."""
CLOSE: Final = 2.0
"""Seconds for an orderly good-bye."""

_LINGER_NOT: Final = struct.pack("ii", 1, 0)
_FRAME: Final = struct.Struct(">BHL")
_DELIVER: Final = struct.pack(">I", spec.Basic.Deliver.INDEX)
_PROTOCOL_HEADER: Final = ord("A")


class Connection(AsyncioConnection):  # type: ignore[misc]  # pika has no types
    """pika's connection, which writes once for each turn of the loop, not three times a message, and copies what it has
    received once, not once a frame. A frame larger than was agreed on ends it."""

    def __init__(self, *args: Any, **named: Any) -> None:
        self._unwritten: list[bytes] = []
        self._frame_buffer = b""
        self._hung_up = False
        super().__init__(*args, **named)

    def _adapter_emit_data(self, data: bytes) -> None:
        if not self._unwritten:
            self.ioloop.call_soon(self._write)
        self._unwritten.append(data)

    def _write(self) -> None:
        data, self._unwritten = self._unwritten, []
        if data and self._transport is not None:
            self._transport.write(b"".join(data))

    def _on_data_available(self, data: bytes) -> None:
        buffer = self._frame_buffer + data if self._frame_buffer else data
        at, size = 0, len(buffer)
        if buffer[0] == _PROTOCOL_HEADER:  # the broker speaks another version, and says so before it hangs up
            super()._on_data_available(data)
            return
        while size - at >= 7:
            kind, number, length = _FRAME.unpack_from(buffer, at)
            if length > FRAME_MAX:
                raise exceptions.InvalidFrameError(f"a frame of {length} bytes")
            end = at + length + 8
            if end > size:
                break
            _, found = frame.decode_frame(buffer[at:end])
            self.bytes_received += length + 8
            channel = self._channels.get(number)
            if channel is not None and (kind != spec.FRAME_METHOD or buffer.startswith(_DELIVER, at + 7)):
                channel._handle_content_frame(found)  # to which nobody listens but its channel
            else:
                self._process_frame(found)
            at = end
        self._frame_buffer = buffer[at:]

    def hang_up(self) -> None:
        """At once, and without what is not sent yet: pika's `close` lets the kernel go on sending that."""
        self._unwritten.clear()
        sock = getattr(self._transport, "_sock", None)
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        if not self.is_closed and not self._hung_up:
            self._hung_up = True
            self._terminate_stream(exceptions.StreamLostError("given up from this side"))


class Channel:
    """One of a link's channels. Whatever the broker holds against it ends it, and nothing else."""

    def __init__(self, pika_channel: PikaChannel, link: Link) -> None:
        self.pika = pika_channel
        self.link = link
        self.lost: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        """Done when it is closed, by whomever; its result is why."""
        self.on_lost: Callable[[BaseException], None] | None = None
        pika_channel.add_on_close_callback(self._closed)
        pika_channel.add_on_cancel_callback(self._cancelled)

    def _closed(self, _: object, reason: BaseException) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
            if self.on_lost is not None:
                self.on_lost(reason)

    def _cancelled(self, _: object) -> None:
        """The broker ends its consumer: the queue is deleted, or has lost its leader."""
        self._closed(self, exceptions.ConsumerCancelled())
        if self.pika.is_open:
            self.pika.close()

    @property
    def is_open(self) -> bool:
        return not self.lost.done()

    async def call(self, method: Callable[..., object], *args: Any, **named: Any) -> Any:
        """One of pika's methods that takes a callback; returns the broker's answer. Raises what ended the channel, and
        TimeoutError."""
        if self.lost.done():
            raise self.lost.result()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        method(*args, **named, callback=lambda found: None if answer.done() else answer.set_result(found))
        async with asyncio.timeout(self.link.settings.request_timeout):
            await asyncio.wait({answer, self.lost}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise self.lost.result()

    async def close(self) -> bool:
        """In the orderly way: the broker has seen all that was sent before. False where it does not answer."""
        if self.pika.is_open:
            # pika would cancel the consumers first, and a queue goes on with its next consumer as soon as one is cancelled:
            # what this one has not acknowledged would be given back behind what that one already got.
            self.pika._cancelled.update(self.pika._consumers)
            self.pika.close()
        if not self.lost.done():
            await asyncio.wait({self.lost}, timeout=CLOSE)
        return self.lost.done()


class Link:
    """One open connection."""

    def __init__(self, connection: Connection, settings: Settings, server: str) -> None:
        self.settings = settings
        self.server = server
        self.blocked: str | None = None
        """Why the broker takes no messages now, in its words (memory, disk)."""
        self.on_blocked: Callable[[], None] | None = None
        self.lost: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._connection = connection
        connection.add_on_close_callback(self._closed)
        connection.add_on_connection_blocked_callback(self._block)
        connection.add_on_connection_unblocked_callback(self._unblock)

    @property
    def is_open(self) -> bool:
        return not self.lost.done() and bool(self._connection.is_open)

    def _closed(self, _: object, reason: BaseException) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)

    def _block(self, _: object, found: Any) -> None:
        self.blocked = str(found.method.reason)
        if self.on_blocked is not None:
            self.on_blocked()

    def _unblock(self, _: object, __: object) -> None:
        self.blocked = None

    async def channel(self) -> Channel:
        """Raises pika's errors and TimeoutError."""
        opened: asyncio.Future[PikaChannel] = asyncio.get_running_loop().create_future()
        if self.lost.done():
            raise self.lost.result()
        found = self._connection.channel(
            on_open_callback=lambda channel: None if opened.done() else opened.set_result(channel)
        )
        channel = Channel(found, self)
        async with asyncio.timeout(self.settings.request_timeout):
            await asyncio.wait({opened, channel.lost}, return_when=asyncio.FIRST_COMPLETED)
        if channel.lost.done():
            raise channel.lost.result()
        return channel

    async def close(self) -> None:
        """In the orderly way, or after `CLOSE` seconds at once."""
        if not self.lost.done():
            if self._connection.is_open:
                self._connection.close()
            await asyncio.wait({self.lost}, timeout=CLOSE)
        await self.abort()

    async def abort(self) -> None:
        if not self.lost.done():
            self._connection.hang_up()
            await asyncio.wait({self.lost}, timeout=CLOSE)

    def hang_up(self) -> None:
        if not self.lost.done():
            self._connection.hang_up()


async def connect(settings: Settings, purpose: str) -> Link:
    """Connect to the first of the servers that answers. Raises `Unavailable`, which names each and why it cannot be
    used, or `ConfigurationError` where one answers and refuses us."""
    found = []
    for host, port in settings.servers:
        server = f"{host}:{port}"
        try:
            return Link(await _open(settings, host, port, purpose), settings, server)
        except (*ERRORS, AMQPConnectorException) as error:
            root = _root(error)
            refused = _refused(root, server, settings)
            if refused is not None:
                raise refused from error
            found.append(f"{server}: {_reason(root, settings)}")
    raise Unavailable(f"rabbitmq: cannot reach a broker ({'; '.join(found)})")


async def _open(settings: Settings, host: str, port: int, purpose: str) -> Connection:
    parameters = pika.ConnectionParameters(
        host,
        port,
        settings.vhost,
        pika.credentials.ExternalCredentials()
        if settings.external
        else pika.PlainCredentials(settings.username, settings.password),
        heartbeat=settings.heartbeat,
        socket_timeout=settings.request_timeout,
        stack_timeout=settings.request_timeout,
        connection_attempts=1,
        retry_delay=0,
        ssl_options=None if settings.ssl_context is None else pika.SSLOptions(settings.ssl_context, host),
        client_properties={"connection_name": f"{settings.client_id} {purpose}"},
    )
    opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: BaseException | None) -> None:
        if not opened.done():
            if error is None:
                opened.set_result(None)
            else:
                opened.set_exception(error)

    connection = Connection(
        parameters,
        on_open_callback=lambda _: done(None),
        on_open_error_callback=lambda _, error: done(error),
        custom_ioloop=asyncio.get_running_loop(),
    )
    try:
        async with asyncio.timeout(settings.request_timeout):
            await opened
    except BaseException:
        connection.hang_up()
        raise
    return connection


def _root(error: BaseException) -> BaseException:
    """What is at the bottom of pika's wrappings."""
    while True:
        wrapped = getattr(error, "exceptions", None) or [getattr(error, "exception", None), *error.args]
        inner = next((found for found in reversed(wrapped) if isinstance(found, BaseException)), None)
        if inner is None:
            return error
        error = inner


def _refused(error: BaseException, server: str, settings: Settings) -> ConfigurationError | None:
    """The error of ours where the broker answered, and trying again cannot help."""
    said = str(error)
    who = "the client's certificate" if settings.external else f"user {settings.username!r}"
    if isinstance(error, exceptions.ProbableAuthenticationError) and "ACCESS_REFUSED" in said:
        return ConfigurationError(
            f"rabbitmq: {server} refuses {who}: wrong user name or password"
            if not settings.external
            else f"rabbitmq: {server} refuses {who}: no user has its name"
        )
    if isinstance(error, exceptions.AuthenticationError):
        mechanism = "EXTERNAL (auth=external)" if settings.external else "PLAIN (a user name and a password)"
        return ConfigurationError(f"rabbitmq: {server} does not offer the login {mechanism}")
    if "NOT_ALLOWED" in said:
        if "not found" in said:
            return ConfigurationError(f"rabbitmq: {server} has no virtual host {settings.vhost!r}")
        if "refused" in said:
            return ConfigurationError(f"rabbitmq: {server}: {who} may not use virtual host {settings.vhost!r}")
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConfigurationError(
            f"rabbitmq: the certificate of {server} is not trusted ({error.verify_message}); "
            "give its authority as ssl_cafile"
        )
    return None


def _reason(error: BaseException, settings: Settings) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {settings.request_timeout:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused, nothing listens there"
    if isinstance(error, socket.gaierror):
        return "there is no such host"
    if isinstance(error, ssl.SSLError):
        if "WRONG_VERSION_NUMBER" in str(error) or "RECORD_LAYER" in str(error):
            return "what listens there does not speak TLS; should the URL begin with amqp://?"
        return f"TLS fails: {error.reason or error}; does it want a client certificate (ssl_certfile)?"
    if isinstance(error, exceptions.IncompatibleProtocolError) and settings.ssl_context is not None:
        return "hangs up once TLS is agreed on; does it want a client certificate (ssl_certfile)?"
    if isinstance(error, exceptions.IncompatibleProtocolError):
        return "what listens there does not speak AMQP 0-9-1, or wants TLS (amqps://)"
    if isinstance(error, exceptions.StreamLostError | ConnectionResetError):
        return f"hangs up ({error})"
    return str(error) or type(error).__name__


def code(error: BaseException) -> int | None:
    """The broker's reply code, where it gave one."""
    if isinstance(error, exceptions.ChannelClosed | exceptions.ConnectionClosed):
        return int(error.reply_code)
    return None


def text(error: BaseException) -> str:
    """What the broker said, or what happened to the connection."""
    if isinstance(error, exceptions.ChannelClosed | exceptions.ConnectionClosed):
        return str(error.reply_text)
    if isinstance(error, exceptions.ConsumerCancelled):
        return "the broker ended the consumer: its queue is deleted or has no leader"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, exceptions.AMQPHeartbeatTimeout):
        return "the broker was silent for too long"
    return str(error) or type(error).__name__


def unavailable(error: BaseException, what: str) -> OutboxError:
    """The error of ours for one of pika's."""
    if isinstance(error, OutboxError):
        return error
    mapped = Unavailable(f"rabbitmq: {what}: {text(error)}")
    mapped.__cause__ = error
    return mapped


Properties = spec.BasicProperties
