"""What the ways to come by an image have in common."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """What a builder left in the folder that it was given; ``kernel``, ``initrd`` and ``disk`` are names of files.

    :ivar key: what makes this image different from another of its name; its hash becomes part of the id.
    """

    key: list[str]
    kernel: str | None = None
    initrd: str | None = None
    disk: str | None = None
    disk_format: str | None = None
    cmdline: str = ""
    cloud_init: bool = False
    ready: str = "none"


def recipe_digest(*places: Path, extra: str = "") -> str:
    """SHA-256 over the contents of files, and of all files below folders."""
    total = hashlib.sha256(extra.encode())
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                total.update(f"\0{path.relative_to(place)}\0".encode())
                total.update(path.read_bytes())
    return total.hexdigest()
