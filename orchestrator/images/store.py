"""The cache of images: ``images/ID/`` with the files and, written last, ``manifest.json``.

An image is made in a folder ``.build-NAME`` and renamed into place when it is whole, so nobody ever sees a part of
one, and it does not change afterwards, because disks of guests lie on top of it. A lock per name makes a second
builder wait for the first and use its result; who has the lock may remove what a killed build left in that folder.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator import paths
from orchestrator.errors import CommandError, ImageError
from orchestrator.images import debian, files, labhost, tiny
from orchestrator.images.model import ImageSpec
from orchestrator.images.recipe import Built, Progress, Recipe

MANIFEST = "manifest.json"
BUILT_IN = {"tiny": tiny.recipe, "debian": debian.recipe, labhost.NAME: labhost.recipe}

_BUILD = ".build-"
_LOCK = ".lock-"
_NO_ROOM = re.compile(r"no space left|enough free space|disk quota exceeded", re.IGNORECASE)
_PATHS = ("kernel", "initrd", "disk")


@dataclass(frozen=True)
class Image:
    """An image in the cache.

    :ivar id: name and 12 hexadecimal digits that depend on the contents.
    :ivar disk_format: qcow2 or raw; None without a disk.
    :ivar cmdline: what the kernel needs on its command line, where there is a kernel.
    :ivar cloud_init: it wants a NoCloud seed.
    :ivar ready: what tells that a guest is up: agent, none or console:REGEX.
    :ivar size: bytes that it takes on the disk.
    :ivar created: ISO 8601, UTC.
    :ivar source: what it was made from (see :class:`~orchestrator.images.recipe.Recipe`).
    """

    id: str
    name: str
    kernel: Path | None
    initrd: Path | None
    disk: Path | None
    disk_format: str | None
    cmdline: str
    cloud_init: bool
    ready: str
    size: int
    created: str
    source: str = ""

    @property
    def folder(self) -> Path:
        return _root() / self.id

    def to_json(self) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any], folder: Path | None = None) -> Image:
        """:param folder: where the files are; without it, where ``data`` says.

        :raise TypeError: a field is missing or unknown.
        """
        files = {key: Path(data[key]) for key in _PATHS if data.get(key)}
        places = {key: folder / file.name if folder else file for key, file in files.items()}
        return cls(**{**data, **places})


def ensure(name: str, spec: ImageSpec | None, *, base: Path, progress: Progress, refresh: bool = False) -> Image:
    """The image of that name; it is built or fetched if it is not in the cache.

    :param spec: the lab file's entry under ``images``; None for the built-in ones.
    :param base: folder of the lab file, for relative paths.
    :param progress: is told what happens when that takes a while.
    :param refresh: build it again, with the newest packages; an image that is in use stays as it is.
    :raise ImageError: there is no such image, or it could not be built or fetched.
    """
    recipe = _recipe(name, spec, base)
    if not refresh and (image := _cached(name, recipe, spec)):
        with contextlib.suppress(OSError):
            os.utime(image.folder / MANIFEST)  # when it was last used, for `prune`
        return image
    try:
        with workspace(name, progress) as folder:
            if not refresh and (image := _cached(name, recipe, spec)):
                return image
            started = time.monotonic()
            image = _publish(name, recipe.source, recipe.build(folder, progress), folder)
            progress(f"made {image.id} in {time.monotonic() - started:.1f} s")
            return image
    except (CommandError, OSError) as error:
        raise _failure(name, error) from error


@contextlib.contextmanager
def workspace(name: str, progress: Progress) -> Iterator[Path]:
    """A new folder in the cache, for one user of ``name`` at a time; what is still there at the end is removed."""
    with _locked(name, progress):
        folder = _root() / f"{_BUILD}{name}"
        _remove_tree(folder)
        try:
            yield paths.make_dir(folder)
        finally:
            _remove_tree(folder)


def find(name: str, spec: ImageSpec | None, base: Path) -> Image | None:
    """The image of that name if :func:`ensure` would find it in the cache.

    :raise ImageError: there is no such image, or its file is missing.
    """
    return _cached(name, _recipe(name, spec, base), spec)


def all_images() -> list[Image]:
    """All images in the cache, by name and then the newest first."""
    folders = sorted(_root().glob("[!.]*")) if _root().is_dir() else []
    images = [image for folder in folders if (image := _load(folder))]
    images.sort(key=lambda image: image.created, reverse=True)
    return sorted(images, key=lambda image: image.name)


def remove(image: Image) -> None:
    """Remove an image; it is gone at once even if removing its files is interrupted."""
    with workspace(image.name, lambda _: None) as folder, contextlib.suppress(FileNotFoundError):
        image.folder.rename(folder / image.id)


def prune(keep: set[str], *, older_than: float | None = None) -> list[Image]:
    """Remove images that nobody uses, and what killed builds left behind.

    :param keep: ids of images that stay.
    :param older_than: seconds; what was used later than that ago stays.
    :return: the images that were removed.
    """
    removed = []
    for image in all_images():
        used = (image.folder / MANIFEST).stat().st_mtime
        if image.id not in keep and (older_than is None or time.time() - used > older_than):
            remove(image)
            removed.append(image)
    for folder in _root().iterdir() if _root().is_dir() else []:
        if folder.name.startswith(_BUILD):
            with _locked(folder.name.removeprefix(_BUILD), None) as ours:
                if ours:
                    _remove_tree(folder)
        elif folder.is_dir() and folder.name not in keep and not _load(folder):
            _remove_tree(folder)
    return removed


def _root() -> Path:
    return paths.cache() / "images"


def _recipe(name: str, spec: ImageSpec | None, base: Path) -> Recipe:
    if spec is not None:
        return files.recipe(name, spec, base)
    if name not in BUILT_IN:
        raise ImageError(
            f"there is no image called {name}",
            hint=f"use {' or '.join(BUILT_IN)}, or describe it under `images` in the lab file",
        )
    return BUILT_IN[name]()


def _cached(name: str, recipe: Recipe, spec: ImageSpec | None) -> Image | None:
    for image in all_images():
        if image.name == name and image.source == recipe.source:
            return replace(image, cloud_init=spec.cloud_init, ready=spec.ready) if spec else image
    return None


def _load(folder: Path) -> Image | None:
    """The image in ``folder``, or None where that is damaged."""
    try:
        image = Image.from_json(json.loads((folder / MANIFEST).read_bytes()), folder)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    files = (image.kernel, image.initrd, image.disk)
    return image if image.id == folder.name and all(file is None or file.is_file() for file in files) else None


def _publish(name: str, source: str, built: Built, folder: Path) -> Image:
    image_id = f"{name}-{built.digest[:12]}"
    target = _root() / image_id
    for file in folder.iterdir():
        file.chmod(0o644)
        with file.open("rb") as data:
            os.fsync(data.fileno())
    fields: dict[str, Any] = asdict(built)
    del fields["digest"]
    fields |= {
        "id": image_id,
        "name": name,
        "size": sum(file.stat().st_blocks * 512 for file in folder.iterdir()),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source,
    }
    # The same contents again: only what is said about them is new.
    known = _load(target)
    manifest = (target if known else folder) / MANIFEST
    paths.write_atomic(manifest, json.dumps(fields, indent=2) + "\n")
    manifest.chmod(0o644)
    if not known:
        _remove_tree(target)
        folder.rename(target)
    return Image.from_json(fields, target)


@contextlib.contextmanager
def _locked(name: str, progress: Progress | None) -> Iterator[bool]:
    """Hold the lock of ``name``; without ``progress`` do not wait for it but say whether it is ours."""
    with open(paths.make_dir(_root()) / f"{_LOCK}{name}", "w") as lock:
        ours = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                progress(f"waiting for another build of {name}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            else:
                ours = False
        yield ours


def _remove_tree(folder: Path) -> None:
    """Remove a folder that is there or not; a program that was just killed may still write into it."""
    for last in (False, False, True):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            if not folder.exists():
                return
        except OSError:
            if last:
                raise
            time.sleep(0.2)
        else:
            return


def _failure(name: str, error: CommandError | OSError) -> ImageError:
    """What a user is told when a program or the system refused something."""
    if isinstance(error, OSError):
        no_room = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cause = ImageError(str(error))
    else:
        no_room = any(_NO_ROOM.search(line) for line in (error.message, *error.tail))
        cause = ImageError(error.message, hint=error.hint, command=error.command, tail=error.tail)
    if no_room:
        cause.message = f"no space left in {_root()}"
        cause.hint = "free some, try `orchestrator image prune`, or move the cache with ORCHESTRATOR_CACHE"
    message = f"image {name} could not be made: {cause.message}"
    return ImageError(message, hint=cause.hint, command=cause.command, tail=cause.tail)
