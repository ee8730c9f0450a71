"""Calls over a byte stream: the protocol between the command line and a host's agent.

A *frame* is a 32-bit little-endian length (at most :data:`MAX_FRAME`) and that many bytes of UTF-8 JSON. The
length is checked before memory is taken.

======================================  ======================================================================
frame                                   meaning
======================================  ======================================================================
``{"id", "method", "params"}``          client → agent: a call; many may be under way on one stream
``{"id", "cancel": true}``              client → agent: give that call up
``{"id", "progress"}``                  agent → client: what the call is doing or waiting for; any number
``{"id", "result"}``                    agent → client: the call ended well
``{"id", "error"}``                     agent → client: an error, see :meth:`OrchestratorError.to_wire`
======================================  ======================================================================

A *stream method* (console, log, forwarded TCP, file) answers ``{"id", "result"}`` and then the stream carries
raw bytes in both directions until either side closes it. The end of a stream cancels the calls under way on it:
a command that is killed leaves no work running on its behalf.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import queue
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from orchestrator.errors import (
    CancelledError,
    HostLostError,
    NotFoundError,
    OrchestratorError,
    ProtocolError,
    from_wire,
)

log = logging.getLogger(__name__)

MAX_FRAME = 16 << 20
MAX_CALLS_PER_STREAM = 64
STEP_SECONDS = 1
"""Who waits for long does it in steps: a signal that comes just as Python begins to wait does not wake it."""
_LENGTH = struct.Struct("<I")

Json = Any
Progress = Callable[[str], None]


class Stream(Protocol):
    """A connected byte stream: a socket, or a channel of an SSH connection."""

    def recv(self, size: int, /) -> bytes: ...
    def sendall(self, data: bytes, /) -> None: ...
    def close(self) -> None: ...
    def fileno(self) -> int: ...


def read_some(stream: Stream) -> bytes:
    """What comes next from a raw stream, b"" at its end; Ctrl-C ends the wait."""
    poller = select.poll()
    poller.register(stream.fileno(), select.POLLIN | select.POLLHUP)
    while not poller.poll(STEP_SECONDS * 1000):
        pass
    return stream.recv(1 << 16)


def _read_exactly(stream: Stream, size: int) -> bytes | None:
    """``size`` bytes; None at the end of the stream before the first one.

    :raise ProtocolError: the stream ended in the middle.
    """
    parts: list[bytes] = []
    missing = size
    while missing:
        part = stream.recv(min(missing, 1 << 18))
        if not part:
            if missing == size:
                return None
            raise ProtocolError("the stream ended in the middle of a frame")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def read_frame(stream: Stream) -> dict[str, Any] | None:
    """The next frame, or None when the peer has closed the stream.

    :raise ProtocolError: the frame is too long, cut off, or not a JSON object.
    """
    header = _read_exactly(stream, _LENGTH.size)
    if header is None:
        return None
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME:
        raise ProtocolError(f"a frame of {length} bytes; the limit is {MAX_FRAME}")
    body = _read_exactly(stream, length) if length else b""
    try:
        frame = json.loads(body or b"")
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame that is not JSON: {error}") from error
    if not isinstance(frame, dict):
        raise ProtocolError("a frame that is not a JSON object")
    return frame


def write_frame(stream: Stream, frame: Mapping[str, Json]) -> None:
    """:raise ProtocolError: the frame is longer than the limit."""
    body = json.dumps(frame, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"a frame of {len(body)} bytes; the limit is {MAX_FRAME}")
    stream.sendall(_LENGTH.pack(len(body)) + body)


def relay(left: Stream, right: Stream) -> None:
    """Carry bytes both ways until either side ends."""
    peers = {left.fileno(): (left, right), right.fileno(): (right, left)}
    poller = select.poll()
    for fd in peers:
        poller.register(fd, select.POLLIN | select.POLLHUP | select.POLLERR)
    while True:
        for fd, _ in poller.poll():
            source, target = peers[fd]
            data = source.recv(1 << 16)
            if not data:
                return
            target.sendall(data)


class Call:
    """One call under way on the agent: how a handler reports progress and learns that it is given up."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._cancelled = threading.Event()
        self._wakers: list[Callable[[], None]] = []

    def on_cancel(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` when the call is given up, so that a waiting handler looks at :meth:`check`."""
        self._wakers.append(wake)

    def cancel(self) -> None:
        self._cancelled.set()
        for wake in self._wakers:
            wake()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def check(self) -> None:
        """:raise CancelledError: the caller has gone or has given the call up."""
        if self.cancelled:
            raise CancelledError("given up by the caller")


Handler = Callable[..., Json]
StreamHandler = Callable[..., None]


class Server:
    """Serves calls on streams. Handlers are registered by name and get ``(call, **params)``.

    A stream handler gets ``(open_stream, **params)``: it checks its parameters, then calls ``open_stream()``,
    which tells the client that the stream is open and returns it.
    """

    def __init__(self) -> None:
        self._methods: dict[str, Handler] = {}
        self._streams: dict[str, StreamHandler] = {}

    def register(self, name: str, handler: Handler) -> None:
        self._methods[name] = handler

    def register_stream(self, name: str, handler: StreamHandler) -> None:
        self._streams[name] = handler

    def serve_stream(self, stream: Stream) -> None:
        """Serve one client to the end of its stream. Never raises: what a client sends ends only itself."""
        calls: dict[int, Call] = {}
        write_lock = threading.Lock()

        def send(frame: Mapping[str, Json]) -> None:
            with write_lock, contextlib.suppress(OSError):
                write_frame(stream, frame)

        try:
            while (frame := read_frame(stream)) is not None:
                number = frame.get("id")
                if not isinstance(number, int):
                    raise ProtocolError("a call without a number")
                if frame.get("cancel"):
                    if known := calls.get(number):
                        known.cancel()
                    continue
                method, params = frame.get("method"), frame.get("params", {})
                if not isinstance(method, str) or not isinstance(params, dict):
                    raise ProtocolError("a call without a method or with malformed parameters")
                if handler := self._streams.get(method):
                    if calls:
                        raise ProtocolError("a raw stream was asked for while calls are under way")
                    self._serve_raw(handler, stream, number, params, send)
                    return
                if number in calls or len(calls) >= MAX_CALLS_PER_STREAM:
                    raise ProtocolError("too many calls under way, or one number used twice")
                call = calls[number] = Call(
                    lambda text, number=number: send({"id": number, "progress": text})  # type: ignore[misc]
                )
                threading.Thread(
                    target=self._answer,
                    args=(method, params, number, call, calls, send),
                    name=f"call {method}",
                    daemon=True,
                ).start()
        except (OSError, ProtocolError) as error:
            log.warning("a client's stream is closed: %s", error)
        finally:
            for call in list(calls.values()):
                call.cancel()
            with contextlib.suppress(OSError):
                stream.close()

    def _answer(
        self,
        method: str,
        params: dict[str, Json],
        number: int,
        call: Call,
        calls: dict[int, Call],
        send: Callable[[Mapping[str, Json]], None],
    ) -> None:
        try:
            handler = self._methods.get(method)
            if handler is None:
                raise NotFoundError(f"the agent knows no method {method!r}", hint="update the toolkit on the host")
            answer: dict[str, Json] = {"id": number, "result": handler(call, **params)}
        except OrchestratorError as error:
            answer = {"id": number, "error": error.to_wire()}
        except Exception as error:
            log.exception("call %s failed", method)
            answer = {"id": number, "error": OrchestratorError(f"{method}: {error!r}").to_wire()}
        calls.pop(number, None)
        try:
            send(answer)
        except (TypeError, ValueError) as error:
            send({"id": number, "error": OrchestratorError(f"{method}: its result is no JSON: {error}").to_wire()})
        except ProtocolError as error:
            send({"id": number, "error": error.to_wire()})

    def _serve_raw(
        self,
        handler: StreamHandler,
        stream: Stream,
        number: int,
        params: dict[str, Json],
        send: Callable[[Mapping[str, Json]], None],
    ) -> None:
        opened = False

        def open_stream(result: Json = None) -> Stream:
            nonlocal opened
            opened = True
            send({"id": number, "result": result})
            return stream

        try:
            handler(open_stream, **params)
        except Exception as error:
            if opened and isinstance(error, OSError):
                log.info("a raw stream ended: %s", error)
            elif not isinstance(error, OrchestratorError):
                log.exception("a raw stream failed")
            if not opened:
                said = str(error) if isinstance(error, OSError) else repr(error)
                known = error if isinstance(error, OrchestratorError) else OrchestratorError(said)
                send({"id": number, "error": known.to_wire()})


class Client:
    """The caller's end of a stream. Calls may be made from many threads at once."""

    def __init__(self, stream: Stream, peer: str) -> None:
        self.peer = peer
        self._stream = stream
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[dict[str, Any] | None]] = {}
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None
        self._ended = False

    @property
    def ended(self) -> bool:
        """The agent, or the way to it, has gone, or this was closed."""
        return self._ended

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._ended = True
        with contextlib.suppress(OSError):
            if isinstance(self._stream, socket.socket):
                self._stream.shutdown(socket.SHUT_RDWR)
            self._stream.close()

    def call(
        self,
        method: str,
        params: Mapping[str, Json] | None = None,
        *,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Json:
        """Make a call and wait for its end.

        :param progress: gets each sentence that the agent reports.
        :param cancel: when it is set the call is given up; the agent undoes what is half-made.
        :raise HostLostError: the agent has gone.
        :raise OrchestratorError: whatever the agent reports.
        """
        answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        number = self._begin(method, params, answers)
        told = False
        try:
            while True:
                try:
                    frame = answers.get(timeout=0.1 if cancel is not None and not told else STEP_SECONDS)
                except queue.Empty:
                    if cancel is not None and cancel.is_set():
                        told = True
                        self._send({"id": number, "cancel": True})
                    continue
                if frame is None:
                    raise HostLostError(
                        f"{self.peer}: the agent ended during {method}", hint="its log tells why; try again"
                    )
                if "progress" in frame:
                    if progress:
                        progress(str(frame["progress"]))
                elif "error" in frame:
                    raise from_wire(frame["error"])
                else:
                    return frame.get("result")
        finally:
            self._waiting.pop(number, None)

    def open(self, method: str, params: Mapping[str, Json] | None = None) -> tuple[Json, Stream]:
        """Make the stream of this client a raw one: no call can be made by the client before that, nor after it.

        :raise HostLostError: the agent has gone.
        :raise OrchestratorError: whatever the agent reports.
        """
        assert self._reader is None, "calls were made by this client"
        number = next(self._numbers)
        try:
            write_frame(self._stream, {"id": number, "method": method, "params": dict(params or {})})
            frame = read_frame(self._stream)
        except OSError as error:
            raise HostLostError(f"{self.peer}: the agent cannot be reached: {error}") from error
        if frame is None:
            raise HostLostError(f"{self.peer}: the agent ended during {method}")
        if "error" in frame:
            raise from_wire(frame["error"])
        return frame.get("result"), self._stream

    def _begin(
        self,
        method: str,
        params: Mapping[str, Json] | None,
        answers: queue.SimpleQueue[dict[str, Any] | None],
    ) -> int:
        with self._lock:
            if self._ended:
                raise HostLostError(f"{self.peer}: the agent has gone")
            number = next(self._numbers)
            self._waiting[number] = answers
            if self._reader is None:
                self._reader = threading.Thread(target=self._read, name=f"agent {self.peer}", daemon=True)
                self._reader.start()
        self._send({"id": number, "method": method, "params": dict(params or {})})
        return number

    def _send(self, frame: Mapping[str, Json]) -> None:
        try:
            with self._lock:
                write_frame(self._stream, frame)
        except OSError as error:
            raise HostLostError(f"{self.peer}: the agent cannot be reached: {error}") from error

    def _read(self) -> None:
        try:
            while (frame := read_frame(self._stream)) is not None:
                if waiting := self._waiting.get(int(frame.get("id", 0))):
                    waiting.put(frame)
        except (OSError, ValueError, TypeError, OverflowError, ProtocolError) as error:
            log.debug("%s: the stream ended: %s", self.peer, error)
        with self._lock:
            self._ended = True
            for waiting in list(self._waiting.values()):  # a caller that has its answer leaves meanwhile
                waiting.put(None)
