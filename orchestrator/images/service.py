"""What the agent of a host does with images: the calls ``image.*``.

An image is built or fetched on the machine of the command line; a host that does not share its files gets a copy, by
content: what is there already is not sent again.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator import paths
from orchestrator.errors import ImageError, OrchestratorError
from orchestrator.hosts.rpc import Call, Server, Stream
from orchestrator.images import store

IMAGE_ID = re.compile(r"[a-z][a-z0-9-]{0,63}-[0-9a-f]{12}\Z")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\Z")
CHUNK = 1 << 20


def folder_of(image: str) -> Path:
    """:raise ImageError: ``image`` is no image's id."""
    if not IMAGE_ID.match(image):
        raise ImageError(f"{image!r} is no image's id")
    return paths.cache() / "images" / image


class ImageService:
    """The cache of images on this host."""

    def register(self, server: Server) -> None:
        server.register("image.find", self.find)
        server.register_stream("image.receive", self.receive)

    def find(self, call: Call, image: str) -> str | None:
        """The folder of the image here, or None."""
        folder = folder_of(image)
        return str(folder) if (folder / "manifest.json").exists() else None

    def receive(
        self, open_stream: Callable[[Any], Stream], image: str, manifest: dict[str, Any], files: list[dict[str, Any]]
    ) -> None:
        """Take an image: the contents of ``files`` (``name``, ``size`` in bytes, ``sha256``) one after the other, as
        one zlib stream each. Answers with one line of JSON: ``{"folder"}`` or ``{"error"}``. A copy that is not whole
        is not kept."""
        target = folder_of(image)
        for file in files:
            if not FILE_NAME.match(str(file["name"])) or not isinstance(file["size"], int) or file["size"] < 0:
                raise ImageError(f"image {image}: a file of it has no proper name or size")
        cache = paths.make_dir(target.parent)
        needed, free = sum(file["size"] for file in files), shutil.disk_usage(cache).free
        if needed > free:
            raise ImageError(
                f"image {image} needs {needed >> 20} MiB, the disk has {free >> 20} MiB left",
                hint="orchestrator image prune",
            )
        stream = open_stream(None)
        try:
            with store.workspace(image, lambda _: None) as building:
                rest = b""
                for file in files:
                    rest = _take(stream, building / file["name"], file["size"], file["sha256"], rest)
                paths.write_atomic(building / "manifest.json", json.dumps(manifest))
                if not (target / "manifest.json").exists():
                    building.rename(target)
            answer: dict[str, Any] = {"folder": str(target)}
        except (OSError, OrchestratorError) as error:
            answer = {"error": str(error)}
        stream.sendall(json.dumps(answer).encode() + b"\n")


def _take(stream: Stream, file: Path, size: int, sha256: str, rest: bytes) -> bytes:
    """Unpack one file from the stream.

    :param rest: what was received already; what was received too much is returned.
    :raise ImageError: the stream ends early or is no zlib stream, or the content is not what was announced.
    """
    digest, unpacker, missing = hashlib.sha256(), zlib.decompressobj(), size
    with open(file, "wb") as out:
        while not unpacker.eof:
            packed = unpacker.unconsumed_tail or rest or stream.recv(CHUNK)
            rest = b""
            if not packed:
                raise ImageError(f"{file.name}: the stream ended {missing} bytes early")
            try:
                chunk = unpacker.decompress(packed, CHUNK)
            except zlib.error as error:
                raise ImageError(f"{file.name}: what was sent cannot be unpacked: {error}") from error
            missing -= len(chunk)
            if missing < 0:
                raise ImageError(f"{file.name}: more was sent than the {size} bytes that were announced")
            digest.update(chunk)
            out.write(chunk)
    if missing:
        raise ImageError(f"{file.name}: {size - missing} bytes were sent, {size} were announced")
    if digest.hexdigest() != sha256:
        raise ImageError(f"{file.name}: SHA-256 is {digest.hexdigest()}, announced was {sha256}")
    file.chmod(0o644)
    return unpacker.unused_data
