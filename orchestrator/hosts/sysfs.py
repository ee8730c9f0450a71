"""Reading /proc and /sys: what is missing, unreadable or malformed is None, never an error."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path


def text(file: Path) -> str | None:
    """The contents without surrounding white space; what is no UTF-8 is replaced."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # also EINVAL, by which a driver says that it does not know
        return None


def number(file: Path) -> int | None:
    """The whole number that is a file's contents, in decimal."""
    return whole(text(file) or "")


def whole(word: str) -> int | None:
    """``word`` as a whole number of at most 64 bits, which is what a kernel has."""
    try:
        value = int(word)
    except ValueError:
        return None
    return value if -(1 << 63) <= value < 1 << 64 else None


def link_name(link: Path) -> str | None:
    """The name of what a symbolic link points to, such as a device's driver."""
    try:
        return link.readlink().name or None
    except OSError:
        return None


def target(link: Path) -> Path | None:
    """What a symbolic link leads to in the end, without links on the way."""
    try:
        return link.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: links that lead to themselves, before Python 3.13
        return None


def entries(folder: Path) -> list[Path]:
    """What is in a folder, in the order of the names; nothing where there is no folder."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
