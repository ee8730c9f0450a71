"""Captured frames as pcapng: what Wireshark, tcpdump and their like read.

A capture is one section with one interface: a section header, the interface, a block for each frame, and at the end
the interface's statistics with the reason of the end as their comment. Everything is little-endian.

Source: draft-ietf-opsawg-pcapng (the numbers of blocks and options, and their layout).
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.errors import ProtocolError

SECTION, INTERFACE, STATISTICS, PACKET = 0x0A0D0D0A, 1, 5, 6
MAX_SNAP = 262144
"""Bytes of a frame that are kept; the largest that Wireshark takes."""
MAX_BLOCK = MAX_SNAP + 4096

_MAGIC = 0x1A2B3C4D
_UNKNOWN_LENGTH = -1
_ETHERNET = 1
_INBOUND, _OUTBOUND = 1, 2
_END, _COMMENT = 0, 1
_APPLICATION = 4  # of a section
_NAME, _DESCRIPTION, _RESOLUTION = 2, 3, 9  # of an interface
_FLAGS = 2  # of a packet
_RECEIVED, _DROPPED = 4, 5  # of statistics
_NANOSECONDS = 9  # 10 to the power of -9 seconds

_FRAME = struct.Struct("<IIIII")  # of a packet: interface, time (high, low), bytes kept, bytes that there were
_HEAD = struct.Struct("<II")


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + _padded(value)


def _text(code: int, text: str) -> bytes:
    return _option(code, text.encode()[:1024]) if text else b""


def _block(kind: int, body: bytes, options: bytes) -> bytes:
    if options:
        body += options + _option(_END, b"")
    length = 12 + len(body)
    return _HEAD.pack(kind, length) + body + struct.pack("<I", length)


def _moment(nanoseconds: int) -> bytes:
    return struct.pack("<II", nanoseconds >> 32 & 0xFFFFFFFF, nanoseconds & 0xFFFFFFFF)


def section(application: str) -> bytes:
    """The block that a file begins with."""
    return _block(SECTION, struct.pack("<IHHq", _MAGIC, 1, 0, _UNKNOWN_LENGTH), _text(_APPLICATION, application))


def interface(name: str, description: str, snap: int) -> bytes:
    """The link that frames are captured at: Ethernet, times in nanoseconds.

    :param snap: bytes of a frame that are kept at most.
    """
    options = _text(_NAME, name) + _text(_DESCRIPTION, description) + _option(_RESOLUTION, bytes([_NANOSECONDS]))
    return _block(INTERFACE, struct.pack("<HHI", _ETHERNET, 0, snap), options)


def packet(nanoseconds: int, data: bytes, size: int, *, outbound: bool) -> bytes:
    """A frame.

    :param nanoseconds: since 1970.
    :param size: bytes that it had, of which ``data`` are the first.
    :param outbound: it leaves by the link; else it has come in there.
    """
    head = struct.pack("<I", 0) + _moment(nanoseconds) + struct.pack("<II", len(data), size)
    flags = _option(_FLAGS, struct.pack("<I", _OUTBOUND if outbound else _INBOUND))
    return _block(PACKET, head + _padded(data), flags)


def statistics(nanoseconds: int, received: int, dropped: int, comment: str) -> bytes:
    """How the capture went.

    :param received: frames that came, those among them that were ``dropped`` for want of room too.
    """
    counters = _option(_RECEIVED, struct.pack("<Q", received)) + _option(_DROPPED, struct.pack("<Q", dropped))
    return _block(STATISTICS, struct.pack("<I", 0) + _moment(nanoseconds), _text(_COMMENT, comment) + counters)


# -- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block as it came.

    :ivar raw: all of it.
    """

    kind: int
    raw: bytes

    @property
    def body(self) -> bytes:
        return self.raw[8:-4]


@dataclass(frozen=True)
class Statistics:
    """What :func:`statistics` says."""

    received: int
    dropped: int
    comment: str

    @classmethod
    def of(cls, block: Block) -> Statistics:
        """:raise ProtocolError: it says no such thing."""
        found = dict(_options(block.body[12:]))
        try:
            received, dropped = (struct.unpack("<Q", found[code])[0] for code in (_RECEIVED, _DROPPED))
        except (KeyError, struct.error) as error:
            raise ProtocolError("a capture ends without its statistics") from error
        return cls(received, dropped, found.get(_COMMENT, b"").decode(errors="replace"))


def _options(raw: bytes) -> Iterator[tuple[int, bytes]]:
    while len(raw) >= 4:
        code, length = struct.unpack_from("<HH", raw)
        if code == _END:
            return
        yield code, raw[4 : 4 + length]
        raw = raw[4 + length + -length % 4 :]


class Blocks:
    """Whole blocks out of bytes as they come."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Block]:
        """The blocks that are complete with ``data``.

        :raise ProtocolError: a block is longer than any of ours, or its lengths contradict each other.
        """
        raw = self._rest + data
        at, found = 0, []
        while len(raw) - at >= _HEAD.size:
            kind, length = _HEAD.unpack_from(raw, at)
            if length % 4 or not 12 <= length <= MAX_BLOCK:
                raise ProtocolError(f"a capture with a block of {length} bytes")
            if len(raw) - at < length:
                break
            if struct.unpack_from("<I", raw, at + length - 4)[0] != length:
                raise ProtocolError("a capture with a block of two lengths")
            found.append(Block(kind, raw[at : at + length]))
            at += length
        self._rest = raw[at:]
        return found
