"""The partition of a key: what Kafka's Java client says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outbox.transports._partition import KeyHashes, murmur2


def test_murmur2_agrees_with_java() -> None:
    # from org.apache.kafka.common.utils.UtilsTest, there as signed ints
    known = {
        b"21": -973932308,
        b"foobar": -790332482,
        b"a-little-bit-long-string": -985981536,
        b"a-little-bit-longer-string": -1486304829,
        b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
        b"abc": 479470107,
    }
    assert {data: murmur2(data) for data in known} == {data: value & 0xFFFFFFFF for data, value in known.items()}


@given(st.binary(max_size=64))
def test_murmur2_agrees_with_aiokafka(data: bytes) -> None:
    from aiokafka.partitioner import murmur2 as theirs

    assert murmur2(data) == theirs(data) & 0xFFFFFFFF


def test_hashes_are_remembered_and_bounded() -> None:
    hashes = KeyHashes()
    first = hashes["ü"]
    assert first == murmur2("ü".encode()) & 0x7FFFFFFF
    assert hashes == {"ü": first}
    hashes.update({str(number): 0 for number in range(100_001)})
    hashes.bound()
    assert hashes == {}
    assert hashes["ü"] == first
