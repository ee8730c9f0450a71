"""Computers for tests: namespaces of everything on this machine, each with an sshd and a libvirtd of its own.

A computer is one tree of processes. Its first process (the second half of this file) makes what it needs, starts the
daemons and reaps. When it ends the kernel ends all the others, and mounts and links go with the last of them.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BRIDGE = "orc-comp"
TOOLKIT = Path(sys.executable).parent / "orchestrator"
SECONDS = 120.0
STATE_MIB = 600
"""Room for guests' disks on each computer."""


# -- this machine's half ---------------------------------------------------------------------------------------------


def run(*words: str | Path) -> None:
    done = subprocess.run([str(word) for word in words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


@contextlib.contextmanager
def bridge(name: str, address: str) -> Iterator[None]:
    """A bridge of this machine for one test run at a time: a second one waits; what a killed one has left goes."""
    with open(f"/run/{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)
        run("ip", "link", "add", "name", name, "type", "bridge")
        try:
            run("ip", "addr", "add", address, "dev", name)
            run("ip", "link", "set", name, "up")
            yield
        finally:
            subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)


@dataclass
class Computer:
    """One computer. ``pid``: its first process."""

    name: str
    address: str
    folder: Path
    pid: int

    def command(self, *words: str | Path) -> list[str]:
        """A command that runs there."""
        return ["nsenter", f"--target={self.pid}", "-m", "-u", "-n", "-p", "-i", "--wd=/", "--", *map(str, words)]

    def run(self, *words: str | Path) -> str:
        done = subprocess.run(self.command(*words), check=False, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, f"{self.name}: {words}: {done.stdout}{done.stderr}"
        return done.stdout

    def path(self, path: str) -> Path:
        """A file of that computer, as seen from here."""
        return Path(f"/proc/{self.pid}/root{path}")

    def stop_libvirtd(self) -> None:
        """Kill it; guests run on."""
        self.run("sh", "-c", "kill -9 $(cat /run/libvirtd.pid) && rm -f /run/libvirtd.pid")

    def start_libvirtd(self) -> None:
        self.run("libvirtd", "--daemon", "--pid-file=/run/libvirtd.pid")

    def domains(self) -> dict[str, str]:
        """Name → state of what libvirt has there."""
        lines = self.run("virsh", "-c", "qemu:///system", "list", "--all").splitlines()[2:]
        return {fields[1]: fields[2] for line in lines if len(fields := line.split(maxsplit=2)) == 3}

    def wait(self) -> None:
        """Until its libvirtd answers: the first time it looks at every QEMU there is."""
        deadline = time.monotonic() + SECONDS
        while subprocess.run(
            self.command("virsh", "-c", "qemu:///system", "version"), check=False, capture_output=True
        ).returncode:
            assert time.monotonic() < deadline, (self.folder / "boot.log").read_text()
            time.sleep(0.2)


@dataclass
class Reached:
    """What a client needs to reach computers: addresses, a key, a known_hosts file."""

    folder: Path
    addresses: dict[str, str] = field(default_factory=dict, kw_only=True)
    libvirt = "system"

    @property
    def key(self) -> Path:
        return self.folder / "id"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    def host(self, name: str, **extra: str) -> str:
        """Its entry in a lab file."""
        fields = {
            "kind": "ssh",
            "address": self.addresses[name],
            "key": str(self.key),
            "known_hosts": str(self.known_hosts),
            "toolkit": str(TOOLKIT),
            "libvirt": self.libvirt,
        } | extra
        return "{" + ", ".join(f'{key}: "{value}"' for key, value in fields.items()) + "}"


@dataclass
class Computers(Reached):
    """Several computers on one link, and how they are reached."""

    made: dict[str, Computer] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Computer:
        return self.made[name]


@contextlib.contextmanager
def computers(*names: str) -> Iterator[Computers]:
    """Computers with ``names`` at 10.198.0.1, 10.198.0.2 …; everything of them is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="orc-comp-", dir="/var/tmp"))
    folder.chmod(0o755)
    made = Computers(folder)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", made.key)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        stack.enter_context(bridge(BRIDGE, "10.198.0.254/24"))
        for number, name in enumerate(names, 1):
            made.addresses[name] = f"10.198.0.{number}"
            made.made[name] = stack.enter_context(_booted(made, name, made.addresses[name]))
        for computer in made.made.values():
            computer.wait()
        yield made


@contextlib.contextmanager
def _booted(made: Computers, name: str, address: str) -> Iterator[Computer]:
    folder = made.folder / name
    folder.mkdir()
    host_key = folder / "host_key"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", host_key)
    with made.known_hosts.open("a") as known:
        known.write(f"{address} {host_key.with_suffix('.pub').read_text()}")
    (folder / "sshd.conf").write_text(
        f"HostKey {host_key}\nAuthorizedKeysFile {made.key}.pub\nPidFile /run/sshd.pid\nMaxStartups 100\n"
        "PasswordAuthentication no\nUsePAM no\nStrictModes no\nPermitRootLogin yes\nSubsystem sftp internal-sftp\n"
        + (
            f"SetEnv PYTHONPATH={os.environ['PYTHONPATH']}\n" if "PYTHONPATH" in os.environ else ""
        )  # the same toolkit
    )
    spaces = ["-m", "--propagation=slave", "-u", "-n", "-p", "--mount-proc", "-i"]  # slave: it pins no one's mounts
    with open(folder / "boot.log", "wb") as log:
        outer = subprocess.Popen(
            ["unshare", *spaces, "--fork", "--kill-child", "--", sys.executable, __file__, name, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    pid, link = 0, f"{BRIDGE}-{name}"
    try:
        pid = _child_of(outer.pid)
        inside = ["nsenter", f"--target={pid}", "--net", "ip"]
        run("ip", "link", "add", "name", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        run("ip", "link", "set", link, "master", BRIDGE, "up")
        run(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run(*inside, "link", "set", device, "up")
        yield Computer(name, address, folder, pid)
    finally:
        first = os.pidfd_open(pid) if pid else None
        outer.kill()
        outer.wait()
        if first is not None:
            select.select([first], [], [], SECONDS)
            os.close(first)
        subprocess.run(
            ["ip", "link", "del", link], check=False, capture_output=True
        )  # at once; it would go by itself


def _child_of(pid: int) -> int:
    deadline = time.monotonic() + SECONDS
    while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(children[0])


# -- the computer's half ---------------------------------------------------------------------------------------------

MS_BIND = 4096
DAEMONS = (
    ("virtlogd", "--daemon", "--pid-file=/run/virtlogd.pid"),
    ("libvirtd", "--daemon", "--pid-file=/run/libvirtd.pid"),
)


def _mount(source: str | Path, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [text.encode() for text in (str(source), target, kind)]
    if libc.mount(*words, flags, data.encode()):
        number = ctypes.get_errno()
        raise OSError(number, f"mount {target}: {os.strerror(number)}")


def _boot(name: str, folder: Path) -> None:
    subprocess.run(["hostname", f"computer-{name}"], check=True)
    etc = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree("/etc/libvirt", etc, dirs_exist_ok=True)
    for place in ("qemu", "storage"):  # this machine's own guests, networks and pools
        shutil.rmtree(etc / place, ignore_errors=True)
    with (etc / "libvirtd.conf").open("a") as conf:
        conf.write(f'host_uuid = "{uuid.uuid4()}"\n')  # one board, but two computers
    with (etc / "qemu.conf").open("a") as conf:
        conf.write('cgroup_controllers = []\nsecurity_driver = "none"\nnamespaces = []\n')
    _mount(etc, "/etc/libvirt", flags=MS_BIND)
    _mount("sysfs", "/sys", "sysfs")
    _mount("tmpfs", "/run", "tmpfs")
    for target in ("/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt", "/var/cache/orchestrator"):
        _own(folder, target)
    Path("/var/lib/orchestrator").mkdir(exist_ok=True)
    _mount("tmpfs", "/var/lib/orchestrator", "tmpfs", data=f"size={STATE_MIB}m")
    if Path("/dev/kvm").exists():  # whether it works here or not, libvirt's and our opinion must be the same
        empty = folder / "no-kvm"
        empty.touch(mode=0o600)
        _mount(empty, "/dev/kvm", flags=MS_BIND)
    Path("/run/sshd").mkdir(mode=0o755)
    for daemon in (*DAEMONS, (shutil.which("sshd") or "/usr/sbin/sshd", "-f", str(folder / "sshd.conf"))):
        subprocess.run(daemon, check=True)


def _own(folder: Path, target: str) -> None:
    """An empty folder at ``target`` that is this computer's alone."""
    Path(target).mkdir(parents=True, exist_ok=True)
    _mount(tempfile.mkdtemp(dir=folder), target, flags=MS_BIND)
    Path(target).chmod(0o755)


def main() -> None:
    _boot(sys.argv[1], Path(sys.argv[2]))
    while True:  # as the first process: reap
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.1)


if __name__ == "__main__":
    main()
