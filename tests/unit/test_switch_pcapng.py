"""Captures: what is written is read by others, and whole blocks are found whatever pieces they come in."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.utils import PcapNgReader, RawPcapNgReader

from orchestrator.errors import ProtocolError
from orchestrator.switch import pcapng
from orchestrator.switch.pcapng import Block, Blocks, Statistics

HEAD = pcapng.section("orchestrator") + pcapng.interface("ot-00000001", "guest ann in network lan", 2000)
FRAME = bytes(range(14)) + bytes(46)

frames = st.lists(
    st.tuples(st.integers(0, 2**63), st.binary(min_size=14, max_size=200), st.integers(0, 5000), st.booleans())
)


@given(frames)
def test_what_is_written_is_read_by_scapy(written: list[tuple[int, bytes, int, bool]]) -> None:
    blocks = [pcapng.packet(when, data, len(data) + more, outbound=out) for when, data, more, out in written]
    end = pcapng.statistics(1, len(written), 0, "the tap has gone")

    reader = RawPcapNgReader(io.BytesIO(HEAD + b"".join(blocks) + end))

    found = [
        (meta.tshigh << 32 | meta.tslow, data, meta.wirelen - len(data), meta.direction == 2) for data, meta in reader
    ]
    assert found == written


def test_capture_tells_its_link_and_the_time_to_the_nanosecond() -> None:
    moment = 1_800_000_000_123_456_789
    raw = HEAD + pcapng.packet(moment, FRAME, len(FRAME), outbound=False)

    (packet,) = PcapNgReader(io.BytesIO(raw))
    (_, meta) = next(iter(RawPcapNgReader(io.BytesIO(raw))))

    assert int(packet.time * 10**9) == moment
    assert packet.sniffed_on == "ot-00000001"
    assert (meta.linktype, meta.tsresol, meta.direction) == (1, 10**9, 1)
    assert bytes(packet) == FRAME


@given(frames, st.lists(st.integers(1, 300), min_size=1))
def test_blocks_are_found_in_whatever_pieces_they_come(
    written: list[tuple[int, bytes, int, bool]], sizes: list[int]
) -> None:
    blocks = [pcapng.packet(when, data, len(data) + more, outbound=out) for when, data, more, out in written]
    raw = HEAD + b"".join(blocks) + pcapng.statistics(1, 7, 2, "stopped")

    reader, found, size = Blocks(), [], itertools.cycle(sizes)
    rest = raw
    while rest:
        step = next(size)
        found += reader.feed(rest[:step])
        rest = rest[step:]

    assert b"".join(block.raw for block in found) == raw
    assert [block.kind for block in found] == [
        pcapng.SECTION,
        pcapng.INTERFACE,
        *[pcapng.PACKET] * len(written),
        pcapng.STATISTICS,
    ]
    assert Statistics.of(found[-1]) == Statistics(7, 2, "stopped")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\6\0\0\0\xff\xff\xff\xff", "4294967295 bytes"),
        (b"\6\0\0\0\x08\0\0\0", "8 bytes"),
        (b"\6\0\0\0\x0d\0\0\0", "13 bytes"),
        (b"\6\0\0\0\x0c\0\0\0\x10\0\0\0", "two lengths"),
    ],
)
def test_block_of_impossible_length_is_refused_before_it_is_waited_for(raw: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        Blocks().feed(raw)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_do_no_harm(raw: bytes) -> None:
    try:
        assert sum(len(block.raw) for block in Blocks().feed(raw)) <= len(raw)
    except ProtocolError:
        pass


@given(st.binary(max_size=100))
def test_statistics_of_any_kind_do_no_harm(raw: bytes) -> None:
    try:
        Statistics.of(Block(pcapng.STATISTICS, bytes(20) + raw))
    except ProtocolError:
        pass
