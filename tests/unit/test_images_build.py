"""The parts of a build that need neither packages nor a guest."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import gzip
import lzma
import platform
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orchestrator import paths
from orchestrator.errors import CommandError, ImageError
from orchestrator.images import kernel as kernels
from orchestrator.images import packages, tiny
from orchestrator.images.recipe import tree_digest

ELF = b"\x7fELF" + bytes(4000)


def bzimage(payload: bytes) -> bytes:
    """A boot sector and 4 sectors of set-up, and 64 bytes further the payload (Documentation/arch/x86/boot.rst)."""
    image = bytearray(5 * 512 + 64) + payload + b"\0" * 100
    image[0x1F1] = 4
    image[0x202:0x206] = b"HdrS"
    image[0x248:0x250] = struct.pack("<II", 64, len(payload))
    return bytes(image)


@pytest.fixture
def kernel(tmp_path: Path) -> kernels.Kernel:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "modules.builtin").write_text("kernel/drivers/acpi/button.ko\n")
    return kernels.Kernel("6.1", tmp_path / "vmlinuz", "CONFIG_PVH=y\n", modules)


@pytest.mark.parametrize("payload", [gzip.compress(ELF), lzma.compress(ELF) + struct.pack("<I", len(ELF))])
def test_the_kernel_inside_the_image_is_started_directly(kernel: kernels.Kernel, payload: bytes) -> None:
    kernel.image.write_bytes(bzimage(payload))
    assert kernels.bootable(kernel) == ELF


@pytest.mark.parametrize("image", [b"not a kernel", bzimage(gzip.compress(b"no program")), bzimage(b"unknown")])
def test_an_image_that_cannot_be_opened_is_started_as_it_is(kernel: kernels.Kernel, image: bytes) -> None:
    kernel.image.write_bytes(image)
    assert kernels.bootable(kernel) == image


def test_a_kernel_without_pvh_is_started_as_it_is(kernel: kernels.Kernel) -> None:
    image = bzimage(gzip.compress(ELF))
    kernel.image.write_bytes(image)
    plain = kernels.Kernel(kernel.version, kernel.image, "# CONFIG_PVH is not set\n", kernel.modules)
    assert kernels.bootable(plain) == image


def test_modules_come_with_all_that_they_need(kernel: kernels.Kernel, tmp_path: Path) -> None:
    def module(name: str, needs: str, *, pack: bool = False) -> bytes:
        data = b"\x7fELF\0license=GPL\0depends=" + needs.encode() + b"\0name=x\0"
        folder = kernel.modules / "kernel/drivers"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.ko{'.xz' if pack else ''}").write_bytes(lzma.compress(data) if pack else data)
        return data

    module("virtio-net", "virtio,net_failover")
    module("net_failover", "failover", pack=True)
    inner = module("failover", "", pack=True)
    module("virtio", "virtio_ring")
    module("virtio_ring", "virtio")  # a circle must not matter
    module("unwanted", "")
    target = tmp_path / "target"
    target.mkdir()
    assert kernels.copy_modules(kernel, ["virtio_net", "button", "e1000e"], target) == ["e1000e"]
    found = {path.name for path in target.iterdir()}
    assert found == {f"{name}.ko" for name in ("virtio_net", "net_failover", "failover", "virtio", "virtio_ring")}
    assert (target / "failover.ko").read_bytes() == inner


def test_packages_without_a_kernel_return_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no kernel image"):
        kernels.find(tmp_path)


PLAN = """Inst libc6 (2.36-9 Debian:12/oldstable [amd64]) []
Inst perl-base (5.36.0-7 Debian:12 [amd64])
Inst libnuma1 (2.0.16-1 Debian:12 [amd64])
Inst agent (1:7.2+dfsg-7 Debian:12 [amd64])
Inst linux-image-6.1.0-56-amd64 (6.1.192-2 Debian:12 [amd64])
Inst linux-image-amd64 (6.1.192-2 Debian:12 [amd64])
Conf agent (1:7.2+dfsg-7 Debian:12 [amd64])
"""
SHOWN = """Package: libc6
Version: 2.36-9

Package: libnuma1
Depends: libc6 (>= 2.33)

Package: perl-base
Pre-Depends: libc6

Package: agent
Depends: perl-base, libnuma1 (>= 2.0.11) | libnothere, libc6:any
Description: one
 more line

Package: linux-image-amd64
Depends: linux-image-6.1.0-56-amd64 (= 6.1.192-2)

Package: linux-image-6.1.0-56-amd64
Depends: perl-base
"""


def test_packages_come_with_libraries_and_kernel_but_no_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(args, 0, (PLAN if args[0] == "apt-get" else SHOWN).encode(), b"")

    monkeypatch.setattr(packages, "run", run)
    assert packages.resolve(["agent", "linux-image-amd64"]) == {
        "agent": "1:7.2+dfsg-7",
        "libc6": "2.36-9",
        "libnuma1": "2.0.16-1",
        "linux-image-6.1.0-56-amd64": "6.1.192-2",
        "linux-image-amd64": "6.1.192-2",
    }


def test_an_unknown_package_returns_error_with_what_apt_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **options: Any) -> None:
        raise CommandError("apt-get failed", command="apt-get", tail=["E: Unable to locate"], hint=options["hint"])

    monkeypatch.setattr(packages, "run", run)
    with pytest.raises(ImageError, match="apt cannot resolve agent") as caught:
        packages.resolve(["agent"])
    assert caught.value.tail == ("E: Unable to locate",)
    assert "apt-get update" in str(caught.value.hint)


def test_only_the_release_of_this_machine_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [
        "Debian|bookworm|/usr/share/keyrings/d.gpg|http://mirror.example/debian/|bookworm|main",
        "Debian|bookworm-security|$(SIGNED_BY)|http://mirror.example/security/|bookworm-security|main",
        "Debian|bookworm-security|$(SIGNED_BY)|http://mirror.example/security/|bookworm-security|main",
        "Debian|trixie|$(SIGNED_BY)|http://mirror.example/debian/|trixie|main",
        "Somebody|bookworm|$(SIGNED_BY)|http://elsewhere.example/|bookworm|main",
    ]
    answer = subprocess.CompletedProcess([], 0, "\n".join(targets).encode(), b"")
    monkeypatch.setattr(packages, "run", lambda *_, **__: answer)
    system = packages.Distribution("debian", "bookworm", "", "")
    assert packages.sources(system).splitlines() == [
        "deb [signed-by=/usr/share/keyrings/d.gpg] http://mirror.example/debian/ bookworm main",
        "deb http://mirror.example/security/ bookworm-security main",
    ]
    with pytest.raises(ImageError, match="no lists of debian sid"):
        packages.sources(packages.Distribution("debian", "sid", "", ""))


@pytest.mark.parametrize(("release", "machine"), [({"ID": "fedora"}, "x86_64"), ({"ID": "debian"}, "aarch64")])
def test_another_system_or_processor_returns_error(
    monkeypatch: pytest.MonkeyPatch, release: dict[str, str], machine: str
) -> None:
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: release)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(ImageError, match=f"images cannot be built on {release['ID']} {machine}") as caught:
        tiny.recipe()
    assert "path or url" in str(caught.value.hint)


def test_a_recipe_changes_with_every_file_that_goes_in(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/rc").write_text("a")
    first = tree_digest(tmp_path)
    assert tree_digest(tmp_path) == first
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/plugin.pyc").write_bytes(b"")
    assert tree_digest(tmp_path) == first
    assert tree_digest(tmp_path, extra="trixie") != first
    (tmp_path / "etc/rc").rename(tmp_path / "etc/rc2")
    assert tree_digest(tmp_path) != first


@pytest.mark.parametrize(
    "script",
    [
        path
        for folder in ("tiny", "debian")
        for path in sorted((paths.templates() / folder).rglob("*"))
        if path.is_file() and path.read_bytes().startswith(b"#!/bin/sh")
    ],
    ids=lambda path: path.name,
)
def test_scripts_of_guests_are_well_formed(script: Path) -> None:
    subprocess.run(["sh", "-n", script], check=True)
