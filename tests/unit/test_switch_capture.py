"""How a capture ends, and what it tells then; the frames come from nowhere."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from orchestrator.switch import capture, pcapng
from orchestrator.switch.pcapng import PACKET, STATISTICS, Block, Blocks, Statistics

FRAME = bytes(60)
HEAD = capture.head("ot-00000001", "guest ann in network lan", 2000)


class Frames:
    """Frames that wait at a link; a byte in a pipe is what wakes the reader."""

    def __init__(self, *sizes: int) -> None:
        self.waiting = list(sizes)
        self.there = True
        self.read, self.write = os.pipe()
        if sizes:
            os.write(self.write, b".")

    def fileno(self) -> int:
        return self.read

    def packets(self) -> Iterator[bytes]:
        while self.waiting:
            yield pcapng.packet(1, bytes(self.waiting.pop(0)), 60, outbound=False)
        os.set_blocking(self.read, False)
        try:
            os.read(self.read, 100)
        except BlockingIOError:
            pass

    def is_there(self) -> bool:
        return self.there

    def statistics(self) -> tuple[int, int]:
        return 9, 4

    def close(self) -> None:
        os.close(self.read)
        os.close(self.write)


def run(frames: Frames, **limits: float | None) -> tuple[socket.socket, threading.Thread]:
    ours, theirs = socket.socketpair()
    ours.settimeout(20)

    def serve() -> None:
        with theirs, contextlib.suppress(OSError):  # the client goes
            capture.run(theirs, frames, HEAD, **{"count": None, "seconds": None, **limits})  # type: ignore[arg-type]

    thread = threading.Thread(target=serve)
    thread.start()
    return ours, thread


def rest(stream: socket.socket, thread: threading.Thread) -> list[Block]:
    found, blocks = [], Blocks()
    while data := stream.recv(1 << 16):
        found += blocks.feed(data)
    thread.join()
    stream.close()
    return found


@pytest.fixture
def frames() -> Iterator[Frames]:
    made = Frames(*[60] * 5)
    yield made
    made.close()


def test_capture_ends_when_it_has_as_many_as_were_asked_for(frames: Frames) -> None:
    found = rest(*run(frames, count=3))

    assert b"".join(block.raw for block in found).startswith(HEAD)
    assert [block.kind for block in found[2:]] == [PACKET] * 3 + [STATISTICS]
    assert Statistics.of(found[-1]) == Statistics(9, 4, "as many as were asked for")


def test_capture_ends_when_the_client_says_something(frames: Frames) -> None:
    stream, thread = run(frames)
    stream.sendall(b".")

    found = rest(stream, thread)

    assert sum(block.kind == PACKET for block in found) == 5
    assert Statistics.of(found[-1]).comment == "stopped"


def test_capture_ends_when_its_time_is_over(frames: Frames) -> None:
    assert Statistics.of(rest(*run(frames, seconds=0.1))[-1]).comment == "the time is over"


def test_capture_ends_when_the_tap_goes(frames: Frames) -> None:
    frames.there = False

    found = rest(*run(frames))

    assert sum(block.kind == PACKET for block in found) == 5, "what has come before is not lost"
    assert Statistics.of(found[-1]).comment == "the tap has gone"


def test_capture_ends_when_the_client_goes(frames: Frames) -> None:
    stream, thread = run(frames)

    stream.close()

    thread.join(20)
    assert not thread.is_alive()
