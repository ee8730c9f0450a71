"""The ``tiny`` image: the distribution's kernel, and an initramfs of busybox, the guest agent, ssh and iperf3.

Made for a quick start under emulation: an uncompressed kernel and initramfs, all drivers loaded by two processes, and
as few other processes as possible before the guest agent answers.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
import shutil
from pathlib import Path

from orchestrator import names, paths
from orchestrator.images import kernel as kernels
from orchestrator.images.packages import distribution, locate, resolve, unpack
from orchestrator.images.recipe import Built, Progress, Recipe, tree_digest
from orchestrator.run import run

PROGRAMS = {"qemu-guest-agent": "sbin/qemu-ga", "dropbear-bin": "sbin/dropbear", "iperf3": "bin/iperf3"}

MODULES = (
    *("virtio_pci", "virtio_net", "virtio_console", "virtio_blk", "virtio_scsi", "virtio_balloon", "virtio_rng"),
    *("virtio_mem", "e1000e", "sd_mod", "ext4", "crc32c_generic", "af_packet", "8021q"),
    *("button", "evdev", "pvpanic_mmio", "pvpanic_pci"),
)

# cryptomgr.notests saves 250 ms of self-tests, noreplace-smp 100 ms of patching on one vCPU (medians under TCG);
# pci=noearly 2.6 s under nested KVM: a search for AGP bridges, with an exit for each of 131,072 ports' reads;
# nommconf 3 s there: configuration is read by ports, not by addresses, for which KVM must take instructions apart.
CMDLINE = "console=ttyS0 quiet cryptomgr.notests noreplace-smp pci=noearly,nommconf memhp_default_state=online"

_LIBRARIES = "lib/x86_64-linux-gnu"
_LOADER = "ld-linux-x86-64.so.2"


def recipe() -> Recipe:
    """An image of the same recipe is up to date, also when there are newer packages in the release.

    :raise ImageError: this machine's packages cannot make it.
    """
    places = (Path(__file__), Path(kernels.__file__), paths.templates() / "tiny")
    return Recipe(tree_digest(*places, extra=distribution().codename), _build)


def _build(folder: Path, progress: Progress) -> Built:
    """Make ``kernel`` and ``initrd`` in ``folder``; needs no privileges."""
    progress("looking up the packages")
    packages = resolve([distribution().kernel, "busybox-static", *PROGRAMS])
    work = folder / "work"
    unpacked, root = work / "packages", work / "root"
    progress(f"fetching {len(packages)} packages")
    unpack(packages, work / "debs", unpacked)

    progress("making the initramfs")
    kernel = kernels.find(unpacked)
    (folder / "kernel").write_bytes(kernels.bootable(kernel))
    _fill(root, unpacked)
    modules = root / "lib/modules" / kernel.version
    modules.mkdir(parents=True)
    if missing := kernels.copy_modules(kernel, MODULES, modules):
        progress(f"this kernel has no {', '.join(missing)}")
    run([locate(unpacked, "bin/busybox"), "depmod", "-b", root, kernel.version])
    pack(root, folder / "initrd")
    shutil.rmtree(work)
    return Built(
        digest=names.digest(recipe().source, *(f"{name}={version}" for name, version in packages.items()), length=12),
        kernel="kernel",
        initrd="initrd",
        cmdline=CMDLINE,
        ready="agent",
    )


def _fill(root: Path, unpacked: Path) -> None:
    for name in ("dev", "proc", "sys", "run", "tmp", "usr", "var", "etc/dropbear", "root/.ssh", _LIBRARIES, "lib64"):
        (root / name).mkdir(parents=True)
    (root / "root/.ssh").chmod(0o700)
    for link, target in {
        "sbin": "bin",
        "usr/bin": "../bin",
        "usr/sbin": "../bin",
        "usr/lib": "../lib",
        "var/run": "../run",
        "init": "bin/busybox",
    }.items():
        (root / link).symlink_to(target)
    shutil.copytree(paths.templates() / "tiny", root, dirs_exist_ok=True)
    for script in (*root.glob("bin/*"), *root.glob("etc/rc*"), *root.glob("etc/acpi/*/*")):
        script.chmod(0o755)

    install_busybox(unpacked, root)

    # The loader of these packages lists the libraries of these packages: what the machine has does not matter.
    loader = locate(unpacked, f"{_LIBRARIES}/{_LOADER}")
    shutil.copy2(loader, root / "lib64" / _LOADER)
    search = f"{unpacked / _LIBRARIES}:{unpacked / 'usr' / _LIBRARIES}"
    for program in PROGRAMS.values():
        binary = locate(unpacked, program)
        shutil.copy2(binary, root / "bin")
        listing = run([loader, "--inhibit-cache", "--library-path", search, "--list", binary]).stdout.decode()
        for name, library in re.findall(r"(\S+) => (\S+) \(", listing):
            if Path(name).name == name:  # the loader itself is listed by its path
                shutil.copy2(library, root / _LIBRARIES / name)


def install_busybox(unpacked: Path, root: Path) -> None:
    """Busybox and the names of its applets, where ``root`` has no program of that name.

    All but modprobe, which the kernel would call in vain while it starts; scripts say ``busybox modprobe``.
    """
    busybox = locate(unpacked, "bin/busybox")
    shutil.copy2(busybox, root / "bin/busybox")
    for applet in run([busybox, "--list"]).stdout.decode().split():
        if applet != "modprobe" and not (root / "bin" / applet).exists():
            (root / "bin" / applet).symlink_to("busybox")


def pack(root: Path, target: Path) -> None:
    """``root`` as an uncompressed initramfs (newc), which takes less of the guest's time than a small one."""
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    archive = run(
        ["cpio", "--quiet", "--create", "--format=newc", "--reproducible", "--owner=0:0"],
        feed="\n".join(names).encode(),
        cwd=root,
    )
    target.write_bytes(archive.stdout)
