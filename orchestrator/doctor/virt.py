"""Probes of what runs guests: accelerator, QEMU, libvirt, and the rights of the user that QEMU runs as."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Collection
from pathlib import Path

from orchestrator import paths
from orchestrator.doctor.kernel import LIBC
from orchestrator.doctor.machine import existing
from orchestrator.doctor.model import Finding, bad, good, unknown
from orchestrator.errors import CommandError
from orchestrator.hosts import accel
from orchestrator.hosts.accel import DEFAULT_EMULATOR, KVM
from orchestrator.patience import scaled
from orchestrator.run import run, spawn, tail_of

QEMU_WANTED = (7, 2)
LIBVIRT_WANTED = (9, 0)
EMBEDDED_SECONDS = 30.0

_INSTALL_QEMU = "install QEMU (Debian and Ubuntu: qemu-system-x86)"
_INSTALL_LIBVIRT = "install libvirt (Debian and Ubuntu: libvirt-daemon-system) and libvirt-python"
_NEEDED = {  # what `qemu -KIND help` must list
    "device": ("virtio-net-pci", "virtio-blk-pci", "virtio-serial-pci", "virtio-rng-pci", "vhost-user-blk-pci"),
    "object": ("memory-backend-memfd",),
    "netdev": ("tap", "vhost-user"),
}
_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def accelerator() -> Finding:
    """KVM, if it runs a guest; else TCG."""
    verdict = accel.probe(fresh=True)
    if verdict.works is None:
        return bad(verdict.reason, _INSTALL_QEMU)
    if not verdict.works:
        return bad(verdict.reason, "run the command of QEMU by hand and see what it says; reinstall QEMU")
    if verdict.kind == "kvm":
        return good(verdict.reason)
    flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    return good(verdict.reason, fix=kvm_fix(flags, runs=verdict.reason.startswith("KVM runs")))


def kvm_fix(flags: Collection[str], *, runs: bool = False) -> str:
    """What would make KVM work on this machine, as far as can be told.

    :param flags: the processor's, as in ``/proc/cpuinfo``.
    :param runs: KVM works, but not for the user that QEMU runs as.
    """
    if runs:
        return f"for KVM: chgrp kvm {KVM}; chmod 660 {KVM}; usermod -aG kvm {accel.emulator_user()}"
    if KVM.exists() and not accel.allowed(KVM, "rw", None):
        return f"for KVM: add this user to the group of {KVM}"
    module = "kvm_amd" if "svm" in flags else "kvm_intel" if "vmx" in flags else None
    if module and not KVM.exists():
        return f"for KVM: modprobe {module}; where that fails, switch it on in the firmware's setup"
    if "hypervisor" in flags:
        return "for KVM: this machine is virtual; its own hypervisor must offer nested virtualization"
    if not KVM.exists():
        return "for KVM: switch on virtualization (VT-x, AMD-V) in the firmware's setup"
    return "for KVM: see what the kernel says: dmesg | grep -i kvm"


def qemu() -> Finding:
    """QEMU's version, and the devices and back ends that labs use."""
    program = shutil.which(DEFAULT_EMULATOR)
    if program is None:
        return bad(f"{DEFAULT_EMULATOR} is not installed", _INSTALL_QEMU)
    said = run([program, "--version"], timeout=20).stdout.decode(errors="replace")
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", said)
    if match is None:
        return unknown(f"{program} does not tell its version", *said.splitlines()[:1])
    version = tuple(map(int, match.groups()))
    name = f"QEMU {'.'.join(match.groups())}"
    accelerators = run([program, "-accel", "help"], timeout=20).stdout.decode(errors="replace").splitlines()[1:]
    facts = [program, f"accelerators: {' '.join(accelerators)}"]
    if version < QEMU_WANTED:
        return bad(f"{name} is too old", f"install QEMU {'.'.join(map(str, QEMU_WANTED))} or newer", *facts)
    lacking = []
    for kind, wanted in _NEEDED.items():
        listed = run([program, "-M", "none", f"-{kind}", "help"], timeout=20).stdout.decode(errors="replace")
        lacking += [one for one in wanted if not re.search(rf"(?<![\w-]){re.escape(one)}(?![\w-])", listed)]
    if lacking:
        return bad(f"{name} lacks {', '.join(lacking)}", _INSTALL_QEMU, *facts)
    return good(f"{name} has all devices that labs use", *facts)


def libvirt() -> Finding:
    """libvirt's embedded driver, which local hosts use: open it and ask for QEMU's capabilities."""
    program = shutil.which(DEFAULT_EMULATOR) or DEFAULT_EMULATOR
    with tempfile.TemporaryDirectory(prefix="orc-") as root:
        Path(root).chmod(0o711)  # QEMU's sockets are in there, and QEMU runs as another user
        said, errors = Path(root, "said"), Path(root, "errors")
        with open(said, "wb") as out, open(errors, "wb") as err:
            command = [sys.executable, "-m", "orchestrator.doctor.embedded", root, program]
            ended = _run_and_reap(command, out.fileno(), err.fileno(), scaled(EMBEDDED_SECONDS))
        tail = tail_of(errors.read_bytes(), 3)
        try:
            answer = json.loads(said.read_bytes())
        except ValueError:
            answer = {"error": tail[-1] if tail else f"no answer within {EMBEDDED_SECONDS:.0f} s"}
    if not ended:
        return bad("libvirt's embedded driver does not answer in time", "see `virt-host-validate qemu`", *tail)
    if "error" in answer:
        return bad(f"libvirt's embedded driver does not work: {answer['error']}", _INSTALL_LIBVIRT, *tail)
    version, emulator = (_version(int(answer[key])) for key in ("library", "emulator"))
    facts = f"libvirt {_dotted(version)}, which finds QEMU {_dotted(emulator)}"
    if version < LIBVIRT_WANTED:
        return bad(f"{facts}, is too old", f"install libvirt {_dotted(LIBVIRT_WANTED)} or newer")
    return good(f"{facts}, works without a daemon")


def _run_and_reap(command: list[str], out: int, err: int, seconds: float) -> bool:
    """Run ``command`` as the subreaper of its orphans; whether it ended by itself.

    libvirt asks QEMU for its capabilities by way of daemons, and waits until each has vanished; where process 1 is
    slow to reap orphans, as in many containers, that would take its time. All children of this process are reaped and
    in the end killed, so it must be one that has no others.
    """
    LIBC.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = spawn(command, stdout=out, stderr=err)
    ended = threading.Event()

    def reap() -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, 0)
            except ChildProcessError:
                return
            if pid == child.pid:
                child.returncode = os.waitstatus_to_exitcode(status)
                ended.set()

    reaper = threading.Thread(target=reap, daemon=True)
    reaper.start()
    by_itself = ended.wait(seconds)
    while reaper.is_alive():
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reaper.join(0.05)  # children of what was killed become ours; they come next
    return by_itself


def _children() -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def libvirtd() -> Finding:
    """The host's libvirt daemon, which remote hosts use where there is one."""
    try:
        import libvirt as library
    except ImportError:
        return bad("libvirt-python is not installed", _INSTALL_LIBVIRT)
    library.registerErrorHandler(lambda *_: None, None)
    try:
        connection = library.openReadOnly("qemu:///system")
    except library.libvirtError as error:
        reason = error.get_error_message()
        return unknown(f"no libvirt daemon answers, which matters for `libvirt: system` only: {reason}")
    version = _dotted(_version(connection.getLibVersion()))
    connection.close()
    return good(f"libvirt daemon {version} answers at qemu:///system")


def emulator_rights() -> Finding:
    """The user that libvirt runs QEMU as gets at images, disks and sockets."""
    user = accel.emulator_user()
    if user is None:
        return good("QEMU runs as this user")
    try:
        for folder in (paths.cache(), paths.state(), paths.runtime()):
            for place in (*reversed(existing(folder).parents), existing(folder)):
                if not accel.allowed(place, "x", user):
                    fix = f"chmod o+x {place}, or set ORCHESTRATOR_CACHE, _STATE and _RUN to other folders"
                    return bad(f"{user}, as whom libvirt runs QEMU, cannot enter {place}", fix)
    except CommandError as error:
        return unknown(error.message)
    return good(f"{user}, as whom libvirt runs QEMU, reaches the folders of images, disks and sockets")


def _version(number: int) -> tuple[int, int, int]:
    """libvirt packs versions as major * 1,000,000 + minor * 1,000 + release."""
    return number // 1_000_000, number // 1_000 % 1_000, number % 1_000


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
