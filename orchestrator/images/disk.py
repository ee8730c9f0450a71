"""Disks of guests, made on the host that has the guest: overlays, empty disks and NoCloud seeds."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import CommandError, ImageError
from orchestrator.run import Args, run
from orchestrator.spec.base import format_size


def info(path: Path) -> dict[str, Any]:
    """What ``qemu-img info`` says of an image, also of one that is in use.

    :raise ImageError: it is missing or damaged.
    """
    found = _run(path, ["qemu-img", "info", "--force-share", "--output=json", path.absolute()])
    return dict(json.loads(found))


def create_overlay(base: Path, base_format: str, target: Path, size: int | None) -> None:
    """A disk that has the contents of ``base`` and takes all writes; ``base`` is never written.

    :param base_format: qcow2 or raw, written down so that nobody has to guess (or can be misled).
    :param size: bytes; None for the size of ``base``.
    :raise ImageError: ``base`` is missing or larger than ``size``, or the disk could not be made.
    """
    virtual = info(base)["virtual-size"]
    if size is not None and size < virtual:
        raise ImageError(
            f"a disk of {format_size(size)} is smaller than its image", hint=f"the image has {format_size(virtual)}"
        )
    backing = ["-b", str(base.absolute()), "-F", base_format]
    _create(target, [*backing, "{}", *([str(size)] if size is not None else [])])


def create_empty(target: Path, size: int) -> None:
    """A qcow2 disk of ``size`` bytes that reads as zeros.

    :raise ImageError: it could not be made.
    """
    _create(target, ["{}", str(size)])


def backing_file(target: Path) -> Path | None:
    """What ``target`` lies on, or None where it stands alone.

    :raise ImageError: ``target`` is missing or damaged.
    """
    name = info(target).get("full-backing-filename")
    return Path(name) if name else None


def create_seed(target: Path, meta_data: str, user_data: str, network_config: str) -> None:
    """A NoCloud seed: an ISO 9660 image with the label CIDATA. The same data give the same bytes.

    :raise ImageError: it could not be made.
    """
    with tempfile.TemporaryDirectory(prefix="orc-seed-") as name, _replacing(target) as temporary:
        folder = Path(name)
        contents = {"meta-data": meta_data, "user-data": user_data, "network-config": network_config}
        for file, text in contents.items():
            (folder / file).write_text(text)
            os.utime(folder / file, (0, 0))
        xorriso = ("xorriso", "-as", "mkisofs", "-quiet", "-volid", "CIDATA", "-joliet", "-rational-rock")
        inputs = (folder / file for file in contents)
        _run(target, [*xorriso, "-output", temporary, *inputs], env={"SOURCE_DATE_EPOCH": "0"})


def _create(target: Path, words: list[str]) -> None:
    with _replacing(target) as temporary:
        _run(
            target,
            ["qemu-img", "create", "-q", "-f", "qcow2", *(word.replace("{}", str(temporary)) for word in words)],
        )


def _run(path: Path, command: Args, env: dict[str, str] | None = None) -> bytes:
    try:
        return run(command, env=env).stdout
    except CommandError as error:
        raise ImageError(
            f"{path}: {error.message}", hint=error.hint, command=error.command, tail=error.tail
        ) from error


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A name for the file to be made, which becomes ``target`` in one step if all goes well."""
    temporary = target.absolute().with_name(f".{target.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
