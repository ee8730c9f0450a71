"""This machine's libvirtd, which runs the machines that Vagrant makes.

Where systemd runs, the daemon is started through it. Elsewhere ``virtlogd`` and ``libvirtd`` are started as they are;
who removes the last thing that needed them ends them again (:func:`session`).
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import fcntl
import json
import shlex
import shutil
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path

import libvirt

from orchestrator import paths
from orchestrator.errors import HostError
from orchestrator.hosts import accel, agentproc
from orchestrator.patience import Deadline, scaled
from orchestrator.run import run

URI = "qemu:///system"
START_SECONDS = 60.0
DAEMONS = ("virtlogd", "libvirtd")
QEMU_CONF = Path("/etc/libvirt/qemu.conf")
_PID_FILES = {name: Path(f"/run/{name}.pid") for name in DAEMONS}


def _quiet(_context: object, _error: object) -> None:
    """libvirt prints each error, unless it is given to somebody; all of them reach us as exceptions."""


def connect(*, start: bool = False) -> libvirt.virConnect | None:
    """A connection to this machine's libvirtd; None where it does not run.

    :param start: start it then.
    :raise HostError: it cannot be started or does not let us in.
    """
    libvirt.registerErrorHandler(_quiet, None)
    if conn := _open():
        return conn
    if not start:
        return None
    with alone():
        if conn := _open():
            return conn
        _start()
        deadline = Deadline(scaled(START_SECONDS))
        while not (conn := _open()):  # the first start of all looks at every QEMU there is, for some seconds
            if deadline.passed:
                raise HostError("libvirtd was started and does not answer", hint=f"virsh -c {URI} version")
            time.sleep(0.2)
        return conn


def _open() -> libvirt.virConnect | None:
    try:
        return libvirt.open(URI)
    except libvirt.libvirtError as error:
        if error.get_error_domain() == libvirt.VIR_FROM_RPC or not _is_running():
            return None
        raise HostError(
            f"this machine's libvirtd refuses: {error.get_error_message()}", hint=f"virsh -c {URI} version"
        ) from error


def _is_running() -> bool:
    pid = _pid("libvirtd")
    return pid is not None and agentproc.start_time(pid) is not None


def _pid(name: str) -> int | None:
    try:
        return int(_PID_FILES[name].read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One at a time, over all processes."""
    with open(paths.make_dir(paths.runtime()) / "libvirtd.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start() -> None:
    if Path("/run/systemd/system").is_dir():
        run(["systemctl", "start", "libvirtd.service"], timeout=scaled(START_SECONDS))
        return
    if not shutil.which("libvirtd"):
        raise HostError("there is no libvirtd on this machine", hint="apt-get install libvirt-daemon-system")
    for name in DAEMONS:
        pid = _pid(name)
        if pid is None or agentproc.start_time(pid) is None:
            run([*_without_broken_kvm(), name, "--daemon"], timeout=scaled(START_SECONDS))
            _remember(name)


def _without_broken_kvm() -> list[str]:
    """What to put before a command, so that it does not find a /dev/kvm that runs no guest: libvirt would try QEMU
    with it again at each step, for 20 seconds and more.

    libvirt cannot give its QEMUs a /dev of their own when something is mounted over a file of it.
    """
    if accel.probe().kind == "kvm" or not accel.KVM.exists():
        return []
    lines = QEMU_CONF.read_text().splitlines() if QEMU_CONF.exists() else []
    settings = [line for line in lines if not line.lstrip().startswith("namespaces")]
    conf = paths.make_dir(paths.runtime()) / QEMU_CONF.name
    paths.write_atomic(conf, "\n".join([*settings, "namespaces = []"]) + "\n")
    mounts = [(accel.no_kvm(), accel.KVM), (conf, QEMU_CONF)]
    script = "".join(f"mount --bind {shlex.quote(str(file))} {place} && " for file, place in mounts)
    return ["unshare", "--mount", "sh", "-c", f'{script}exec "$@"', "sh"]


def _started() -> Path:
    return paths.runtime() / "libvirtd.json"


def _remember(name: str) -> None:
    """Keep in mind that we started a daemon."""
    deadline = Deadline(START_SECONDS)
    while (pid := _pid(name)) is None or (start := agentproc.start_time(pid)) is None:
        if deadline.passed:
            raise HostError(f"{name} was started and has ended", hint=f"run it by hand: {name} --verbose")
        time.sleep(0.1)
    known = _ours()
    known[name] = (pid, start)
    paths.write_atomic(_started(), json.dumps(known))


def _ours() -> dict[str, tuple[int, str]]:
    try:
        return {name: (int(pid), str(start)) for name, (pid, start) in json.loads(_started().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


@contextlib.contextmanager
def session() -> Iterator[libvirt.virConnect]:
    """A connection for who makes or removes machines. The daemons that we started are ended by the last one to leave,
    over all processes, if nothing runs under them any more.

    :raise HostError: libvirtd cannot be started or does not let us in.
    """
    users = paths.make_dir(paths.runtime()) / "libvirtd.users"
    with open(users, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        conn = connect(start=True)
        assert conn is not None
        try:
            yield conn
        finally:
            conn.close()
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _release()


def _release() -> None:
    ours = _ours()
    if not ours:
        return
    conn = _open()
    if conn is not None:
        with contextlib.closing(conn):
            if conn.numOfDomains() or conn.numOfNetworks():
                return
    for name in reversed(DAEMONS):
        if name in ours:
            agentproc.end_process(*ours[name], name)
    for file in (
        _started(),
        *(paths.runtime() / name for name in ("libvirtd.lock", "libvirtd.users", "vagrant.lock", QEMU_CONF.name)),
    ):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        paths.runtime().rmdir()


def remove_volumes(*prefixes: str, keep: Sequence[str] = ()) -> None:
    """Remove the volumes whose names begin with one of ``prefixes`` and with none of ``keep`` from the storage pools,
    if libvirtd runs; but none that another volume lies on."""
    conn = connect()
    if conn is None:
        return
    with contextlib.closing(conn):
        volumes = []
        for pool in conn.listAllStoragePools(libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE):
            with contextlib.suppress(libvirt.libvirtError):
                pool.refresh()
            volumes += pool.listAllVolumes()
        below = {ET.fromstring(volume.XMLDesc()).findtext("backingStore/path") for volume in volumes}
        for volume in volumes:
            name = volume.name()
            if name.startswith(prefixes) and not name.startswith(tuple(keep)) and volume.path() not in below:
                volume.delete()
