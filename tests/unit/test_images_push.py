"""An image on its way to another host: the stream is whatever a peer sends."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import os
import socket
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ImageError
from orchestrator.images.service import CHUNK, _take


def deliver(data: bytes, target: Path, files: list[tuple[int, str]], pieces: int = 1 << 16) -> bytes:
    """What is left of ``data`` when ``files``, each a size and a digest, have been taken from it."""
    ours, theirs = socket.socketpair()

    def send() -> None:
        try:
            for start in range(0, len(data), pieces):
                ours.sendall(data[start : start + pieces])
        except OSError:
            pass  # the taker has given up
        ours.close()

    sender = threading.Thread(target=send)
    sender.start()
    rest = b""
    try:
        for number, (size, digest) in enumerate(files):
            rest = _take(theirs, target / str(number), size, digest, rest)
        return rest
    finally:
        theirs.close()
        sender.join()


def announced(content: bytes) -> tuple[int, str]:
    return len(content), hashlib.sha256(content).hexdigest()


@given(contents=st.lists(st.binary(max_size=3000), max_size=4), pieces=st.sampled_from([1, 7, 1000]))
def test_files_arrive_as_they_were_sent(
    contents: list[bytes], pieces: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("taken")
    data = b"".join(zlib.compress(content, 1) for content in contents)

    assert deliver(data, target, [announced(content) for content in contents], pieces) == b""

    assert [(target / str(number)).read_bytes() for number in range(len(contents))] == contents


def test_file_larger_than_every_buffer_arrives(tmp_path: Path) -> None:
    content = os.urandom(3 * CHUNK) + bytes(5 * CHUNK)

    assert deliver(zlib.compress(content, 1), tmp_path, [announced(content)]) == b""

    assert (tmp_path / "0").read_bytes() == content


def test_file_that_unpacks_to_more_than_was_announced_is_given_up_early(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(400 * CHUNK))

    with pytest.raises(ImageError, match="more was sent than the 1000 bytes"):
        deliver(bomb, tmp_path, [(1000, "")])

    assert (tmp_path / "0").stat().st_size <= 1000


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (zlib.compress(b"content")[:-3], "the stream ended"),
        (b"", "the stream ended"),
        (b"no zlib stream", "cannot be unpacked"),
        (zlib.compress(b"conten"), "6 bytes were sent, 7 were announced"),
        (zlib.compress(b"CONTENT"), "SHA-256"),
    ],
)
def test_damaged_stream_is_refused(data: bytes, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=complaint):
        deliver(data, tmp_path, [announced(b"content")])
