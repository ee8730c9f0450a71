"""What could carry datagrams from host to host, compared without the switch.

A program of a few lines (``underlays.bpf.c``) leads each tap's frames to it, and what arrives to the other tap.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import shlex
import struct
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path

import wires
from wires import Host, run

from orchestrator.switch import bpf, filters, links
from orchestrator.switch.layout import index, packed_mac

VNI, PORT = "77", "4789"


class Leader:
    """Puts the programs at links.

    :param folder: where to compile them.
    """

    def __init__(self, stack: contextlib.ExitStack, folder: Path) -> None:
        self._stack = stack
        self._file = folder / "underlays.bpf.o"
        source = Path(__file__).with_name("underlays.bpf.c")
        clang = shlex.split(run("make", "-s", "-C", Path(__file__).parents[1] / "bpf", "flags"))
        run(*clang, "-c", source, "-o", self._file)

    def lead(
        self, host: Host, by: str, to: str, program: str = "redirect", at: str = "0.0.0.0", mac: str = ""
    ) -> None:
        """What comes in by one link goes to another.

        :param at: address of the host that it is sent to by a tunnel.
        :param mac: its new destination.
        """
        loaded = self._stack.enter_context(bpf.Object(self._file))
        with host.space.entered(), links.netlink("underlay") as ip:
            (source,), (target,) = ip.link_lookup(ifname=by), ip.link_lookup(ifname=to)
            aim = struct.pack("<II6s2x", target, int(IPv4Address(at)), packed_mac(mac) if mac else bytes(6))
            loaded.map("aims").set(index(0), aim)
            filters.attach(ip, source, filters.INGRESS, loaded.program(program), "underlay", 1)

    def vxlan(self, host: Host, number: int, other: Host, peer: int) -> None:
        """A VXLAN of the network's own, whose table knows which host a MAC is on: what the switch has."""
        words = ("type", "vxlan", "id", VNI, "local", host.at, "dstport", PORT, "nolearning")
        _link(host, "vx", *words)
        host.space.run("bridge", "fdb", "replace", wires.mac(peer), "dev", "vx", "dst", other.at, "self")
        self.lead(host, _tap(number), "vx")
        self.lead(host, "vx", _tap(number))

    def collect_metadata(self, host: Host, number: int, other: Host, _: int) -> None:
        """One VXLAN for all networks; each frame is given its host and its network."""
        _link(host, "vx", "type", "vxlan", "external", "dstport", PORT)
        self.lead(host, _tap(number), "vx", "tunnel", at=other.at)
        self.lead(host, "vx", _tap(number))

    def routed(self, host: Host, number: int, other: Host, _: int) -> None:
        """Nothing around the datagram: only its MACs change. It needs an underlay that takes guests' addresses, and
        keeps no networks apart."""
        with other.space.entered(), links.netlink("underlay") as ip:
            (wire,) = (link.get("address") for link in ip.get_links(ifname="wire"))
        self.lead(host, _tap(number), "wire", "address", mac=wire)
        self.lead(host, "wire", _tap(number), "address", mac=wires.mac(number))


def _tap(number: int) -> str:
    return wires.nic(number).tap


def _link(host: Host, name: str, *words: str) -> None:
    host.space.ip("link", "add", name, *words)
    host.space.ip("link", "set", name, "mtu", str(wires.MTU), "addrgenmode", "none", "up")


KINDS: dict[str, Callable[[Leader, Host, int, Host, int], None]] = {
    "VXLAN by MAC": Leader.vxlan,
    "VXLAN, collect-metadata": Leader.collect_metadata,
    "routed": Leader.routed,
}


def hosts(stack: contextlib.ExitStack, kind: str) -> tuple[Host, Host]:
    """Two hosts with guests 2 and 3, each on one."""
    leader = Leader(stack, wires.scratch(stack))
    pair = wires.connected(stack)
    for number, host in enumerate(pair, 2):
        host.plug_taps(range(number, number + 1))
        host.space.ip("link", "set", _tap(number), "up")
    one, other = pair
    KINDS[kind](leader, one, 2, other, 3)
    KINDS[kind](leader, other, 3, one, 2)
    return pair
