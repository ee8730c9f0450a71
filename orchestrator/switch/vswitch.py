"""The vhost-user datapath: a process that copies frames from one guest's virtqueue into another's.

It short-cuts the switch for what is plainly fine: between two guests of this host whose NICs are on one network of
``datapath: vhost-user``. All else it hands to a tap that each of these NICs has beside, which is a port of the switch
like any other (:mod:`orchestrator.switch.dispatcher`), so that identity, policy, other hosts, the gateway and uplinks
are decided in one place. What it is told to serve lies in the host's runtime folder: an agent that starts anew finds
the process, and the process's successor finds its ports.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import logging
import os
import pwd
import select
import socket
import threading
import time
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from orchestrator import names, paths
from orchestrator.errors import NetworkError
from orchestrator.hosts import agentproc
from orchestrator.patience import Deadline, scaled
from orchestrator.run import spawn, tail_of
from orchestrator.switch.layout import link_local
from orchestrator.switch.membership import Membership
from orchestrator.switch.rules import group_id

log = logging.getLogger(__name__)

PROGRAM = "orchestrator-vswitch"
CONTROL = "vswitch.sock"
ANSWER_SECONDS = 20
LARGEST_ANSWER = 16 << 20
RESTARTS, WITHIN_SECONDS = 10, 60.0
_QEMU_USER = "libvirt-qemu"

Port = dict[str, Any]


def program() -> Path:
    return paths.dataplane() / PROGRAM


def unavailable() -> str | None:
    """Why this host cannot have it; None where it can."""
    return None if program().exists() else f"{program()} is not there: the toolkit was installed without Rust"


def ports_of(wanted: Membership, run_dir: Path, net: int, taps: Mapping[str, int]) -> list[Port]:
    """The ports of a network on this host, as the process wants them.

    :param net: index of the network's gateway link.
    :param taps: tap → index, of those that are there.
    """
    return [
        {
            "name": listed.nic.tap,
            "socket": str(names.vhost_socket(run_dir, listed.nic.tap)),
            "tap": listed.nic.tap,
            "net": net,
            "mac": listed.nic.mac,
            "ipv4": next((each for each in listed.nic.addresses if ":" not in each), None),
            "ipv6": next((each for each in listed.nic.addresses if ":" in each), None),
            "link_local": str(link_local(listed.nic.mac)),
            "vlan": listed.nic.vlan,
            "group": group_id(listed.nic.group),
            "isolated": listed.nic.isolated,
            "slow": bool(wanted.network.rules or listed.nic.rate_out or listed.nic.rate_in)
            or bool(listed.nic.mirror or listed.nic.trunk),
            "mtu": wanted.network.mtu,
            "queues": listed.nic.queues,
            "socket_mode": 0o660,
            "socket_owner": _owner(),
        }
        for listed in wanted.listed
        if listed.at == wanted.local and listed.nic.tap in taps
    ]


def _owner() -> list[int] | None:
    """Who may connect beside root: QEMU's own user."""
    try:
        user = pwd.getpwnam(_QEMU_USER)
    except KeyError:
        return None
    return [user.pw_uid, user.pw_gid]


class Vswitch:
    """The process of one host of a lab; it runs as long as there are ports for it."""

    def __init__(self, run_dir: Path, state_dir: Path) -> None:
        self._run_dir, self._state_dir = run_dir, state_dir
        self._file = run_dir / "vswitch.json"
        self._log = state_dir / "vswitch.log"
        self._lock = threading.RLock()
        self._starts: list[float] = []

    # -- the wish ------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._file.read_text())
            if isinstance(found, dict):
                return found
        return {"networks": {}, "pid": 0, "start": ""}

    def _write(self, **changes: Any) -> dict[str, Any]:
        state = {**self._read(), **changes}
        paths.write_atomic(self._file, json.dumps(state))
        return state

    def serve(self, network: str, ports: list[Port]) -> None:
        """Have it serve these ports of a network, and no others of that network.

        :raise NetworkError: it cannot be had here, does not start, or refuses.
        """
        with self._lock:
            networks: dict[str, list[Port]] = self._read()["networks"]
            if not ports and network not in networks:
                return
            if ports and (lacks := unavailable()):
                raise NetworkError(
                    f"network {network}: {lacks}", hint="install Rust and run `make setup`, or use `datapath: ebpf`"
                )
            networks = {**networks, network: ports} if ports else {k: v for k, v in networks.items() if k != network}
            self._write(networks=networks)
            self._apply(networks)

    def _apply(self, networks: Mapping[str, list[Port]]) -> None:
        wanted = [port for ports in networks.values() for port in ports]
        if not wanted:
            self._stop()
            return
        if not self.alive:
            self._start()
        self.ask({"op": "apply", "ports": wanted})

    def drop(self, taps: Container[str]) -> None:
        """Have it serve these taps no longer."""
        with self._lock:
            for network, ports in self._read()["networks"].items():
                left = [port for port in ports if port["name"] not in taps]
                if left != ports:
                    self.serve(network, left)

    def serves(self, network: str) -> bool:
        """It runs, and has ports of this network."""
        return network in self._read()["networks"] and self.alive

    def resume(self) -> None:
        """What an agent does when it starts: find the process, or start it anew."""
        with self._lock:
            state = self._read()
            if not state["networks"]:
                return
            try:
                if not self.alive:
                    self._apply(state["networks"])
                else:
                    self._watch(state["pid"], state["start"])
            except NetworkError as error:
                log.error("the vhost-user switch: %s", error)

    # -- the process ---------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        state = self._read()
        return bool(state["pid"]) and agentproc.start_time(state["pid"]) == state["start"]

    def _start(self) -> None:
        path = self._run_dir / CONTROL
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, open(self._log, "ab") as out:
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(8)
            process = spawn(
                [program(), "--control-fd", str(listener.fileno())],
                stdout=out,
                stderr=out,
                pass_fds=[listener.fileno()],
                detach=True,
            )
        start = agentproc.start_time(process.pid) or ""
        self._write(pid=process.pid, start=start)
        self._starts = [each for each in self._starts if time.monotonic() - each < WITHIN_SECONDS] + [
            time.monotonic()
        ]
        self._watch(process.pid, start)

    def _watch(self, pid: int, start: str) -> None:
        """Start it again when it ends."""
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            fd = -1

        def wait() -> None:
            if fd >= 0:
                select.select([fd], [], [])
                os.close(fd)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
            with self._lock:
                state = self._read()
                if (state["pid"], state["start"]) != (pid, start) or not state["networks"]:
                    return
                if len(self._starts) > RESTARTS:
                    log.error("the vhost-user switch died %d times within %.0f s", RESTARTS, WITHIN_SECONDS)
                    return
                log.warning("the vhost-user switch ended: starting it again")
                try:
                    self._start()
                    self._apply(state["networks"])
                except NetworkError as error:
                    log.error("the vhost-user switch: %s", error)

        threading.Thread(target=wait, name="vswitch", daemon=True).start()

    def _stop(self) -> None:
        state = self._read()
        self._write(pid=0, start="", networks={})
        if state["pid"] and agentproc.start_time(state["pid"]) == state["start"]:
            agentproc.end_process(state["pid"], state["start"], "the vhost-user switch")
        (self._run_dir / CONTROL).unlink(missing_ok=True)

    # -- talking to it -------------------------------------------------------------------------------------------

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """One question, one answer; each a line of JSON.

        :raise NetworkError: it does not answer, or refuses.
        """
        deadline = Deadline(scaled(ANSWER_SECONDS))
        answer = b""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
                stream.settimeout(deadline.seconds)
                stream.connect(str(self._run_dir / CONTROL))
                stream.sendall(json.dumps(question).encode() + b"\n")
                while not answer.endswith(b"\n") and len(answer) < LARGEST_ANSWER:
                    stream.settimeout(max(0.01, deadline.left))
                    part = stream.recv(1 << 16)
                    if not part:
                        break
                    answer += part
            said = json.loads(answer)
        except (OSError, ValueError) as error:
            raise NetworkError(
                f"the vhost-user switch does not answer: {error}",
                tail=tail_of(self._log.read_bytes()) if self._log.exists() else [],
            ) from error
        if not isinstance(said, dict) or not said.get("ok"):
            what = said.get("error") if isinstance(said, dict) else said
            raise NetworkError(f"the vhost-user switch: {what}")
        return said

    def stats(self) -> dict[str, Any]:
        """What it counts, see the program's page; empty where it does not run."""
        return self.ask({"op": "stats"}) if self.alive else {}
