"""The console of a guest: what its log says, how it is followed, and who sits at it."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import os
import pty
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.errors import GuestError
from orchestrator.guests.consolelog import (
    TAIL_BYTES,
    Consoles,
    clean,
    follow,
    panic,
    rotate,
    tail,
    tail_bytes,
    watching,
)
from orchestrator.hosts.rpc import Stream

SOON = 10.0  # seconds; no test waits that long unless it fails

PANIC = b"[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n[    1.2] CPU: 0 PID: 1\r\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "console.log"


def receive(stream: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (part := stream.recv(size - len(data))):
        data += part
    return data


# -- reading ---------------------------------------------------------------------------------------------------------


def test_log_that_is_not_there_has_nothing(log: Path) -> None:
    assert tail_bytes(log) == b""
    assert tail(log) == []
    assert panic(log) is None


def test_tail_is_the_end_of_a_long_log(log: Path) -> None:
    log.write_bytes(b"first\n" + b"x" * TAIL_BYTES + b"\nlast\n")

    assert len(tail_bytes(log)) == TAIL_BYTES
    assert tail(log, 1) == ["last"]
    assert tail_bytes(log, 5) == b"last\n"


def test_tail_counts_lines_that_say_something(log: Path) -> None:
    log.write_bytes(b"one\r\n\r\n  \r\ntwo\r\nthree \r\n\r\n")

    assert tail(log, 2) == ["two", "three"]


@pytest.mark.parametrize(
    ("raw", "lines"),
    [
        (b"\x1b[1;31mred\x1b[0m\r\n", ["red"]),
        (b"\x1b[2J\x1b[H\x1b[?25lclear\n", ["clear"]),
        (b"\x1b(B\x1b7saved\x1b8\x1b=\x1bc\n", ["saved"]),
        (b"bell\x07 back\x08 null\x00\n", ["bell back null"]),
        (b"tab\tstays\n", ["tab\tstays"]),
        ("grün \N{SNOWMAN}\n".encode(), ["grün \N{SNOWMAN}"]),
        (b"cut \xe2\x98\n", ["cut \N{REPLACEMENT CHARACTER}"]),
        (b"\x1b[31", ["[31"]),
        (b"", []),
    ],
)
def test_clean_takes_terminal_control_away(raw: bytes, lines: list[str]) -> None:
    assert clean(raw) == lines


@given(st.binary(max_size=64))
@example(b"\x1b\x1b[[mm")
@example(b"\x1b[\x1b[mm")
def test_cleaned_lines_have_no_escapes(raw: bytes) -> None:
    for line in clean(raw):
        assert not any(ord(char) < 0x20 and char != "\t" for char in line)
        assert line.strip()


@pytest.mark.parametrize("raw", ["\x9b31mred\n".encode(), b"del\x7f\n"])
def test_clean_takes_the_other_controls_away(raw: bytes) -> None:
    assert all(char.isprintable() for line in clean(raw) for char in line)


def test_panic_is_found_with_its_reason(log: Path) -> None:
    log.write_bytes(b"booting\r\n" + PANIC)

    assert panic(log) == "Kernel panic - not syncing: VFS: Unable to mount root fs"


def test_talk_of_panics_is_none(log: Path) -> None:
    log.write_bytes(b"panic=1 on the command line\nKernel panic timeout set\n")

    assert panic(log) is None


def test_rotated_log_begins_anew_and_keeps_the_one_before(log: Path) -> None:
    rotate(log)
    assert list(log.parent.iterdir()) == []
    for text in (b"first", b"second"):
        log.write_bytes(text)
        rotate(log)

    assert not log.exists()
    assert log.with_name("console.log.1").read_bytes() == b"second"


# -- watching and following ------------------------------------------------------------------------------------------


def test_watching_tells_when_the_log_grows(log: Path) -> None:
    grown = threading.Event()

    with watching(log, grown.set):
        (log.parent / "other.log").write_bytes(b"x")
        log.write_bytes(b"x")
        assert grown.wait(SOON)

    assert "console log" not in [thread.name for thread in threading.enumerate()]


def test_watching_does_not_tell_of_other_files(log: Path) -> None:
    heard: list[bool] = []
    log.write_bytes(b"")

    with watching(log, lambda: heard.append(True)):
        (log.parent / "other.log").write_bytes(b"x")

    assert heard == []


@contextlib.contextmanager
def following(log: Path, *, lines: int | None, keep_on: bool) -> Iterator[socket.socket]:
    """The client's end of a followed log."""
    ours, theirs = socket.socketpair()
    ours.settimeout(SOON)

    def run() -> None:
        with theirs:
            follow(log, theirs, lines=lines, keep_on=keep_on)

    thread = threading.Thread(target=run)
    thread.start()
    with ours:
        yield ours
    thread.join(SOON)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("lines", "sent"), [(None, b"one\ntwo\nthree"), (2, b"two\nthree"), (9, b"one\ntwo\nthree"), (0, b"")]
)
def test_log_is_sent_once(log: Path, lines: int | None, sent: bytes) -> None:
    log.write_bytes(b"one\ntwo\nthree")

    with following(log, lines=lines, keep_on=False) as client:
        assert receive(client, 64) == sent


def test_log_is_followed_until_the_client_goes(log: Path) -> None:
    log.write_bytes(b"one\n")

    with following(log, lines=None, keep_on=True) as client:
        assert receive(client, 4) == b"one\n"
        with open(log, "ab") as file:
            file.write(b"two\n")
        assert receive(client, 4) == b"two\n"


def test_log_that_is_not_there_cannot_be_followed(log: Path) -> None:
    ours, theirs = socket.socketpair()

    with ours, theirs, pytest.raises(GuestError, match="no console log yet"):
        follow(log, theirs, lines=None, keep_on=False)


# -- sitting at the console ------------------------------------------------------------------------------------------


class Seat:
    """A client at a console."""

    def __init__(self, consoles: Consoles, path: str, *, force: bool = False) -> None:
        self.client, self._stream = socket.socketpair()
        self.client.settimeout(SOON)
        self.opened = threading.Event()
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._attach, args=(consoles, path, force), daemon=True)
        self.thread.start()

    def _attach(self, consoles: Consoles, path: str, force: bool) -> None:
        try:
            consoles.attach("ann", path, self._open, force=force)
        except (GuestError, OSError) as error:
            self.failure = error
        finally:
            self._stream.close()

    def _open(self) -> Stream:
        self.opened.set()
        return self._stream

    def left(self) -> bool:
        self.thread.join(SOON)
        return not self.thread.is_alive()


@pytest.fixture
def terminal() -> Iterator[tuple[int, str]]:
    """QEMU's end of a pseudo-terminal, and the path of the other."""
    ours, theirs = pty.openpty()
    yield ours, os.ttyname(theirs)
    os.close(ours)
    os.close(theirs)


TakeSeat = Callable[..., Seat]


@pytest.fixture
def take_seat(terminal: tuple[int, str]) -> Iterator[TakeSeat]:
    consoles = Consoles()
    seats: list[Seat] = []

    def take(*, force: bool = False) -> Seat:
        seats.append(Seat(consoles, terminal[1], force=force))
        return seats[-1]

    yield take
    for seat in seats:
        seat.client.close()
    os.write(terminal[0], b"wake up")
    for seat in seats:
        seat.thread.join(SOON)


def test_console_carries_bytes_both_ways(terminal: tuple[int, str], take_seat: TakeSeat) -> None:
    seat = take_seat()
    assert seat.opened.wait(SOON)

    seat.client.sendall(b"\x03ls\r")
    typed = os.read(terminal[0], 64)
    os.write(terminal[0], b"login: \x1b[1m")
    shown = receive(seat.client, 11)

    assert (typed, shown) == (b"\x03ls\r", b"login: \x1b[1m")


def test_console_is_free_again_when_the_client_goes(terminal: tuple[int, str], take_seat: TakeSeat) -> None:
    first = take_seat()
    assert first.opened.wait(SOON)
    first.client.close()
    assert first.left()

    second = take_seat()

    assert second.opened.wait(SOON)


def test_second_client_is_refused(terminal: tuple[int, str], take_seat: TakeSeat) -> None:
    first = take_seat()
    assert first.opened.wait(SOON)

    second = take_seat()

    assert second.left()
    assert isinstance(second.failure, GuestError)
    assert second.failure.hint == "take it over with --force"
    assert not second.opened.is_set()


def test_second_client_may_take_the_console_over(terminal: tuple[int, str], take_seat: TakeSeat) -> None:
    first = take_seat()
    assert first.opened.wait(SOON)

    second = take_seat(force=True)
    assert second.opened.wait(SOON)
    second.client.sendall(b"mine")

    assert os.read(terminal[0], 64) == b"mine"


def test_first_client_leaves_when_the_console_is_taken_over(terminal: tuple[int, str], take_seat: TakeSeat) -> None:
    first = take_seat()
    assert first.opened.wait(SOON)
    first.client.settimeout(0.5)

    assert take_seat(force=True).opened.wait(SOON)

    assert first.client.recv(64) == b""
