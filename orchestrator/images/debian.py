"""The ``debian`` image: an ordinary small system of the release that this machine runs, with ssh and cloud-init.

QEMU starts its kernel directly, so it needs no boot loader and no partitions, and is made without loop devices.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from orchestrator import names, paths
from orchestrator.images import kernel as kernels
from orchestrator.images import tiny
from orchestrator.images.packages import distribution, install_system, installed, locate, resolve, unpack
from orchestrator.images.recipe import Built, Progress, Recipe, tree_digest
from orchestrator.run import run

PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "kmod", "openssh-server", "cloud-init", "qemu-guest-agent"),
    *("iproute2", "iputils-ping", "procps", "e2fsprogs", "less", "sudo"),
)

SIZE = "4G"  # of the disk; what is empty takes no room
LABEL = "orc-root"
CMDLINE = "console=ttyS0 quiet cryptomgr.notests net.ifnames=0 systemd.show_status=0"

# What the initramfs needs to find the disk.
MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "ext4", "crc32c_generic")

# Kernel modules for hardware that no guest has: half of all, and what udev would load of them takes seconds.
UNUSED = (
    *("sound", "net/wireless", "net/mac80211", "net/bluetooth", "drivers/bluetooth", "drivers/cpufreq"),
    *("drivers/gpu", "drivers/hwmon", "drivers/i2c", "drivers/iio", "drivers/infiniband", "drivers/input/mouse"),
    *("drivers/isdn", "drivers/media", "drivers/mfd", "drivers/net/wireless", "drivers/platform", "drivers/staging"),
    "drivers/usb",
)


def recipe() -> Recipe:
    """:raise ImageError: this machine's packages cannot make it."""
    places = (Path(__file__), Path(kernels.__file__), paths.templates() / "debian", paths.templates() / "tiny/etc")
    return Recipe(tree_digest(*places, extra=distribution().codename), _build)


def _build(folder: Path, progress: Progress) -> Built:
    system = distribution()
    work = folder / "work"
    unpacked, root = work / "packages", work / "root"
    progress("fetching the kernel")
    unpack(resolve([system.kernel, "busybox-static"]), work / "debs", unpacked)
    kernel = kernels.find(unpacked)
    (folder / "kernel").write_bytes(kernels.bootable(kernel))
    _initramfs(unpacked, kernel, work / "initramfs", folder / "initrd")

    for unused in UNUSED:
        shutil.rmtree(kernel.modules / "kernel" / unused, ignore_errors=True)
    progress(f"installing {system.id} {system.codename}, which takes a minute or more")
    template, modules = (shlex.quote(str(path)) for path in (paths.templates() / "debian", kernel.modules))
    install_system(
        system,
        root,
        PACKAGES,
        [
            f'mkdir -p "$1/usr/lib/modules" && cp -r {modules} "$1/usr/lib/modules/"',
            f'cp -r {template}/root/. "$1/" && sh {template}/customize "$1" {kernel.version}',
        ],
    )
    progress("making the disk")
    raw = work / "disk.raw"
    run(["mke2fs", "-q", "-t", "ext4", "-L", LABEL, "-d", root, raw, SIZE], timeout=600)
    run(["qemu-img", "convert", "-O", "qcow2", raw, folder / "disk"], timeout=600)
    packages = installed(root)
    shutil.rmtree(work)
    return Built(
        digest=names.digest(recipe().source, kernel.version, packages, length=12),
        kernel="kernel",
        initrd="initrd",
        disk="disk",
        disk_format="qcow2",
        cmdline=f"{CMDLINE} root=LABEL={LABEL}",
        cloud_init=True,
        ready="agent",
    )


def _initramfs(unpacked: Path, kernel: kernels.Kernel, root: Path, target: Path) -> None:
    """The least that mounts the disk: much quicker to start than the distribution's own."""
    modules = root / "lib/modules" / kernel.version
    for place in (modules, *(root / name for name in ("bin", "dev", "etc", "proc", "sys", "root"))):
        place.mkdir(parents=True)
    tiny.install_busybox(unpacked, root)
    shutil.copy2(paths.templates() / "debian/init", root / "init")
    shutil.copy2(paths.templates() / "tiny/etc/drivers", root / "etc/drivers")
    (root / "init").chmod(0o755)
    kernels.copy_modules(kernel, MODULES, modules)
    run([locate(unpacked, "bin/busybox"), "depmod", "-b", root, kernel.version])
    tiny.pack(root, target)
