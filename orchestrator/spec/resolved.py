"""The resolved lab: defaults filled in, addresses, MACs and link names assigned.

This is what the plan compares with what is observed, what is kept in the lab's state, and what the agents get.
Everything here turns into JSON and back without loss.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from orchestrator.hosts.model import HostSpec
from orchestrator.images.model import ImageSpec
from orchestrator.spec.base import Part, Size


class ResolvedNic(Part):
    """A NIC with its addresses: ``ipv4`` and ``ipv6`` are in CIDR notation (``10.10.0.2/24``)."""

    network: str
    mac: str
    tap: str
    model: Literal["virtio", "e1000e"]
    mtu: int
    ipv4: str | None
    ipv6: str | None
    gateway4: str | None
    gateway6: str | None
    group: str | None = None
    isolated: bool = False
    vlan: int = 0
    trunk: list[int] = []
    rate_out: int = 0
    """Bits per second that the guest may send; 0: as many as it can."""
    rate_in: int = 0
    queues: int = 1
    vhost_user: bool = False
    """QEMU gives it to a process of the host, and not to its tap itself."""
    mirror: str | None = None
    """Tap of the NIC that gets a copy of what this one sends and receives."""

    POLICY: ClassVar = ("group", "isolated", "vlan", "trunk", "rate_out", "rate_in", "mirror")
    """What only the switch knows of: the guest's own device is the same, whatever these are."""

    @property
    def addresses(self) -> list[str]:
        """Addresses without their prefix lengths."""
        return [cidr.split("/")[0] for cidr in (self.ipv4, self.ipv6) if cidr]


class ResolvedDisk(Part):
    name: str
    size: Size
    bus: Literal["virtio", "scsi"]


class ResolvedGuest(Part):
    """A guest. ``host`` is where it belongs, ``home`` the host that the lab file names; they differ after
    ``orchestrator migrate``."""

    name: str
    host: str
    home: str
    image: str
    vcpus: int
    vcpus_max: int
    memory: Size
    memory_max: Size
    nics: list[ResolvedNic]
    disks: list[ResolvedDisk]
    disk_size: Size | None
    cmdline: str
    user_data: str | None
    accel: Literal["auto", "kvm", "tcg"]
    cpu: str | None
    machine: str
    emulator: str | None
    hotplug_slots: int
    ready: str | None
    xml: str | None
    description: str

    @model_validator(mode="before")
    @classmethod
    def _at_home(cls, data: Any) -> Any:
        """What was written before guests could be moved has no ``home``."""
        return {"home": data["host"], **data} if isinstance(data, dict) and "host" in data else data


class ResolvedParty(Part):
    """A side of a rule. ``value`` is a prefix, a MAC, the name of a group, or nothing."""

    side: Literal["any", "prefix", "nic", "group"]
    value: str = ""


class ResolvedRule(Part):
    """A rule; ``protocol`` 0 and ``family`` 0 stand for any."""

    allow: bool
    sender: ResolvedParty
    receiver: ResolvedParty
    protocol: int
    low: int
    high: int
    family: Literal[0, 4, 6]


class ResolvedNetwork(Part):
    """A network; ``hosts`` are those that carry it: the ones with a guest on it."""

    name: str
    vni: int
    mtu: int
    bridge: str
    vxlan: str
    ipv4: str | None
    ipv6: str | None
    gateway4: str | None
    gateway6: str | None
    gateway_mac: str
    uplink: bool
    datapath: Literal["ebpf", "bridge", "vhost-user"]
    hosts: list[str]
    multicast: Literal["drop", "flood"] = "drop"
    rules: list[ResolvedRule] = []


class ResolvedHost(Part):
    """A host; ``underlay`` is the address that the other hosts reach it by."""

    name: str
    spec: HostSpec
    underlay: str


def carriers(network: str, hosts: Iterable[str], guests: Iterable[ResolvedGuest]) -> list[str]:
    """Those of ``hosts`` that carry ``network``: the ones with a guest on it."""
    used = {guest.host for guest in guests if any(nic.network == network for nic in guest.nics)}
    return [host for host in hosts if host in used]


class ResolvedLab(Part):
    lab: str
    uid: str
    file: Path
    description: str
    underlay_prefix: int
    underlay_mtu: int
    hosts: dict[str, ResolvedHost]
    networks: dict[str, ResolvedNetwork]
    guests: dict[str, ResolvedGuest]
    images: dict[str, ImageSpec]
    former_hosts: dict[str, ResolvedHost] = {}
    """Hosts that were in the lab and could not be cleared yet."""

    def with_guest(self, guest: ResolvedGuest) -> ResolvedLab:
        """The lab with ``guest`` in place of the one of that name, and each network where it is needed then."""
        guests = {**self.guests, guest.name: guest}
        networks = {
            name: network.model_copy(update={"hosts": carriers(name, self.hosts, guests.values())})
            for name, network in self.networks.items()
        }
        return self.model_copy(update={"guests": guests, "networks": networks})

    def guests_of(self, host: str) -> list[ResolvedGuest]:
        return [guest for guest in self.guests.values() if guest.host == host]

    def assignments(self) -> dict[tuple[str, str, str], IPv4Address | str]:
        """``(guest, MAC, family) → address``: what a later resolution keeps."""
        return {
            (guest.name, nic.mac, family): cidr.split("/")[0]
            for guest in self.guests.values()
            for nic in guest.nics
            for family, cidr in (("ipv4", nic.ipv4), ("ipv6", nic.ipv6))
            if cidr
        }
