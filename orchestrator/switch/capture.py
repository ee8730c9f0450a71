"""The frames at a guest's tap, both ways, as a stream of pcapng.

What the guest sends is seen as it comes, before the switch looks at it; what it gets, after. The kernel keeps what
nobody has read yet, up to a limit, and counts what it has no room for: memory is bounded however slow the reader is.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator

from orchestrator import __version__
from orchestrator.errors import NetworkError, NotFoundError
from orchestrator.hosts.rpc import STEP_SECONDS, Stream
from orchestrator.switch import links, pcapng

WAITING_BYTES = 16 << 20
"""Room for frames that are not read yet; the kernel counts its own book-keeping too."""
BATCH_BYTES = 256 << 10

_ALL = 0x0003  # ETH_P_ALL
_OUTGOING = 4  # PACKET_OUTGOING of linux/if_packet.h, and the options of SOL_PACKET below
_SOL_PACKET, _STATISTICS, _AUXDATA = 263, 6, 8
_RCVBUFFORCE, _TIMESTAMPNS = 33, 35  # asm-generic/socket.h
_AUX = struct.Struct("=IIIHHHH")  # struct tpacket_auxdata
_HAS_VLAN = 1 << 4 | 1 << 6  # TP_STATUS_VLAN_VALID, TP_STATUS_VLAN_TPID_VALID
_TIMESPEC = struct.Struct("=qq")
_ANCILLARY = socket.CMSG_SPACE(_AUX.size) + socket.CMSG_SPACE(_TIMESPEC.size)


def find(uid: str, guest: str, tap: str) -> tuple[int, str]:
    """The tap's index, and what it is in words.

    :raise NotFoundError: the guest has no such tap on this host.
    """
    with links.netlink(f"tap of guest {guest}") as ip:
        for link, port, network in links.ports(uid, ip.get_links()):
            if link.get("ifname") == tap and port.partition("/")[0] == guest:
                return int(link["index"]), f"guest {guest} in network {network}"
    raise NotFoundError(f"guest {guest} has no tap {tap} on this host", hint="orchestrator up")


class Capture:
    """Frames of one link, from when this is made.

    :raise NetworkError: the kernel refuses.
    """

    def __init__(self, link: str, number: int, snap: int) -> None:
        """:param number: the link's index."""
        self._link, self._number, self._buffer = link, number, memoryview(bytearray(snap))
        self._received = self._dropped = 0
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # hears nothing before it is bound
        except OSError as error:
            raise NetworkError(f"frames of {link} cannot be captured: {error.strerror}") from error
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, WAITING_BYTES)
            self._socket.setsockopt(socket.SOL_SOCKET, _TIMESTAMPNS, 1)
            self._socket.setsockopt(_SOL_PACKET, _AUXDATA, 1)
            self._socket.setblocking(False)
            self._socket.bind((link, _ALL))
        except OSError as error:
            self._socket.close()
            raise NetworkError(f"frames of {link} cannot be captured: {error.strerror}") from error

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def is_there(self) -> bool:
        """The link has not gone, nor another one come in its place."""
        try:
            return socket.if_nametoindex(self._link) == self._number
        except OSError:
            return False

    def packets(self) -> Iterator[bytes]:
        """A block for each frame that waits."""
        while True:
            try:
                kept, ancillary, _, sender = self._socket.recvmsg_into([self._buffer], _ANCILLARY)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENETDOWN:
                    return
                raise
            yield self._block(bytes(self._buffer[:kept]), ancillary, outbound=sender[2] == _OUTGOING)

    def _block(self, data: bytes, ancillary: list[tuple[int, int, bytes]], *, outbound: bool) -> bytes:
        moment, size = time.time_ns(), len(data)
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, _TIMESTAMPNS) and len(raw) >= _TIMESPEC.size:
                seconds, nanoseconds = _TIMESPEC.unpack_from(raw)
                moment = seconds * 1_000_000_000 + nanoseconds
            elif (level, kind) == (_SOL_PACKET, _AUXDATA) and len(raw) >= _AUX.size:
                status, size, _, _, _, tag, kind_of_tag = _AUX.unpack_from(raw)
                if status & _HAS_VLAN == _HAS_VLAN:  # the kernel has taken it out of the frame
                    data, size = data[:12] + struct.pack(">HH", kind_of_tag, tag) + data[12:], size + 4
        return pcapng.packet(moment, data[: len(self._buffer)], size, outbound=outbound)

    def statistics(self) -> tuple[int, int]:
        """Frames that came, and those among them that there was no room for."""
        received, dropped = struct.unpack("=II", self._socket.getsockopt(_SOL_PACKET, _STATISTICS, 8))
        self._received += received  # the kernel counts from its last answer
        self._dropped += dropped
        return self._received, self._dropped


def run(stream: Stream, capture: Capture, head: bytes, *, count: int | None, seconds: float | None) -> None:
    """Send frames until the client says something or goes, or one of the limits is reached, or the link goes.

    :param head: the blocks that the capture begins with.
    """
    stream.sendall(head)
    poller = select.poll()
    poller.register(capture, select.POLLIN)
    poller.register(stream.fileno(), select.POLLIN | select.POLLHUP)
    end = None if seconds is None else time.monotonic() + seconds
    sent, why = 0, ""
    while not why:
        left = STEP_SECONDS if end is None else min(STEP_SECONDS, max(0, end - time.monotonic()))
        ready = {fd for fd, _ in poller.poll(left * 1000)}
        some = _send(stream, capture, None if count is None else count - sent)
        sent += some
        capture.statistics()  # before the kernel's counters, of 32 bits, begin anew
        if sent == count:
            why = "as many as were asked for"
        elif stream.fileno() in ready:
            stream.recv(1 << 16)
            why = "stopped"
        elif end is not None and time.monotonic() >= end:
            why = "the time is over"
        elif not some and not capture.is_there():
            why = "the tap has gone"
    received, dropped = capture.statistics()
    while sent != count and (some := _send(stream, capture, received - dropped - sent)):  # what waits still
        sent += some
    with contextlib.suppress(OSError):  # the client may have gone
        stream.sendall(pcapng.statistics(time.time_ns(), received, dropped, why))


def _send(stream: Stream, capture: Capture, most: int | None) -> int:
    """Send a batch of the frames that wait; how many.

    :param most: send no more than these.
    """
    batch, count = bytearray(), 0
    for block in capture.packets() if most is None or most > 0 else ():
        batch += block
        count += 1
        if count == most or len(batch) >= BATCH_BYTES:
            break
    if batch:
        stream.sendall(bytes(batch))
    return count


def serve(
    uid: str,
    open_stream: Callable[[], Stream],
    guest: str,
    tap: str,
    snap: int,
    *,
    count: int | None,
    seconds: float | None,
) -> None:
    """Capture at a tap of the lab ``uid``; see :func:`run`.

    :raise NotFoundError: the guest has no such tap on this host.
    :raise NetworkError: the kernel refuses.
    """
    number, what = find(uid, guest, tap)
    snap = max(1, min(snap, pcapng.MAX_SNAP))
    with contextlib.closing(Capture(tap, number, snap)) as capture:
        run(open_stream(), capture, head(tap, what, snap), count=count, seconds=seconds)


def head(tap: str, what: str, snap: int) -> bytes:
    """The blocks that a capture begins with."""
    return pcapng.section(f"orchestrator {__version__}") + pcapng.interface(tap, what, snap)
