"""A switch in a network namespace of its own, with real links and tables but no guests: frames are given to the
program by hand (``BPF_PROG_TEST_RUN``), and what it would do with them is read back.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pyroute2 import netns
from scapy.packet import Packet

from orchestrator.spec.resolved import ResolvedNetwork, ResolvedNic
from orchestrator.switch import bpf, dispatcher, links
from orchestrator.switch.layout import REASONS, TRACE_MARK, Counters, Fate, Verdict, index
from orchestrator.switch.membership import Listed, Membership

UID = "0d15ba7c"
_numbers = itertools.count()
HERE, THERE = "10.213.0.2", "10.213.0.3"
GATEWAY = "02:49:50:00:00:01"
VXLAN = "ox-00000077"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def tap(number: int) -> str:
    return f"ot-{number:08x}"


def mac(number: int) -> str:
    return f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"


def nic(number: int, **policy: Any) -> ResolvedNic:
    """The NIC of guest ``number``: its MAC, its addresses and its tap have that number."""
    made: dict[str, Any] = {
        "network": "lan",
        "mac": mac(number),
        "tap": tap(number),
        "model": "virtio",
        "mtu": 1500,
        "ipv4": f"10.10.0.{number}/24",
        "ipv6": f"fd10::{number:x}/64",
        "gateway4": "10.10.0.1",
        "gateway6": "fd10::1",
    }
    return ResolvedNic(**{**made, **policy})


def network(**settings: Any) -> ResolvedNetwork:
    made: dict[str, Any] = {
        "name": "lan",
        "vni": 77,
        "mtu": 1500,
        "bridge": "lan",
        "vxlan": VXLAN,
        "ipv4": "10.10.0.0/24",
        "ipv6": "fd10::/64",
        "gateway4": "10.10.0.1/24",
        "gateway6": "fd10::1/64",
        "gateway_mac": GATEWAY,
        "uplink": True,
        "datapath": "ebpf",
        "hosts": ["alpha", "beta"],
    }
    return ResolvedNetwork(**{**made, **settings})


@dataclass
class Seen:
    """What the program would do with a frame: ``where`` names the link, or the reason why it is dropped."""

    fate: Fate
    where: str
    frame: bytes
    rule: int

    def __str__(self) -> str:
        return f"{self.fate.name.lower()} {self.where}".strip()


def total(switch: dispatcher.Switch, link: int) -> Counters:
    """The counters of a link, of all CPUs together."""
    (slot,) = switch.slots_of([link]).values()
    copies = [Counters.unpack(raw) for raw in switch.maps["counters_of"].each(index(slot))]
    reasons = [sum(each) for each in zip(*(tuple(one.dropped.values()) for one in copies), strict=True)]
    fields = ("tx_packets", "tx_bytes", "rx_packets", "rx_bytes", "answered")
    sums = [sum(getattr(one, field) for one in copies) for field in fields]
    seen = max(one.last_seen for one in copies)
    return Counters(*sums, seen, struct.pack(f"<{len(REASONS)}Q", *reasons))


class World:
    """The switch of one network, and those who are plugged into it."""

    def __init__(self, wanted: Membership, stack: contextlib.ExitStack) -> None:
        self.wanted = wanted
        self.ensure(wanted)
        self.switch = stack.enter_context(self._opened())

    def ensure(self, wanted: Membership) -> None:
        """Make the taps of the NICs that are here, and the switch as ``wanted``."""
        self.wanted = wanted
        with links.netlink("taps") as netlink:
            for listed in wanted.listed:
                if listed.at == HERE:
                    links.ensure_tap(netlink, UID, listed.guest, listed.nic)
        dispatcher.ensure(UID, wanted)
        with links.netlink("links") as netlink:
            found = netlink.get_links()
            self.links = {link["index"]: link.get("ifname") for link in found}
            self.addresses = {link.get("ifname"): link.get("address") for link in found}
        self.indexes = {name: number for number, name in self.links.items()}

    def change(self, **settings: Any) -> None:
        """Change the network itself."""
        self.ensure(replace(self.wanted, network=self.wanted.network.model_copy(update=settings)))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[dispatcher.Switch]:
        with links.netlink("switch") as netlink, dispatcher.opened(netlink, UID, netlink.get_links()) as switch:
            assert switch is not None
            yield switch

    def run(self, link: str, frame: Packet | bytes, **how: Any) -> tuple[int, bytes]:
        """Give the program a frame that comes in by ``link``: its verdict, and the frame after it."""
        program = self.switch.program("uplink" if link == links.UPLINK else "dispatch")
        return bpf.run(program, bytes(frame), ifindex=self.indexes[link], **how)

    def give(self, link: str, frame: Packet | bytes, **how: Any) -> Seen:
        """What becomes of a frame that comes in by ``link``; it is counted nowhere."""
        self.switch.maps["verdicts"].set(index(0), bytes(16))
        _, after = self.run(link, frame, mark=TRACE_MARK, **how)
        verdicts = [Verdict.unpack(raw) for raw in self.switch.maps["verdicts"].each(index(0))]
        verdict = next((one for one in verdicts if one.fate), verdicts[0])
        fate = Fate(verdict.fate)
        where = list(REASONS)[verdict.reason] if fate == Fate.DROP else self.links.get(verdict.ifindex, "")
        return Seen(fate, where, after, verdict.rule)

    def facts(self) -> Any:
        (found,) = dispatcher.observe(UID)
        return found


@contextlib.contextmanager
def world(*listed: Listed, kind: type[Any] = World, forward: str = "all", **settings: Any) -> Iterator[Any]:
    """:param kind: class of what is yielded.
    :param settings: of the network.
    """
    name = f"orc-switch-{os.getpid()}-{next(_numbers)}"
    netns.create(name)
    try:
        netns.pushns(name)
        try:
            ip("link", "set", "lo", "up")
            ip("link", "add", "underlay", "type", "veth", "peer", "name", "other")
            ip("addr", "add", f"{HERE}/24", "dev", "underlay")
            ip("link", "add", links.UPLINK, "type", "veth", "peer", "name", "outside")
            for link in ("underlay", "other", links.UPLINK, "outside"):
                ip("link", "set", link, "up")
            ip("addr", "add", "192.0.2.2/24", "dev", links.UPLINK)
            ip("addr", "add", "2001:db8::2/64", "dev", links.UPLINK, "nodad")
            ip("route", "add", "default", "via", "192.0.2.1")
            ip("-6", "route", "add", "default", "via", "2001:db8::1")
            wanted = Membership(network(**settings), HERE, (THERE,), forward, listed)
            with contextlib.ExitStack() as stack:
                yield kind(wanted, stack)
        finally:
            netns.popns()
    finally:
        netns.remove(name)


def here(guest: str, number: int, **policy: Any) -> Listed:
    return Listed(guest, HERE, nic(number, **policy))


def there(guest: str, number: int, **policy: Any) -> Listed:
    return Listed(guest, THERE, nic(number, **policy))
