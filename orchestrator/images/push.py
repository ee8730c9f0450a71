"""Copying an image to a host that does not see our files."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.hosts.rpc import Client
from orchestrator.images.service import CHUNK
from orchestrator.images.store import Image


def _files(image: Image) -> list[Path]:
    return [file for file in (image.kernel, image.initrd, image.disk) if file is not None]


def push(agent: Client, new_stream: Callable[[], Client], image: Image, progress: Callable[[str], None]) -> Image:
    """The image as files of the agent's host; sent only where it is not there yet.

    :param new_stream: opens another connection to the same agent, for the contents.
    :raise ImageError: the host cannot take it.
    """
    folder = agent.call("image.find", {"image": image.id})
    if folder is None:
        folder = _send(new_stream(), image, progress)

    def there(file: Path | None) -> Path | None:
        return Path(folder) / file.name if file else None

    return replace(image, kernel=there(image.kernel), initrd=there(image.initrd), disk=there(image.disk))


def _send(agent: Client, image: Image, progress: Callable[[str], None]) -> str:
    files = _files(image)
    announced = []
    for file in files:
        with open(file, "rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        announced.append({"name": file.name, "size": file.stat().st_size, "sha256": digest})
    params = {"image": image.id, "manifest": image.to_json(), "files": announced}
    _, stream = agent.open("image.receive", params)
    with agent:
        total, sent = sum(file.stat().st_size for file in files), 0
        for file in files:
            packer = zlib.compressobj(level=1)  # halves the time and more, on slow links and slow hosts
            with open(file, "rb") as source:
                while chunk := source.read(CHUNK):
                    stream.sendall(packer.compress(chunk))
                    sent += len(chunk)
                    progress(f"sending {image.id}: {sent >> 20} of {total >> 20} MiB")
            stream.sendall(packer.flush())
        answer = b""
        while not answer.endswith(b"\n"):
            part = stream.recv(4096)
            if not part:
                raise ImageError(f"image {image.id}: {agent.peer} ended before it had it all")
            answer += part
    result = json.loads(answer)
    if "error" in result:
        raise ImageError(f"image {image.id}: {agent.peer}: {result['error']}")
    return str(result["folder"])
