"""Switches that poll virtqueues, driven by DPDK's testpmd: ours and Open vSwitch with DPDK.

testpmd is a guest with two NICs (``virtio_user``). What comes to the second leaves by the first again, so that a
fixed number of frames goes round and round through the switch, which has a processor of its own.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tools
import wires
from wires import pinned, run

from orchestrator.switch import vswitch
from orchestrator.switch.membership import Listed, Membership

BURST = 32
FRAMES = 256
"""That are under way."""
QUEUE = 1024
BUFFERS = 8192
GUEST_CPU, SWITCH_CPU = 0, 1
MEGABYTES = 512
FRAME_BYTES = 60  # 64 with the checksum
NUMBERS = (2, 3)


@dataclass(frozen=True)
class Poller:
    """A switch with a port for each of the guest's two NICs.

    :ivar sockets: of the ports.
    :ivar connects: the switch connects to the guest; else the guest to the switch.
    """

    name: str
    sockets: tuple[Path, Path]
    connects: bool


def ours(stack: contextlib.ExitStack) -> Poller:
    """
    :raise MissingError: there is no Rust.
    """
    if why := vswitch.unavailable():
        raise tools.MissingError(why)
    folder = wires.scratch(stack)
    listed = tuple(Listed(f"guest{number}", "here", wires.nic(number)) for number in NUMBERS)
    wanted = Membership(wires.network("vhost-user"), "here", (), "no", listed)
    ports = vswitch.ports_of(wanted, folder, 1, {each.nic.tap: 1 for each in listed})
    switch = vswitch.Vswitch(folder, folder)
    stack.callback(switch.serve, "lan", [])
    switch.serve("lan", [{**port, "tap": None, "socket_owner": None} for port in ports])
    process = json.loads((folder / "vswitch.json").read_text())["pid"]
    run("taskset", "-a", "-p", "-c", str(SWITCH_CPU), str(process))
    one, other = (Path(port["socket"]) for port in ports)
    return Poller("ours", (one, other), connects=False)


def open_vswitch(stack: contextlib.ExitStack) -> Poller:
    """
    :raise MissingError: its package cannot be had.
    """
    switchd = tools.find("ovs-vswitchd-dpdk", "openvswitch-switch-dpdk")
    sockets = wires.scratch(stack)
    switch = wires.OpenVSwitch(
        stack,
        wires.Space(stack, "dpdk"),
        [switchd],
        dpdk_init="true",
        dpdk_extra=shlex.join(_dpdk(stack, 2 * MEGABYTES)),
        per_port_memory="true",
        dpdk_lcore_mask=hex(1 << GUEST_CPU),
        pmd_cpu_mask=hex(1 << SWITCH_CPU),
    )
    one, other = (sockets / f"vu{number}" for number in NUMBERS)
    for path in (one, other):
        switch.add_port(path.name, "type=dpdkvhostuserclient", f"options:vhost-server-path={path}")
    addresses = f"nw_src={wires.address(2)},nw_dst={wires.address(3)}"
    switch.have_only(f"in_port={one.name},ip,{addresses},actions=output:{other.name}")
    return Poller("Open vSwitch, DPDK", (one, other), connects=True)


def _dpdk(stack: contextlib.ExitStack, megabytes: int) -> list[str]:
    """What each program of DPDK is told. Its plugins are not where it looks for them when they are only unpacked."""
    drivers = next(tools.library("dpdk").glob("pmds-*"))
    prefix = wires.fresh_name("dpdk")
    stack.callback(shutil.rmtree, Path("/run/dpdk") / prefix, ignore_errors=True)
    memory = ("--no-huge", "--legacy-mem", "-m", str(megabytes))
    return [*memory, "--no-pci", "--file-prefix", prefix, "-d", str(drivers)]


class Guest:
    """testpmd at both ports of a switch, for as long as ``stack`` is open.

    :raise MissingError: its package cannot be had.
    """

    def __init__(self, stack: contextlib.ExitStack, poller: Poller) -> None:
        self._name = poller.name
        program = tools.find("dpdk-testpmd", "dpdk-dev")
        macs = [wires.mac(number) for number in NUMBERS]
        devices = [
            f"--vdev=net_virtio_user{nth},mac={mac},path={path},queue_size={QUEUE}" + ",server=1" * poller.connects
            for nth, (mac, path) in enumerate(zip(macs, poller.sockets, strict=True))
        ]
        loop = ("--forward-mode=io", "--port-topology=paired", "--nb-cores=1", "--no-flush-rx")
        first = (f"--eth-peer=0,{macs[1]}", f"--eth-peer=1,{macs[0]}", f"--txpkts={FRAME_BYTES}")
        addresses = ",".join(wires.address(number) for number in NUMBERS)
        queues = (f"--tx-ip={addresses}", f"--txd={QUEUE}", f"--rxd={QUEUE}", f"--total-num-mbufs={BUFFERS}")
        words = pinned(GUEST_CPU, program, "--lcores", f"0@{GUEST_CPU},1@{GUEST_CPU}", *_dpdk(stack, MEGABYTES))
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "stdbuf", "-oL", *words, *devices, "--", "-i", *loop, *first, *queues],
            env=tools.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        stack.callback(self._end)
        # The second NIC sends some first, too: as they have the first one's address, they get nowhere.
        self._say(f"start tx_first {FRAMES // BURST}", until="packet forwarding - ports")

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _say(self, command: str, until: str) -> str:
        """What it answers, up to a line that has ``until``."""
        process, told = self._process, []
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(command + "\n")
            process.stdin.flush()
        for line in process.stdout:
            told.append(line)
            if re.search(until, line):
                return "".join(told)
        sys.exit(f"{self._name}: testpmd has ended: {''.join(told[-20:])}")

    def rate(self, seconds: float) -> float:
        """Frames that came through the switch: millions per second."""
        before, began = self._received(), time.monotonic()
        time.sleep(seconds)
        after, ended = self._received(), time.monotonic()
        if after == before:
            sys.exit(f"{self._name} carries nothing")
        return (after - before) / (ended - began) / 1e6

    def _received(self) -> int:
        said = self._say("show port stats all", until="NIC statistics for port 1") + self._say("", until=r"Tx-pps")
        return sum(map(int, re.findall(r"RX-packets: (\d+)", said)))
