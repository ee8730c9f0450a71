"""What the ways to come by an image have in common."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator import paths

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """What a builder left in the folder that it was given.

    :ivar digest: hexadecimal; tells this image from others of its name and becomes part of the id.
    :ivar kernel: name of a file in the folder, as are ``initrd`` and ``disk``.
    """

    digest: str
    kernel: str | None = None
    initrd: str | None = None
    disk: str | None = None
    disk_format: str | None = None
    cmdline: str = ""
    cloud_init: bool = False
    ready: str = "none"


@dataclass(frozen=True)
class Recipe:
    """How to make an image.

    :ivar source: what it is made from, in a form that is quick to find; an image of the same source is up to date.
    :ivar build: makes it in a folder; on an error it may leave anything there.
    """

    source: str
    build: Callable[[Path, Progress], Built]


def tree_digest(*places: Path, extra: str = "") -> str:
    """SHA-256 over the names and contents of files, and of all files below folders but what Python compiled there."""
    total = hashlib.sha256(extra.encode())
    for place in places:
        for path in paths.sources(place) if place.is_dir() else [place]:
            total.update(f"\0{path.relative_to(place)}\0".encode())
            total.update(path.read_bytes())
    return total.hexdigest()
