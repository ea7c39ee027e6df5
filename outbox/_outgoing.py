"""A stored message on its way to the broker."""

from __future__ import annotations

import msgspec


class Outgoing(msgspec.Struct, frozen=True, gc=False):
    """A stored message on the relay's hot path, in the order of the columns that stores select. Nothing is decoded:
    ``id`` is text, ``headers`` a JSON object as text or None. A changed copy: `msgspec.structs.replace`.

    ``gc=False``: it holds nothing but text, bytes and numbers, and thousands are in memory at a time. As named tuples, which
    the garbage collector looks at again and again, they took four times as long to make."""

    position: int
    id: str
    topic: str
    key: str | None
    type: str | None
    payload: bytes | None
    content_type: str | None
    headers: str | None
    bucket: int
