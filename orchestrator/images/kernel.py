"""A distribution kernel out of its package: the image that QEMU starts, and modules with what they depend on."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import lzma
import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.images.packages import locate
from orchestrator.run import run

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_SUFFIX = re.compile(r"\.ko(\.[a-z0-9]+)?$")


@dataclass(frozen=True)
class Kernel:
    version: str
    image: Path
    config: str
    modules: Path


def find(root: Path) -> Kernel:
    """The kernel that was unpacked into ``root``.

    :raise ImageError: there is none.
    """
    images = sorted((root / "boot").glob("vmlinuz-*"))
    if not images:
        raise ImageError("the kernel's package brings no kernel image")
    version = images[-1].name.removeprefix("vmlinuz-")
    config = root / "boot" / f"config-{version}"
    settings = config.read_text() if config.is_file() else ""
    return Kernel(version, images[-1], settings, locate(root, f"lib/modules/{version}"))


def decompress(data: bytes) -> bytes:
    """``data`` in the clear, whichever of the kernel's compressions it has (none too)."""
    if data.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data)
    if data.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(data)
    for magic, program in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x02\x21\x4c\x18", "lz4")):
        if data.startswith(magic):
            return run([program, "-dc"], feed=data).stdout
    return data


def bootable(kernel: Kernel) -> bytes:
    """What to give to ``-kernel``: the ELF inside the bzImage where the kernel can start as PVH, else the bzImage.

    Unpacking itself is the longest part of a kernel's start under emulation (3 of 5 seconds for an xz image).
    The header is that of the kernel's Documentation/arch/x86/boot.rst, protocol 2.08.
    """
    raw = kernel.image.read_bytes()
    if "CONFIG_PVH=y" not in kernel.config or raw[0x202:0x206] != b"HdrS":
        return raw
    sectors = raw[0x1F1] or 4
    offset, length = struct.unpack_from("<II", raw, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = raw[start : start + length]
    # All but gzip are followed by the size of the contents, which the unpackers do not expect.
    clear = decompress(payload if payload.startswith(b"\x1f\x8b") else payload[:-4])
    return clear if clear.startswith(b"\x7fELF") else raw


def copy_modules(kernel: Kernel, names: Iterable[str], target: Path) -> list[str]:
    """Copy modules and all that they depend on into the folder ``target``, unpacked; the names that do not exist.

    A module that is built into the kernel counts as existing.
    """
    files = {_name(path.name): path for path in kernel.modules.rglob("*.ko*")}
    listed = kernel.modules / "modules.builtin"
    built_in = {_name(Path(line).name) for line in listed.read_text().split()} if listed.is_file() else set()
    missing, done, queue = [], set(built_in), list(names)
    while queue:
        name = _name(queue.pop())
        if name in done:
            continue
        done.add(name)
        if name not in files:
            missing.append(name)
            continue
        data = decompress(files[name].read_bytes())
        (target / f"{name}.ko").write_bytes(data)
        if found := _DEPENDS.search(data):
            queue += found[1].decode().split(",") if found[1] else []
    return missing


def _name(file: str) -> str:
    return _SUFFIX.sub("", file).replace("-", "_")
