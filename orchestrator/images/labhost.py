"""The ``labhost`` image: a computer of the lab as a disk, from which Vagrant's machines are made.

A small system of the release that this machine runs, with KVM, QEMU and libvirt, and nothing that a lab host has no
use for. It starts from its disk by itself (BIOS), and is made without loop devices: the file system is filled by
mke2fs, and GRUB's two parts are written where its installer would write them.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import shlex
import shutil
import struct
from pathlib import Path

from orchestrator import names, paths
from orchestrator.images import playing
from orchestrator.images.packages import distribution, install_system, installed
from orchestrator.images.recipe import Built, Progress, Recipe, tree_digest
from orchestrator.run import run

NAME = "labhost"

PACKAGES = (
    # a system that starts, is reached and is provisioned
    *("systemd-sysv", "udev", "dbus", "kmod", "initramfs-tools", "zstd", "grub-common", "grub-pc-bin"),
    *("openssh-server", "sudo", "python3", "python3-apt", "python3-venv", "iproute2", "iputils-ping", "procps"),
    # a host of guests
    *("qemu-system-x86", "qemu-utils", "libvirt-daemon-system", "libvirt-clients", "python3-libvirt"),
    *("dnsmasq-base", "iptables", "nftables", "pciutils"),
)
OWN_PACKAGES = {
    "debian": ("linux-image-cloud-amd64", "systemd-resolved"),
    "ubuntu": ("linux-image-virtual", "systemd-resolved"),
}

SIZE = 32 << 30  # bytes of the disk; what is empty takes no room
LABEL = "labroot"
_FIRST = 1 << 20  # byte at which the one partition begins; GRUB's core image is before it
_SECTOR = 512


def recipe() -> Recipe:
    """:raise ImageError: this machine's packages cannot make it."""
    places = (Path(__file__), Path(playing.__file__), paths.templates() / "labhost", paths.ansible())
    return Recipe(tree_digest(*places, extra=distribution().codename), _build)


def _build(folder: Path, progress: Progress) -> Built:
    system = distribution()
    work = folder / "work"
    root = work / "root"
    work.mkdir()
    template = shlex.quote(str(paths.templates() / "labhost"))
    progress(f"installing {system.id} {system.codename} with QEMU and libvirt, which takes a minute or more")
    install_system(
        system,
        root,
        (*PACKAGES, *OWN_PACKAGES[system.id]),
        [*playing.hooks(work), f'sh {template}/customize "$1" {LABEL}'],
        # before the first package: the kernel's package makes an initramfs by these settings
        [f'--essential-hook=cp -r {template}/root/. "$1/"', "--aptopt=APT::Install-Recommends false"],
    )
    progress("making the disk")
    raw = work / "disk.raw"
    _make_disk(root, raw)
    run(["qemu-img", "convert", "-O", "qcow2", raw, folder / "disk"], timeout=600)
    packages = installed(root)
    shutil.rmtree(work)
    return Built(digest=names.digest(recipe().source, packages, length=12), disk="disk", disk_format="qcow2")


def _make_disk(root: Path, raw: Path) -> None:
    """A partitioned disk with the system in ``root``, which starts by GRUB.

    The boot sector expects the core image in the sectors behind it, and the core image was made to find the file
    system by its label (GNU GRUB manual, "BIOS installation").
    """
    raw.touch()
    os.truncate(raw, SIZE)
    options = f"offset={_FIRST},lazy_itable_init=1,nodiscard"
    size = f"{(SIZE - _FIRST) >> 10}k"
    run(["mke2fs", "-q", "-t", "ext4", "-L", LABEL, "-i", "65536", "-E", options, "-d", root, raw, size], timeout=600)
    boot = (root / "usr/lib/grub/i386-pc/boot.img").read_bytes()
    core = (root / "boot/grub/core.img").read_bytes()
    if len(core) > _FIRST - _SECTOR:
        raise ValueError(f"GRUB's core image of {len(core)} bytes does not fit before the partition")
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", _FIRST // _SECTOR, _sectors())
    with raw.open("r+b") as disk:
        disk.write(boot[:440])
        disk.seek(446)
        disk.write(entry.ljust(64, b"\0") + b"\x55\xaa")
        disk.write(core)


def _sectors() -> int:
    return (SIZE - _FIRST) // _SECTOR
