"""The console of a guest: its log, and the bytes as they come."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

from inotify_simple import INotify, flags

from orchestrator.errors import GuestError
from orchestrator.hosts.rpc import Stream, relay

TAIL_BYTES = 64 << 10
PANIC = re.compile(rb"Kernel panic - not syncing:?[^\r\n]*")
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[78=>c]|[\x00-\x08\x0b-\x1f]")
_CONTROLS = re.compile("[\x7f-\x9f]")  # DEL, and C1, which terminals obey too


def tail_bytes(log: Path, limit: int = TAIL_BYTES) -> bytes:
    """The end of the log; nothing where there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - limit))
            return file.read()
    except OSError:
        return b""


def clean(raw: bytes) -> list[str]:
    """Console bytes as lines without terminal control."""
    text = _CONTROLS.sub("", _ESCAPES.sub(b"", raw.replace(b"\r", b"")).decode(errors="replace"))
    return [line.rstrip() for line in text.split("\n") if line.strip()]


def tail(log: Path, lines: int = 15) -> list[str]:
    return clean(tail_bytes(log))[-lines:]


def panic(log: Path) -> str | None:
    """The kernel's last words, if it has panicked since the log began."""
    match = PANIC.search(tail_bytes(log))
    return (clean(match[0]) or ["Kernel panic"])[0] if match else None


def rotate(log: Path) -> None:
    """Start a new log; the one before is kept as ``NAME.1``."""
    if log.exists():
        log.replace(log.with_name(log.name + ".1"))


@contextlib.contextmanager
def watching(log: Path, changed: Callable[[], None]) -> Iterator[None]:
    """Call ``changed`` from another thread whenever the log grows."""
    notify = INotify()
    notify.add_watch(log.parent, flags.MODIFY | flags.CREATE)
    done_read, done_write = os.pipe()

    def watch() -> None:
        poller = select.poll()
        poller.register(notify.fileno(), select.POLLIN)
        poller.register(done_read, select.POLLIN)
        while all(fd != done_read for fd, _ in poller.poll()):
            if any(event.name == log.name for event in notify.read(timeout=0)):
                changed()

    thread = threading.Thread(target=watch, name="console log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(done_write)
        thread.join()
        os.close(done_read)
        notify.close()


def follow(log: Path, stream: Stream, *, lines: int | None, keep_on: bool) -> None:
    """Send the log, or its last ``lines``, and with ``keep_on`` what is added until the client goes."""
    with contextlib.ExitStack() as stack:
        grown = threading.Event()
        grown.set()
        if keep_on:
            stack.enter_context(watching(log, grown.set))
        poller = select.poll()
        poller.register(stream.fileno(), select.POLLIN | select.POLLHUP)
        try:
            file = stack.enter_context(open(log, "rb"))
        except FileNotFoundError as error:
            raise GuestError("there is no console log yet", hint="start the guest") from error
        if lines is not None:
            raw = file.read()
            stream.sendall(b"".join(raw.splitlines(keepends=True)[-lines:] if lines else []))
        while True:
            while data := file.read(1 << 16):
                stream.sendall(data)
            if not keep_on or poller.poll(0):
                return
            grown.wait(0.5)
            grown.clear()


class Consoles:
    """Who is at which console: one at a time, unless the newcomer takes it over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, Stream] = {}

    def attach(self, guest: str, path: str, open_stream: Callable[[], Stream], *, force: bool) -> None:
        """Carry bytes between a client and the pty at ``path`` until either ends.

        :raise GuestError: somebody else is at the console, and not ``force``.
        """
        with self._lock:
            if guest in self._held:
                if not force:
                    raise GuestError(
                        f"guest {guest}: somebody else is at its console", hint="take it over with --force"
                    )
                first = self._held.pop(guest)
                with contextlib.suppress(OSError):
                    if isinstance(first, socket.socket):
                        first.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for it
                    first.close()
            fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
            tty.setraw(fd, termios.TCSANOW)
            stream = self._held[guest] = open_stream()
        try:
            relay(stream, _Pty(fd))
        finally:
            with self._lock:
                if self._held.get(guest) is stream:
                    del self._held[guest]
            os.close(fd)


class _Pty:
    """A pseudo-terminal as a :class:`Stream`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def recv(self, size: int, /) -> bytes:
        return os.read(self._fd, size)

    def sendall(self, data: bytes, /) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        pass

    def fileno(self) -> int:
        return self._fd
