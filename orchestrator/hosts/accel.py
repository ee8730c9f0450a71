"""Which accelerator guests get: KVM where it really runs a guest, TCG elsewhere.

That ``/dev/kvm`` opens says little: there are machines where it does, where a VM can be made and even some
instructions run, and where a guest nevertheless hangs, or is slower than emulation. So a guest is run: QEMU's own
firmware loads a boot sector of 512 bytes, which writes to the ``isa-debug-exit`` port and so chooses QEMU's exit
status. The same guest under TCG, just before, is the yardstick: what takes several times longer than emulation does
not accelerate.

Verdicts are kept under ``paths.cache()/probes`` until the machine boots again, or the emulator or ``/dev/kvm``
changes.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pwd
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from orchestrator import paths
from orchestrator.errors import CommandError, HostError
from orchestrator.names import digest
from orchestrator.patience import scaled
from orchestrator.run import describe_exit, run

log = logging.getLogger(__name__)

DEFAULT_EMULATOR = "qemu-system-x86_64"
KVM = Path("/dev/kvm")
TCG_SECONDS = 20.0
SLOWDOWN = 5.0
"""KVM may take this many times what TCG took, and a second: a busy machine is not a broken one."""

_EMULATOR_USERS = ("libvirt-qemu", "qemu")  # Debian and Ubuntu; Fedora
_EXIT_STATUS = 33  # isa-debug-exit: (value written << 1) | 1
_BOOT_SECTOR = bytes.fromhex("baf400 b010 ee f4")  # mov dx, 0xf4; mov al, 0x10; out dx, al; hlt
_DISK_SIZE = 1 << 20  # a smaller disk has no whole cylinder, and SeaBIOS does not boot from it
_MACHINES = {"tcg": ["-accel", "tcg", "-cpu", "max"], "kvm": ["-accel", "kvm", "-cpu", "host"]}


@dataclass(frozen=True)
class Verdict:
    """The fastest accelerator that runs a guest.

    :param works: False: not even this one runs a guest. None: there is no emulator to try it with.
    :param reason: one sentence that says why this one and not the other.
    :param seconds: what the tiny guest took under ``kind``, from QEMU's start to its end.
    :param emulator: the program that was tried, as a full path where it was found.
    """

    kind: Literal["kvm", "tcg"]
    works: bool | None
    reason: str
    seconds: float | None
    emulator: str


_INHERITED = "ORCHESTRATOR_ACCEL_VERDICT"  # in the environment, for programs that we start too


def inherit(verdict: Verdict) -> None:
    """Take ``verdict`` for every emulator from now on, also in children of this process: for who hides ``/dev/kvm``
    from them because of it."""
    os.environ[_INHERITED] = json.dumps(asdict(verdict))


def probe(emulator: str = DEFAULT_EMULATOR, *, fresh: bool = False) -> Verdict:
    """Run a tiny guest under TCG and KVM, or tell what that gave since this machine booted.

    :param emulator: program name or path.
    :param fresh: try again although a verdict is known. Takes up to 1 s + 6 times what TCG takes (0.1 s).
    """
    if inherited := os.environ.get(_INHERITED):
        return replace(Verdict(**json.loads(inherited)), emulator=emulator)
    path = shutil.which(emulator)
    if path is None:
        return Verdict("tcg", None, f"{emulator} is not installed", None, emulator)
    folder = paths.cache() / "probes"
    cached = folder / f"accel-{_key(path)}.json"
    with _lock(folder):
        if not fresh and (known := _load(cached)):
            return known
        verdict = _judge(path)
        if verdict.works:
            try:
                paths.write_atomic(cached, json.dumps(asdict(verdict)))
            except OSError as error:
                log.info("the verdict is not kept: %s", error)
        return verdict


def no_kvm() -> Path:
    """A file that nobody can use as KVM, to be mounted over :data:`KVM` where that does not work. There is one for
    all, as what libvirt finds out with it is kept for this file."""
    empty = paths.make_dir(paths.cache()) / "no-kvm"
    empty.touch(mode=0o600)
    return empty


def choose(wanted: Literal["auto", "kvm", "tcg"], emulator: str = DEFAULT_EMULATOR) -> tuple[str, str]:
    """The accelerator for a guest and the reason, in one sentence.

    :raise HostError: KVM is demanded and does not work here.
    """
    if wanted == "tcg":
        return "tcg", "TCG was asked for"
    verdict = probe(emulator)
    if wanted == "kvm" and verdict.kind != "kvm":
        raise HostError(
            f"KVM was asked for but cannot be used: {verdict.reason}",
            hint="`accel: auto` takes TCG where KVM does not work; `orchestrator doctor` says what KVM lacks",
        )
    return verdict.kind, verdict.reason


def emulator_user() -> str | None:
    """The user that libvirt runs QEMU as; None where that is the caller (not root, or no such user exists)."""
    if os.geteuid() != 0:
        return None
    for name in _EMULATOR_USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None


def allowed(path: Path, mode: str, user: str | None) -> bool:
    """Whether ``user`` (None: the caller) has all accesses in ``mode``, letters of ``rwx``, to ``path``.

    Asked of the kernel as that user, so that access lists and every folder on the way count.

    :raise CommandError: the other user cannot be taken on.
    """
    if user is None:
        return os.access(path, sum({"r": os.R_OK, "w": os.W_OK, "x": os.X_OK}[letter] for letter in mode))
    who = pwd.getpwnam(user)
    become = ["setpriv", f"--reuid={who.pw_uid}", f"--regid={who.pw_gid}", "--init-groups"]
    tests = [word for letter in mode for word in ("-a", f"-{letter}", str(path))][1:]
    done = run([*become, "--", "test", *tests], check=False, timeout=20)
    if done.returncode > 1 or done.stderr:
        raise CommandError(f"setpriv cannot become {user}: {done.stderr.decode(errors='replace').strip()}")
    return done.returncode == 0


@dataclass(frozen=True)
class _Attempt:
    """How the tiny guest fared: the seconds it took, or what went wrong."""

    seconds: float | None
    problem: str = ""


def _judge(emulator: str) -> Verdict:
    tcg = _attempt(emulator, "tcg", scaled(TCG_SECONDS))
    kvm = _attempt_kvm(emulator, tcg)
    user = emulator_user()
    if kvm.seconds is not None and (user is None or allowed(KVM, "rw", user)):
        return Verdict("kvm", True, f"KVM runs a guest ({kvm.seconds:.2f} s)", kvm.seconds, emulator)
    if kvm.seconds is not None:
        problem = f"KVM runs a guest ({kvm.seconds:.2f} s), but {user}, as whom libvirt runs QEMU, may not open {KVM}"
    else:
        problem = f"KVM does not run a guest here: {kvm.problem}"
    if tcg.seconds is None:
        return Verdict("tcg", False, f"{problem}; TCG does not run one either: {tcg.problem}", None, emulator)
    return Verdict("tcg", True, f"{problem}; guests run under TCG, slower", tcg.seconds, emulator)


def _attempt_kvm(emulator: str, tcg: _Attempt) -> _Attempt:
    if not KVM.exists():
        return _Attempt(None, f"there is no {KVM}")
    if not allowed(KVM, "rw", None):
        return _Attempt(None, f"this user may not open {KVM}")
    limit = scaled(TCG_SECONDS) if tcg.seconds is None else SLOWDOWN * tcg.seconds + 1
    return _attempt(emulator, "kvm", limit)


def _attempt(emulator: str, kind: Literal["kvm", "tcg"], limit: float) -> _Attempt:
    """Run the tiny guest for at most ``limit`` seconds."""
    with tempfile.TemporaryDirectory(prefix="orc-accel-") as folder:  # a core dump, too, ends up there
        disk = Path(folder, "boot.img")
        disk.write_bytes(_BOOT_SECTOR.ljust(510, b"\xf4") + b"\x55\xaa")
        os.truncate(disk, _DISK_SIZE)
        args = [emulator, "-M", "q35", *_MACHINES[kind], "-m", "32", "-nodefaults", "-no-user-config", "-no-reboot"]
        args += ["-display", "none", "-drive", f"file={disk},format=raw,if=virtio"]
        args += ["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
        started = time.monotonic()
        try:
            done = run(args, cwd=Path(folder), timeout=limit, check=False)
        except CommandError as error:
            if time.monotonic() - started < limit:
                return _Attempt(None, error.message)
            return _Attempt(None, f"a guest of a few instructions did not end within {limit:.1f} s")
        seconds = time.monotonic() - started
    if done.returncode == _EXIT_STATUS:
        return _Attempt(round(seconds, 3))
    ended = f"QEMU {describe_exit(done.returncode)}" if done.returncode else "the guest stopped before its end"
    said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if "warning:" not in line]
    why = said[0].removeprefix(f"{Path(emulator).name}: ").removeprefix("error: ") if said else ""
    return _Attempt(None, f"{ended}: {why}" if why else ended)


def _key(emulator: str) -> str:
    """What a verdict depends on; another boot, emulator, user or ``/dev/kvm`` is another question."""
    program = Path(emulator).resolve()
    file = program.stat()
    try:
        kvm = KVM.stat()
        device: tuple[int, ...] = (kvm.st_rdev, kvm.st_ino, kvm.st_mode, kvm.st_uid, kvm.st_gid)
    except OSError:
        device = ()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    facts = (program, file.st_mtime_ns, file.st_size, device, os.geteuid(), emulator_user())
    return digest(boot, *map(str, facts), length=16)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One probe at a time: two at once would be slower than either, and judge each other's slowness.

    Without a folder that can be written to, there is no lock and nothing is kept, which costs time only.
    """
    with contextlib.ExitStack() as held:
        try:
            paths.make_dir(folder)
            file = held.enter_context(open(folder / "accel.lock", "w"))
        except OSError as error:
            log.info("%s cannot be used: %s", folder, error)
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load(file: Path) -> Verdict | None:
    """A verdict that was kept; None where there is none or the file is damaged."""
    try:
        data = json.loads(file.read_text())
        verdict = Verdict(**data)
    except (OSError, ValueError, TypeError):
        return None
    return verdict if verdict.kind in ("kvm", "tcg") and isinstance(verdict.reason, str) else None
