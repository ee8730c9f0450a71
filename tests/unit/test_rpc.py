"""Frames, calls and streams between the command line and an agent, and peers that break the rules."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.errors import (
    CancelledError,
    GuestError,
    HostError,
    NotFoundError,
    OrchestratorError,
    ProtocolError,
)
from orchestrator.hosts import rpc
from orchestrator.hosts.rpc import Call, Client, Server, Stream, read_frame, read_some, relay, write_frame

SOON = 10.0  # seconds; no test waits that long unless it fails

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


class Script:
    """A stream that gives what it was made with, then ends; it keeps what is sent and how much was asked for."""

    def __init__(self, data: bytes, piece: int = 1 << 20) -> None:
        self._data = data
        self._piece = piece
        self.asked: list[int] = []
        self.sent = bytearray()
        self.closed = False

    def recv(self, size: int, /) -> bytes:
        self.asked.append(size)
        part, self._data = self._data[: min(size, self._piece)], self._data[min(size, self._piece) :]
        return part

    def sendall(self, data: bytes, /) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True

    def fileno(self) -> int:
        return -1


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def frame_of(value: Any) -> bytes:
    return framed(json.dumps(value).encode())


class Peer:
    """A server on one end of a socket pair, with a client on the other."""

    def __init__(self) -> None:
        self.server = Server()
        self.ours, self._theirs = socket.socketpair()
        self.ours.settimeout(SOON)
        self.client = Client(self.ours, "alpha")

    def serve(self) -> Client:
        self._thread = threading.Thread(target=self.server.serve_stream, args=(self._theirs,), daemon=True)
        self._thread.start()
        return self.client

    def served(self) -> bool:
        """The server is done with its client."""
        self._thread.join(SOON)
        return not self._thread.is_alive()


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.client.close()


@contextlib.contextmanager
def answering(script: bytes) -> Iterator[Client]:
    """A client whose agent answers with ``script``, whatever is asked, and then ends."""
    ours, theirs = socket.socketpair()
    ours.settimeout(SOON)
    with ours, theirs:
        theirs.sendall(script)
        theirs.shutdown(socket.SHUT_WR)
        yield Client(ours, "alpha")


# -- frames ----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4), st.integers(1, 7))
def test_frame_survives_the_way_in_pieces_of_any_size(frame: dict[str, Any], piece: int) -> None:
    sink = Script(b"")
    write_frame(sink, frame)
    source = Script(bytes(sink.sent), piece)

    assert repr(read_frame(source)) == repr(json.loads(json.dumps(frame)))
    assert read_frame(source) is None


@pytest.mark.parametrize("length", [rpc.MAX_FRAME + 1, 2**32 - 1])
def test_frame_longer_than_the_limit_is_refused_before_it_is_read(length: int) -> None:
    stream = Script(struct.pack("<I", length) + b"x" * 64)

    with pytest.raises(ProtocolError, match=f"a frame of {length} bytes"):
        read_frame(stream)

    assert sum(stream.asked) == 4


def test_long_frame_is_read_in_bounded_pieces() -> None:
    stream = Script(frame_of({"a": "x" * (1 << 20)}))

    assert read_frame(stream) == {"a": "x" * (1 << 20)}
    assert max(stream.asked) <= 1 << 18


def test_frame_longer_than_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_FRAME", 64)
    stream = Script(b"")

    with pytest.raises(ProtocolError, match="the limit is 64"):
        write_frame(stream, {"id": 1, "result": "x" * 64})

    assert stream.sent == b""


@pytest.mark.parametrize("cut", range(1, 4 + len(b'{"id":1}')))
def test_truncated_frame_is_an_error(cut: int) -> None:
    stream = Script(framed(b'{"id":1}')[:cut])

    with pytest.raises(ProtocolError):
        read_frame(stream)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xff", b'{"a":}', b"[" * 100_000, b"1" * 5000, b'{"id":1}{"id":2}', b"\x00"]
)
def test_frame_that_is_not_json_is_an_error(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="not JSON"):
        read_frame(Script(framed(body)))


@pytest.mark.parametrize("body", [b"[]", b"1", b'"text"', b"null", b"true"])
def test_frame_that_is_no_object_is_an_error(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a JSON object"):
        read_frame(Script(framed(body)))


# -- calls -----------------------------------------------------------------------------------------------------------


def test_call_gets_its_parameters_and_returns_the_result(peer: Peer) -> None:
    peer.server.register("add", lambda call, a, b=1: {"sum": a + b})
    client = peer.serve()

    assert client.call("add", {"a": 2, "b": 3}) == {"sum": 5}
    assert client.call("add", {"a": 2}) == {"sum": 3}


def test_calls_on_one_stream_run_at_the_same_time(peer: Peer) -> None:
    count = 32
    together = threading.Barrier(count, timeout=SOON)
    peer.server.register("meet", lambda call, number: (together.wait(), number)[1])
    client = peer.serve()
    results: dict[int, int] = {}

    def ask(number: int) -> None:
        results[number] = client.call("meet", {"number": number})

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)

    assert results == {number: number for number in range(count)}


def test_progress_comes_in_order_before_the_result(peer: Peer) -> None:
    def work(call: Call) -> str:
        for step in ("one", "two", "three"):
            call.progress(step)
        return "done"

    peer.server.register("work", work)
    heard: list[str] = []

    assert peer.serve().call("work", progress=heard.append) == "done"
    assert heard == ["one", "two", "three"]


def test_progress_that_nobody_listens_to_is_dropped(peer: Peer) -> None:
    peer.server.register("work", lambda call: call.progress("one"))

    assert peer.serve().call("work") is None


class Waiting:
    """A handler that waits until it is given up."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.given_up = threading.Event()

    def __call__(self, call: Call) -> None:
        woken = threading.Event()
        call.on_cancel(woken.set)
        self.began.set()
        assert woken.wait(SOON)
        self.given_up.set()
        call.check()


def test_call_is_given_up_when_the_client_asks_for_it(peer: Peer) -> None:
    waiting, cancel = Waiting(), threading.Event()
    peer.server.register("wait", waiting)
    client = peer.serve()
    threading.Thread(target=lambda: waiting.began.wait(SOON) and cancel.set(), daemon=True).start()

    with pytest.raises(CancelledError, match="given up by the caller"):
        client.call("wait", cancel=cancel)

    assert waiting.given_up.is_set()


def test_call_that_is_given_up_may_still_end_well(peer: Peer) -> None:
    cancel = threading.Event()

    def finish(call: Call) -> str:
        woken = threading.Event()
        call.on_cancel(woken.set)
        cancel.set()
        assert woken.wait(SOON)
        return "done all the same"

    peer.server.register("finish", finish)

    assert peer.serve().call("finish", cancel=cancel) == "done all the same"


def test_calls_are_given_up_when_the_client_hangs_up(peer: Peer) -> None:
    waiting = Waiting()
    peer.server.register("wait", waiting)
    peer.serve()
    write_frame(peer.ours, {"id": 1, "method": "wait"})
    assert waiting.began.wait(SOON)

    peer.client.close()

    assert waiting.given_up.wait(SOON)
    assert peer.served()


def test_giving_up_a_call_that_has_ended_does_nothing(peer: Peer) -> None:
    peer.server.register("ping", lambda call: "pong")
    client = peer.serve()
    assert client.call("ping") == "pong"

    write_frame(peer.ours, {"id": 1, "cancel": True})

    assert client.call("ping") == "pong"


def test_unknown_method_is_an_error_of_the_call_only(peer: Peer) -> None:
    peer.server.register("ping", lambda call: "pong")
    client = peer.serve()

    with pytest.raises(NotFoundError, match=r"no method 'nonsense'") as caught:
        client.call("nonsense")

    assert caught.value.hint == "update the toolkit on the host"
    assert client.call("ping") == "pong"


def test_our_error_keeps_its_class_and_fields(peer: Peer) -> None:
    def fail(call: Call) -> None:
        raise GuestError("it broke", hint="mend it", command="qemu -x", tail=["one", "two"])

    peer.server.register("fail", fail)

    with pytest.raises(GuestError) as caught:
        peer.serve().call("fail")

    error = caught.value
    assert (error.message, error.hint, error.command, error.tail) == (
        "it broke",
        "mend it",
        "qemu -x",
        ("one", "two"),
    )


def test_other_exception_becomes_an_error_that_names_the_method(peer: Peer) -> None:
    def fail(call: Call) -> None:
        raise KeyError("missing")

    peer.server.register("fail", fail)

    with pytest.raises(OrchestratorError, match=r"fail: KeyError\('missing'\)"):
        peer.serve().call("fail")


@pytest.mark.parametrize("params", [{}, {"a": 1, "b": 2}, {"call": 1}])
def test_wrong_parameters_are_an_error(peer: Peer, params: dict[str, Any]) -> None:
    peer.server.register("one", lambda call, a: a)

    with pytest.raises(OrchestratorError, match="one: TypeError"):
        peer.serve().call("one", params)


def test_result_longer_than_the_limit_is_an_error(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_FRAME", 512)
    peer.server.register("much", lambda call: "x" * 512)

    with pytest.raises(ProtocolError, match="the limit is 512"):
        peer.serve().call("much")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_result_that_is_not_json_is_an_error(peer: Peer) -> None:
    peer.ours.settimeout(0.5)
    peer.server.register("bytes", lambda call: b"x")
    peer.serve()
    write_frame(peer.ours, {"id": 1, "method": "bytes"})

    answer = read_frame(peer.ours)

    assert answer is not None
    assert "error" in answer


def test_parameters_longer_than_the_limit_are_an_error(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    peer.server.register("ping", lambda call: "pong")
    client = peer.serve()
    monkeypatch.setattr(rpc, "MAX_FRAME", 128)

    with pytest.raises(ProtocolError, match="the limit is 128"):
        client.call("ping", {"much": "x" * 128})

    assert client.call("ping") == "pong"


def call_together(client: Client, count: int) -> list[Exception | None]:
    failures: list[Exception | None] = []

    def ask() -> None:
        try:
            client.call("wait")
        except OrchestratorError as error:
            failures.append(error)
        else:
            failures.append(None)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    return failures


def test_too_many_calls_on_one_stream_end_the_stream(peer: Peer) -> None:
    peer.server.register("wait", Waiting())
    client = peer.serve()

    failures = call_together(client, rpc.MAX_CALLS_PER_STREAM + 1)

    assert len(failures) == rpc.MAX_CALLS_PER_STREAM + 1
    assert all(isinstance(failure, OrchestratorError) for failure in failures)
    assert peer.served()


def test_number_used_twice_ends_the_stream(peer: Peer) -> None:
    waiting = Waiting()
    peer.server.register("wait", waiting)
    peer.serve()

    write_frame(peer.ours, {"id": 1, "method": "wait"})
    write_frame(peer.ours, {"id": 1, "method": "wait"})

    assert waiting.given_up.wait(SOON)
    assert peer.served()


def test_agent_that_ends_during_a_call_is_an_error(peer: Peer) -> None:
    client = peer.client
    threading.Thread(target=lambda: (read_frame(peer._theirs), peer._theirs.close()), daemon=True).start()

    with pytest.raises(HostError, match="alpha: the agent ended during wait"):
        client.call("wait")
    with pytest.raises(HostError, match="alpha"):
        client.call("wait")


def test_closing_the_client_ends_its_calls(peer: Peer) -> None:
    waiting = Waiting()
    peer.server.register("wait", waiting)
    client = peer.serve()
    threading.Thread(target=lambda: waiting.began.wait(SOON) and client.close(), daemon=True).start()

    with client, pytest.raises(HostError, match="the agent ended during wait"):
        client.call("wait")


# -- streams ---------------------------------------------------------------------------------------------------------


def echo(open_stream: Callable[..., Stream], greeting: str) -> None:
    stream = open_stream({"hello": greeting})
    while data := stream.recv(64):
        stream.sendall(data.upper())


def receive(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size and (part := stream.recv(size - len(data))):
        data += part
    return data


def test_stream_method_carries_bytes_both_ways(peer: Peer) -> None:
    peer.server.register_stream("echo", echo)

    result, stream = peer.serve().open("echo", {"greeting": "you"})
    stream.sendall(b"\x00frames no more {")

    assert result == {"hello": "you"}
    assert receive(stream, 17) == b"\x00FRAMES NO MORE {"


def test_end_of_a_raw_stream_ends_its_handler(peer: Peer) -> None:
    peer.server.register_stream("echo", echo)
    peer.serve().open("echo", {"greeting": "you"})

    peer.client.close()

    assert peer.served()


def test_end_of_a_stream_handler_ends_the_stream(peer: Peer) -> None:
    def farewell(open_stream: Callable[..., Stream]) -> None:
        open_stream().sendall(b"farewell")

    peer.server.register_stream("farewell", farewell)

    result, stream = peer.serve().open("farewell")

    assert result is None
    assert receive(stream, 64) == b"farewell"


def test_stream_handler_that_refuses_tells_why(peer: Peer) -> None:
    def refuse(open_stream: Callable[..., Stream]) -> None:
        raise GuestError("no console", hint="start it")

    peer.server.register_stream("console", refuse)

    with pytest.raises(GuestError, match="no console") as caught:
        peer.serve().open("console")

    assert caught.value.hint == "start it"


@pytest.mark.parametrize("params", [{}, {"nonsense": 1}])
def test_stream_with_wrong_parameters_is_an_error(peer: Peer, params: dict[str, Any]) -> None:
    peer.server.register_stream("echo", echo)

    with pytest.raises(OrchestratorError, match="TypeError"):
        peer.serve().open("echo", params)


def test_stream_handler_that_fails_before_it_opens_tells_why(peer: Peer) -> None:
    def fail(open_stream: Callable[..., Stream]) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/dev/pts/7")

    peer.server.register_stream("console", fail)

    with pytest.raises(OrchestratorError, match="/dev/pts/7"):
        peer.serve().open("console")


def test_stream_handler_that_fails_after_it_opened_ends_the_stream(peer: Peer) -> None:
    def fail(open_stream: Callable[..., Stream]) -> None:
        open_stream("opened")
        raise KeyError("later")

    peer.server.register_stream("fail", fail)

    result, stream = peer.serve().open("fail")

    assert result == "opened"
    assert stream.recv(64) == b""
    assert peer.served()


def test_agent_that_ends_while_a_stream_opens_is_an_error() -> None:
    with answering(b"") as client, pytest.raises(HostError, match="the agent ended during console"):
        client.open("console")


@contextlib.contextmanager
def interrupted_elsewhere() -> Iterator[None]:
    """A Ctrl-C, a moment later, that wakes another thread only, as when it comes just before this one waits."""
    done = threading.Event()

    def take() -> None:
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        done.wait(SOON)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_ctrl_c_ends_a_wait_for_a_raw_stream() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, interrupted_elsewhere(), pytest.raises(KeyboardInterrupt):
        read_some(ours)


def test_ctrl_c_ends_a_wait_for_an_answer(peer: Peer) -> None:
    answered = threading.Event()
    peer.server.register("slow", lambda call: answered.wait(SOON))
    client = peer.serve()
    try:
        with interrupted_elsewhere(), pytest.raises(KeyboardInterrupt):
            client.call("slow")
    finally:
        answered.set()


def test_relay_carries_both_ways_and_ends_with_either_side() -> None:
    left, left_relayed = socket.socketpair()
    right, right_relayed = socket.socketpair()
    with left, left_relayed, right, right_relayed:
        thread = threading.Thread(target=relay, args=(left_relayed, right_relayed), daemon=True)
        thread.start()

        left.sendall(b"to the right")
        right.sendall(b"to the left")
        heard = receive(right, 12), receive(left, 11)
        right.close()
        thread.join(SOON)

        assert heard == (b"to the right", b"to the left")
        assert not thread.is_alive()


# -- peers that break the rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        {},
        {"id": None, "method": "ping"},
        {"id": "1", "method": "ping"},
        {"id": 1.5, "method": "ping"},
        {"id": 1},
        {"id": 1, "method": 7},
        {"id": 1, "method": "ping", "params": []},
        {"id": 1, "method": "ping", "params": None},
    ],
)
def test_malformed_call_ends_the_stream(frame: dict[str, Any]) -> None:
    server, stream = Server(), Script(frame_of(frame))
    server.register("ping", lambda call: "pong")

    server.serve_stream(stream)

    assert stream.closed
    assert stream.sent == b""


CALLS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(0, 3) | JSON,
        "method": st.sampled_from(["echo", "fail", "raw"]) | JSON,
        "params": st.fixed_dictionaries({"value": JSON}) | JSON,
        "cancel": st.booleans() | JSON,
    },
)
INPUTS = st.lists(st.binary(max_size=64) | st.binary(max_size=64).map(framed) | CALLS.map(frame_of), max_size=8)


@given(INPUTS)
@example([frame_of({"id": 1, "method": "echo", "params": {"value": "\ud800"}})])
@example([frame_of({"id": 10**30, "method": "\ud800\n"})])
@example([b'\x0b\x00\x00\x00{"id": NaN}'])
def test_server_survives_whatever_a_client_sends(pieces: list[bytes]) -> None:
    server = Server()
    server.register("echo", lambda call, value: value)
    server.register("fail", lambda call, value: 1 // 0)
    server.register_stream("raw", lambda open_stream, value: open_stream().sendall(b"raw"))
    stream = Script(b"".join(pieces))
    before = set(threading.enumerate())

    server.serve_stream(stream)
    for thread in set(threading.enumerate()) - before:
        thread.join(SOON)

    assert stream.closed


ANSWERS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(0, 2) | JSON,
        "result": JSON,
        "progress": JSON,
        "error": st.dictionaries(st.sampled_from(["kind", "message", "tail", "problems"]), JSON),
    },
)


@given(st.lists(st.binary(max_size=32) | st.binary(max_size=32).map(framed) | ANSWERS.map(frame_of), max_size=6))
@example([frame_of({"id": 1, "error": {"kind": "SpecError", "problems": [1, {}]}})])
@example([b'\x10\x00\x00\x00{"id": Infinity}'])
def test_client_survives_whatever_an_agent_answers(pieces: list[bytes]) -> None:
    with answering(b"".join(pieces)) as client:
        try:
            client.call("ping", progress=lambda text: None)
            ended = "with a result"
        except OrchestratorError:
            ended = "with our error"

    assert ended in ("with a result", "with our error")  # and neither hangs nor raises anything else


@pytest.mark.parametrize("error", ["text", None, 7, ["list"]])
def test_client_gets_our_error_where_the_agents_error_is_malformed(error: Any) -> None:
    with answering(frame_of({"id": 1, "error": error})) as client, pytest.raises(OrchestratorError):
        client.call("ping")
