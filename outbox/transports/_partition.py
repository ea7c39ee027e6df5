"""Which partition a key belongs to: the rule of Kafka's Java client, so that every producer of a topic agrees."""

from __future__ import annotations

from typing import Final

_CACHED: Final = 100_000
"""Keys whose hash is remembered, about 15 MB at the worst. When it is full all are forgotten: cheaper than keeping track
of their age on every message, and 100,000 hashes of pure Python take half a second once."""


def murmur2(data: bytes) -> int:
    """MurmurHash2, 32 bit, as in Kafka's ``Utils.murmur2`` (seed 0x9747b28c), unsigned."""
    length = len(data)
    h = 0x9747B28C ^ length
    whole = length & ~3
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * 0x5BD1E995 & 0xFFFFFFFF
        k ^= k >> 24
        h = (h * 0x5BD1E995 & 0xFFFFFFFF) ^ (k * 0x5BD1E995 & 0xFFFFFFFF)
    if whole != length:
        h = (h ^ int.from_bytes(data[whole:], "little")) * 0x5BD1E995 & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0x5BD1E995 & 0xFFFFFFFF
    return h ^ (h >> 15)


class KeyHashes(dict[str, int]):
    """``hashes[key] % partitions`` is the key's partition. Hashes are remembered, not partitions: a topic that grows
    makes nothing here wrong. `bound` is to be called now and then, once a batch."""

    def __missing__(self, key: str) -> int:
        value = self[key] = murmur2(key.encode()) & 0x7FFFFFFF
        return value

    def bound(self) -> None:
        if len(self) > _CACHED:
            self.clear()
