"""Images that the lab file names by path or URL.

They are copied into the cache, so that nobody can change the base under the disks of guests.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import difflib
import hashlib
import http.client
import os
import shutil
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import IO

from orchestrator.errors import ImageError
from orchestrator.images import disk
from orchestrator.images.model import ImageSpec
from orchestrator.images.recipe import Built, Progress, Recipe

CHUNK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte
PACKED = {b"\xfd7zXZ\0": "xz", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"PK\3\4": "zip"}


def recipe(name: str, spec: ImageSpec, base: Path) -> Recipe:
    """:raise ImageError: the path does not exist or is no file."""
    want = f"{spec.sha256 or ''} {spec.format or ''}".lower()
    if spec.path is None:
        return Recipe(f"url {want}", partial(_fetch, name, spec))
    path = base / spec.path.expanduser()
    return Recipe(f"{_state(path)} {want}", partial(_copy, name, spec, path))


def _state(path: Path) -> str:
    """Changes when the file does, and is quicker to find than its sum."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise _missing(path) from None
    if not path.is_file():
        raise ImageError(f"{path} is not a file")
    return f"path {path.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ino}"


def _missing(path: Path) -> ImageError:
    there = next(parent for parent in path.parents if parent.is_dir())
    close = difflib.get_close_matches(path.name, [entry.name for entry in there.iterdir()], n=1, cutoff=0.3)
    if there != path.parent:
        hint = f"{there} exists, but nothing on the way from there to the file"
    else:
        hint = f"there is {there / close[0]}" if close else f"nothing in {there} has a name like it"
    return ImageError(f"{path}: no such image", hint=hint)


def _copy(name: str, spec: ImageSpec, path: Path, folder: Path, progress: Progress) -> Built:
    before = _state(path)
    progress(f"copying {path}")
    with path.open("rb") as stream:
        total = receive(stream, folder / "disk", path.stat().st_size, lambda done: progress(f"{name}: {done}"))
    if _state(path) != before:
        raise ImageError(f"{path} changed while it was copied", hint="is a virtual machine running from it?")
    return _accept(spec, folder, total, str(path))


def _fetch(name: str, spec: ImageSpec, folder: Path, progress: Progress) -> Built:
    assert spec.url is not None
    progress(f"fetching {spec.url}")
    try:
        with urllib.request.urlopen(spec.url, timeout=TIMEOUT) as answer:
            size = answer.headers.get("Content-Length")
            length = int(size) if size and size.isdigit() else None
            total = receive(answer, folder / "disk", length, lambda done: progress(f"{name}: {done}"))
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise ImageError(f"{spec.url} could not be fetched: {error}") from error
    return _accept(spec, folder, total, spec.url)


def receive(stream: IO[bytes], target: Path, size: int | None, progress: Progress) -> str:
    """Copy a stream into a file, leaving out blocks of zeros; the SHA-256 of the stream.

    :param size: bytes that are to come, if that is known.
    :raise ImageError: there is no room for them, or another number of bytes came.
    """
    free = shutil.disk_usage(target.parent).free
    if size is not None and size > free:
        raise ImageError(
            f"{size >> 20} MiB to come, but {target.parent} has only {free >> 20} MiB left",
            hint="try `orchestrator image prune`, or move the cache with ORCHESTRATOR_CACHE",
        )
    total, done, told = hashlib.sha256(), 0, time.monotonic()
    zeros = bytes(CHUNK)
    with target.open("wb") as out:
        while chunk := stream.read(CHUNK):
            total.update(chunk)
            if chunk == zeros:
                out.seek(CHUNK, os.SEEK_CUR)
            else:
                out.write(chunk)
            done += len(chunk)
            if time.monotonic() - told > 2:
                told = time.monotonic()
                progress(f"{done >> 20} of {size >> 20} MiB" if size else f"{done >> 20} MiB")
        out.truncate(done)
    if size is not None and size != done:
        raise ImageError(f"{done} bytes came where {size} were announced", hint="try again")
    return total.hexdigest()


def _accept(spec: ImageSpec, folder: Path, total: str, origin: str) -> Built:
    """Look at what came before anything else does.

    :raise ImageError: another sum or format than the lab file says, or an image that reaches for other files.
    """
    file = folder / "disk"
    if spec.sha256 and spec.sha256.lower() != total:
        raise ImageError(
            f"{origin} has another checksum than the lab file says",
            hint="the file changed or was damaged on its way: compare with the sum that its publisher gives",
            tail=[f"expected sha256 {spec.sha256.lower()}", f"found    sha256 {total}"],
        )
    with file.open("rb") as data:
        start = data.read(8)
    for magic, program in PACKED.items():
        if start.startswith(magic):
            raise ImageError(f"{origin} is compressed", hint=f"unpack it with {program} first")
    about = disk.info(file)
    found = str(about.get("format"))
    if found not in ("qcow2", "raw"):
        raise ImageError(f"{origin} is of format {found}", hint="convert it: qemu-img convert -O qcow2 OLD NEW")
    if spec.format and spec.format != found:
        raise ImageError(f"{origin} is of format {found}, not {spec.format}")
    details = about.get("format-specific", {}).get("data", {})
    if about.get("backing-filename") or details.get("data-file"):
        # Such an image would make QEMU open any file of this machine that its maker cared to name.
        raise ImageError(
            f"{origin} refers to another file", hint="make it stand alone: qemu-img convert -O qcow2 OLD NEW"
        )
    return Built(total, disk="disk", disk_format=found, cloud_init=spec.cloud_init, ready=spec.ready)
