"""The agent as a process: its folder of sockets, who owns it, how it is started, found again and ended.

The one who starts an agent binds its socket and passes it, so that a client may connect at once and waits for
nothing. ``owner.json`` in the runtime folder names the process by pid and start time. An agent that runs other code
than ours is replaced.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator import names, paths
from orchestrator.errors import HostError, HostLostError
from orchestrator.hosts.installed import installed_digest
from orchestrator.run import shell_line, spawn, tail_of

END_SECONDS = 10


@dataclass(frozen=True)
class AgentPlace:
    """Where one agent works, on its own host.

    :param run_dir: sockets and the libvirt driver's own files; short-lived.
    :param state_dir: disks, consoles and logs of the guests; kept until ``down``.
    :param libvirt: ``system`` for the host's libvirtd, ``embed`` for a driver inside the agent.
    """

    lab: str
    uid: str
    host: str
    run_dir: Path
    state_dir: Path
    libvirt: str

    @classmethod
    def of(cls, lab: str, uid: str, host: str, libvirt: str) -> AgentPlace:
        return cls(
            lab=lab,
            uid=uid,
            host=host,
            run_dir=names.runtime_dir(uid, host),
            state_dir=paths.state() / "labs" / lab / "hosts" / host,
            libvirt=libvirt,
        )

    @property
    def socket(self) -> Path:
        return self.run_dir / names.AGENT_SOCKET

    @property
    def log(self) -> Path:
        return self.state_dir / "agent.log"

    def arguments(self) -> list[str]:
        """The command line by which :mod:`orchestrator.agent` gets this place again."""
        return [
            f"--lab={self.lab}",
            f"--uid={self.uid}",
            f"--host={self.host}",
            f"--run-dir={self.run_dir}",
            f"--state-dir={self.state_dir}",
            f"--libvirt={self.libvirt}",
        ]


def start_time(pid: int) -> str | None:
    """The kernel's start time of a process, which tells it from a later one of the same number; None where there is
    none, or one that has ended and is not reaped yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None


@dataclass(frozen=True)
class Owner:
    """Who serves a runtime folder.

    :param toolkit: digest of the bundle that installed the code that it runs; None where none did.
    """

    uid: str
    lab: str
    host: str
    pid: int
    start: str
    toolkit: str | None = None

    @property
    def alive(self) -> bool:
        return start_time(self.pid) == self.start


def read_owner(run_dir: Path) -> Owner | None:
    try:
        data = json.loads((run_dir / "owner.json").read_text())
        return Owner(**data)
    except (OSError, ValueError, TypeError):
        return None


def start(place: AgentPlace, prefix: Sequence[str] = (), options: Sequence[str] = ()) -> None:
    """Start the agent of ``place`` if none is alive that runs the code that we run.

    :param prefix: a command that runs the agent somewhere else, such as inside a network namespace.
    :param options: further options of :mod:`orchestrator.agent`.
    """
    paths.make_dir(place.run_dir)
    paths.make_dir(place.state_dir)
    with _starting(place):
        if not serves(place):
            _start(place, prefix, options)


@contextlib.contextmanager
def _starting(place: AgentPlace) -> Iterator[None]:
    """One starter at a time: commands that only look start an agent too, and take no lock of the lab."""
    fd = os.open(place.state_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _start(place: AgentPlace, prefix: Sequence[str], options: Sequence[str]) -> None:
    if (owner := read_owner(place.run_dir)) and owner.alive:
        end_process(owner.pid, owner.start, f"{place.host}: the agent before")
    place.socket.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, open(place.log, "ab") as log:
        listener.bind(str(place.socket))
        place.socket.chmod(0o600)
        listener.listen(64)
        command = [*prefix, sys.executable, "-m", "orchestrator.agent", *place.arguments(), *options]
        process = spawn(
            [*command, f"--fd={listener.fileno()}"],
            env={"ORCHESTRATOR_STATE": str(paths.state()), "ORCHESTRATOR_CACHE": str(paths.cache())},
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            detach=True,
        )
    write_owner(place.run_dir, place.uid, place.lab, place.host, process.pid)


def write_owner(run_dir: Path, uid: str, lab: str, host: str, pid: int) -> None:
    """Written by the one who starts an agent, and by the agent itself, in case the starter is killed before."""
    owner = Owner(uid, lab, host, pid, start_time(pid) or "", installed_digest())
    paths.write_atomic(run_dir / "owner.json", json.dumps(asdict(owner)))


def connect(place: AgentPlace) -> socket.socket:
    """:raise HostLostError: no agent listens there."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.connect(str(place.socket))
    except OSError as error:
        stream.close()
        tail = tail_of(place.log.read_bytes()) if place.log.exists() else []
        raise HostLostError(
            f"{place.host}: no agent answers at {place.socket}: {error.strerror}",
            hint="`orchestrator up` starts it",
            tail=tail,
        ) from error
    return stream


def answers(place: AgentPlace) -> bool:
    """There is a living agent that listens."""
    owner = read_owner(place.run_dir)
    if owner is None or not owner.alive:
        return False
    try:
        connect(place).close()
    except HostLostError:
        return False
    return True


def is_current(place: AgentPlace) -> bool:
    """The agent runs the code that we run."""
    owner = read_owner(place.run_dir)
    return owner is not None and owner.toolkit == installed_digest()


def serves(place: AgentPlace) -> bool:
    """There is a living agent that listens and runs the code that we run."""
    return answers(place) and is_current(place)


def end_process(pid: int, start: str, name: str) -> None:
    """SIGTERM, then SIGKILL after :data:`END_SECONDS`; waits until the process has gone.

    :raise HostError: it does not go.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if start_time(pid) != start:
            return  # the number belongs to another process now
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            if poller.poll(END_SECONDS * 1000):
                return
    finally:
        os.close(fd)
    raise HostError(f"{name} (pid {pid}) does not end", hint=shell_line(["cat", f"/proc/{pid}/stack"]))


def stop(place: AgentPlace) -> None:
    """End the agent, and remove its runtime folder; guests that still run are not touched."""
    if (owner := read_owner(place.run_dir)) and owner.alive:
        end_process(owner.pid, owner.start, f"{place.host}: the agent")
    shutil.rmtree(place.run_dir, ignore_errors=True)
    with contextlib.suppress(OSError):
        place.run_dir.parent.rmdir()
