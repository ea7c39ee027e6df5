"""Payloads to bytes and back. JSON by msgspec, unless the bytes come ready-made or the user brings a codec."""

from __future__ import annotations

import math
import uuid
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from outbox.errors import DecodingError, EncodingError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

JSON: Final = "application/json"
BYTES: Final = "application/octet-stream"


@runtime_checkable
class Codec(Protocol):
    """Turns payloads into bytes and back. Give one to ``Outbox(codec=…)`` for Avro, Protobuf or JSON rules of your own."""

    def encode(self, payload: Any, topic: str) -> tuple[bytes, str]:
        """The bytes and their content type. Raise anything to refuse: the transaction's owner sees `EncodingError`."""
        ...

    def decode(self, payload: bytes, content_type: str | None, into: Any) -> Any:
        """The payload as ``into`` (an annotation). Raise anything to refuse: the message becomes a dead letter."""
        ...


class JsonCodec:
    """JSON as this library promises it: ``datetime`` ISO 8601, ``Decimal`` and ``UUID`` as strings, ``Enum`` by value,
    ``bytes`` base64, dataclasses, attrs and msgspec objects by their fields, pydantic models by pydantic's own rules and
    under their aliases, so that what is written can be read back. NaN and infinities, which JSON does not have, are
    refused (in a pydantic model they are ``null``). Read as no type in particular, ``application/octet-stream`` is
    bytes, and ``text/…`` is str, as it is read as str.
    """

    def encode(self, payload: Any, topic: str) -> tuple[bytes, str]:
        encode = _encode or _load()
        data = encode(payload)
        if b"null" in data:  # which is also what msgspec writes for NaN
            _refuse_what_is_not_finite(payload)
        return data, JSON

    def decode(self, payload: bytes, content_type: str | None, into: Any) -> Any:
        import msgspec

        if into is bytes:
            return payload
        if content_type is not None and content_type != JSON:
            kind, free = content_type.partition(";")[0].strip().lower(), into is Any or into is None or into is object
            if free and kind == BYTES:
                return payload
            if (free or into is str or into == str | None) and _is_text(kind) and kind != "text/json":
                return payload.decode(_charset(content_type))
        model = into if isinstance(into, type) else None
        if model is not None and hasattr(model, "model_validate_json"):
            return model.model_validate_json(payload)
        if into is Any or into is None:
            return msgspec.json.decode(payload)
        return msgspec.json.decode(payload, type=into, strict=True)


_encode: Callable[[Any], bytes] | None = None


def _load() -> Callable[[Any], bytes]:
    global _encode
    import msgspec

    _encode = msgspec.json.Encoder(enc_hook=_foreign).encode
    return _encode


def _refuse_what_is_not_finite(payload: Any) -> None:
    import msgspec

    def foreign(value: Any) -> Any:
        # pydantic has rules of its own for these numbers, and Raw is JSON already
        return None if hasattr(value, "model_dump") or isinstance(value, msgspec.Raw) else _foreign(value)

    waiting = [msgspec.to_builtins(payload, enc_hook=foreign)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, float):
            if not math.isfinite(value):
                raise TypeError("it holds NaN or an infinity, which JSON does not have; give None, or text")
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value


def _foreign(value: Any) -> Any:
    """What msgspec does not know: pydantic models, and classes of other libraries that subclass a plain type."""
    dump = getattr(value, "model_dump", None)
    if dump is not None and not isinstance(value, type):
        try:
            return dump(mode="json", by_alias=True)
        except Exception as error:
            # what the user's serializers raise can quote the payload
            raise TypeError(f"{type(value).__name__}.model_dump raised {type(error).__name__}") from error
    if isinstance(value, str):
        return str.__str__(value)
    plain: Any
    for plain in (int, float, dict, list):
        if isinstance(value, plain):
            return plain(value)
    raise TypeError(f"objects of type {type(value).__name__} have no JSON form")


DEFAULT: Final = JsonCodec()


def encode(payload: Any, topic: str, content_type: str | None, codec: Codec) -> tuple[bytes | None, str | None]:
    """(bytes, content type) of a payload. ``bytes`` go as they are, and so does a str that is said to be ``text/…``; None
    is a tombstone. Raises `EncodingError`."""
    if payload is None:
        return None, content_type
    if isinstance(payload, (bytes, bytearray, memoryview)):
        return bytes(payload), content_type or BYTES
    if content_type and isinstance(payload, str) and isinstance(codec, JsonCodec) and _is_text(content_type):
        return _as_text(payload, topic, content_type), content_type
    try:
        data, natural = codec.encode(payload, topic)
    except Exception as error:
        # The text of an error can quote the payload: only texts that are known not to (ours, msgspec's) are shown.
        known = codec is DEFAULT and isinstance(error, (TypeError, OverflowError, RecursionError))
        raise _refused(payload, topic, str(error) if known else type(error).__name__) from error
    if not isinstance(data, bytes) or not isinstance(natural, str):
        raise _refused(payload, topic, f"{type(codec).__name__}.encode must return (bytes, content type)")
    return data, content_type or natural


def _as_text(text: str, topic: str, content_type: str) -> bytes:
    try:
        return text.encode(_charset(content_type))
    except (LookupError, UnicodeError) as error:
        raise _refused(text, topic, f"it is no text in the charset of {content_type!r}") from error


def _is_text(content_type: str) -> bool:
    return content_type[:5].lower() == "text/"


def _charset(content_type: str) -> str:
    for parameter in content_type.split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            return value.strip(' "') or "utf-8"
    return "utf-8"


def _refused(payload: object, topic: str, why: str) -> EncodingError:
    return EncodingError(
        f"message for {topic!r}: the payload (a {type(payload).__name__}) cannot be encoded: {why}. "
        "Nothing was added to the transaction."
    )


def decode(payload: bytes | None, content_type: str | None, into: Any, codec: Codec) -> Any:
    """A payload as the type ``into``; a tombstone is None. Raises `DecodingError`, which says which field is wrong."""
    if payload is None:
        return None
    try:
        return codec.decode(payload, content_type, into)
    except Exception as error:
        name = getattr(into, "__name__", str(into))
        raise DecodingError(f"the payload is no {name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def dump_headers(headers: Mapping[str, str]) -> str:
    """Headers as the text that is stored: a JSON object."""
    return (_encode or _load())(headers).decode()


def load_headers(text: str | None) -> dict[str, str]:
    """Stored headers. Raises `DecodingError` for anything but a JSON object of text (a row written by hand)."""
    if not text:
        return {}
    import msgspec

    try:
        return msgspec.json.decode(text, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeError) as error:
        raise DecodingError(f"the headers are no JSON object of text: {_first_line(error)}") from error


def header_text(value: bytes) -> str | None:
    """A header value as text, or None where it is not UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def parse_uuid(text: str | None) -> uuid.UUID | None:
    """The UUID in a header, or None."""
    if text is None:
        return None
    try:
        return uuid.UUID(text)
    except ValueError:
        return None
