"""Lab file → resolved lab: the only place that decides on addresses, MACs and link names.

Addresses are assigned in the order of the lab file, from the bottom of the network; the first address is the
gateway's. An address that was assigned before is kept, so that a guest added in the middle moves nobody. In the same
way a guest stays where ``orchestrator migrate`` has put it, until the file names another host than it did then.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Literal

from orchestrator import names
from orchestrator.errors import SpecError
from orchestrator.hosts.model import UNDERLAY_HOSTS
from orchestrator.spec.check import VXLAN_OVERHEAD
from orchestrator.spec.model import LabSpec
from orchestrator.spec.resolved import (
    ResolvedDisk,
    ResolvedGuest,
    ResolvedHost,
    ResolvedLab,
    ResolvedNetwork,
    ResolvedNic,
    ResolvedParty,
    ResolvedRule,
    carriers,
)
from orchestrator.switch.model import (
    ANYONE,
    GROUP,
    PROTOCOLS,
    NetworkSpec,
    NicSpec,
    RuleSpec,
    parse_ports,
    prefix_of,
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

DEFAULT_MTU = 1500
_ICMPV6 = 58


class _Pool:
    """Free addresses of one network, from the bottom."""

    def __init__(self, network: Network, place: str) -> None:
        self.network = network
        self.gateway: Address = network.network_address + 1
        self._place = place
        self._taken: set[Address] = {network.network_address, self.gateway}
        if isinstance(network, IPv4Network):
            self._taken.add(network.broadcast_address)
        self._next: Iterator[int] = iter(range(2, network.num_addresses))

    def reserve(self, address: Address) -> bool:
        """Take ``address``; False when it is outside or taken."""
        if address not in self.network or address in self._taken:
            return False
        self._taken.add(address)
        return True

    def assign(self) -> Address:
        for offset in self._next:
            address = self.network.network_address + offset
            if self.reserve(address):
                return address
        raise SpecError(f"{self._place}: {self.network} has no address left", hint="use a larger network")

    def cidr(self, address: Address) -> str:
        return f"{address}/{self.network.prefixlen}"


def resolve(spec: LabSpec, file: Path, previous: ResolvedLab | None = None) -> ResolvedLab:
    """Fill in everything that the lab file leaves open.

    :param previous: the lab as it was resolved before; its assigned addresses are kept where they still fit.
    :raise SpecError: a network has no address left, or a host's name cannot be looked up.
    """
    uid = names.lab_uid(spec.lab)
    guests = _guests(spec, uid, previous)
    macs = _macs(spec)
    return ResolvedLab(
        lab=spec.lab,
        uid=uid,
        file=file,
        description=spec.description,
        underlay_prefix=spec.underlay.cidr.prefixlen,
        underlay_mtu=spec.underlay.mtu,
        hosts=_hosts(spec, previous),
        networks={
            name: _network(name, network, spec, uid, carriers(name, spec.hosts, guests.values()), macs)
            for name, network in spec.networks.items()
        },
        guests=guests,
        images=dict(spec.images),
    )


def _hosts(spec: LabSpec, previous: ResolvedLab | None) -> dict[str, ResolvedHost]:
    pool = _Pool(spec.underlay.cidr, "underlay")
    chosen: dict[str, Address] = {}
    ours = {name: host for name, host in spec.hosts.items() if isinstance(host, UNDERLAY_HOSTS)}
    for name, our_host in ours.items():
        if our_host.address:
            pool.reserve(our_host.address)
            chosen[name] = our_host.address
    for name in ours:
        if previous and name in previous.hosts and name not in chosen:
            before = ip_address(previous.hosts[name].underlay)
            if pool.reserve(before):
                chosen[name] = before
    resolved = {}
    for name, host in spec.hosts.items():
        if isinstance(host, UNDERLAY_HOSTS):
            underlay = str(chosen.get(name) or pool.assign())
        else:
            underlay = str(host.underlay) if host.underlay else _look_up(name, host.address)
        resolved[name] = ResolvedHost(name=name, spec=host, underlay=underlay)
    return resolved


def _look_up(name: str, address: str) -> str:
    try:
        found = socket.getaddrinfo(address, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SpecError(
            f"hosts.{name}.address: {address!r} cannot be looked up: {error.strerror}",
            hint="give an address, or `underlay:` with the address that the other hosts reach it by",
        ) from error
    return str(found[0][4][0])


def _mtu(network: NetworkSpec, spec: LabSpec) -> int:
    if network.mtu is not None:
        return network.mtu
    all_ours = all(isinstance(host, UNDERLAY_HOSTS) for host in spec.hosts.values())
    carried = spec.underlay.mtu if all_ours else DEFAULT_MTU
    return min(DEFAULT_MTU, carried - VXLAN_OVERHEAD) if len(spec.hosts) > 1 else DEFAULT_MTU


def _network(
    name: str, network: NetworkSpec, spec: LabSpec, uid: str, hosts: list[str], macs: Mapping[tuple[str, int], str]
) -> ResolvedNetwork:
    def gateway(cidr: Network | None) -> str | None:
        return f"{cidr.network_address + 1}/{cidr.prefixlen}" if cidr else None

    return ResolvedNetwork(
        name=name,
        vni=int(names.digest(uid, "vni", name, length=6), 16) or 1,
        mtu=_mtu(network, spec),
        bridge=network.bridge or names.link("b", uid, name),
        vxlan=names.link("x", uid, name),
        ipv4=str(network.ipv4) if network.ipv4 else None,
        ipv6=str(network.ipv6) if network.ipv6 else None,
        gateway4=gateway(network.ipv4),
        gateway6=gateway(network.ipv6),
        gateway_mac=names.mac(uid, "gateway", name),
        uplink=network.uplink,
        datapath=network.datapath,
        hosts=hosts,
        multicast=network.multicast,
        rules=[rule for each in network.rules for rule in _rules(each, name, spec, macs)],
    )


def _rules(
    rule: RuleSpec, network: str, spec: LabSpec, macs: Mapping[tuple[str, int], str]
) -> Iterator[ResolvedRule]:
    """A rule of the file, as one for each pair of NICs, and for each family where that has a protocol of its own."""
    low, high = parse_ports(rule.ports) if rule.ports is not None else (0, 65535)
    kinds: list[tuple[int, Literal[0, 4, 6]]] = [(PROTOCOLS[rule.protocol], 0)]
    if rule.protocol == "icmp":
        kinds = [(PROTOCOLS["icmp"], 4), (_ICMPV6, 6)]
    for sender in _parties(rule.source, network, spec, macs):
        for receiver in _parties(rule.destination, network, spec, macs):
            for protocol, family in kinds:
                yield ResolvedRule(
                    allow=rule.action == "allow",
                    sender=sender,
                    receiver=receiver,
                    protocol=protocol,
                    low=low,
                    high=high,
                    family=family,
                )


def _parties(party: str, network: str, spec: LabSpec, macs: Mapping[tuple[str, int], str]) -> Iterator[ResolvedParty]:
    if party == ANYONE:
        yield ResolvedParty(side="any")
    elif party.startswith(GROUP):
        yield ResolvedParty(side="group", value=party.removeprefix(GROUP))
    elif (prefix := prefix_of(party)) and party not in spec.guests:
        yield ResolvedParty(side="prefix", value=str(prefix))
    else:
        for index, nic in enumerate(spec.guests[party].nics):
            if nic.network == network:
                yield ResolvedParty(side="nic", value=macs[party, index])


FAMILIES = ("ipv4", "ipv6")
Slot = tuple[str, int, str]
"""One address to be given: guest, index of its NIC, family."""


def _addresses(
    spec: LabSpec, macs: Mapping[tuple[str, int], str], kept: Mapping[tuple[str, str, str], object]
) -> dict[Slot, str]:
    """The address of each slot, in CIDR notation: first what the file fixes, then what was assigned before, then
    what is free."""
    pools = {
        (name, family): _Pool(cidr, f"networks.{name}.{family}")
        for name, network in spec.networks.items()
        for family in FAMILIES
        if (cidr := getattr(network, family)) is not None
    }
    slots: dict[Slot, _Pool] = {
        (guest, index, family): pool
        for guest, index, nic in _nics(spec)
        for family in FAMILIES
        if (pool := pools.get((nic.network, family)))
    }
    fixed = {
        (guest, index, family): address
        for guest, index, nic in _nics(spec)
        for family in FAMILIES
        if (address := getattr(nic, family))
    }
    found: dict[Slot, str] = {}
    for slot, address in fixed.items():
        if slot in slots:
            slots[slot].reserve(address)
            found[slot] = slots[slot].cidr(address)
    for slot, pool in slots.items():
        guest, index, family = slot
        before = kept.get((guest, macs[guest, index], family))
        if before and slot not in found and pool.reserve(address := ip_address(str(before))):
            found[slot] = pool.cidr(address)
    for slot, pool in slots.items():
        if slot not in found:
            found[slot] = pool.cidr(pool.assign())
    return found


def _guests(spec: LabSpec, uid: str, previous: ResolvedLab | None) -> dict[str, ResolvedGuest]:
    macs = _macs(spec)
    addresses = _addresses(spec, macs, previous.assignments() if previous else {})
    return {name: _guest(name, _place(name, spec, previous), spec, uid, macs, addresses) for name in spec.guests}


def _place(name: str, spec: LabSpec, previous: ResolvedLab | None) -> str:
    """The host of a guest: the one that it was moved to, as long as the file says what it said then."""
    home = spec.guests[name].host
    before = previous.guests.get(name) if previous else None
    return before.host if before and before.home == home and before.host in spec.hosts else home


def _guest(
    name: str,
    host: str,
    spec: LabSpec,
    uid: str,
    macs: Mapping[tuple[str, int], str],
    addresses: Mapping[Slot, str],
) -> ResolvedGuest:
    guest = spec.guests[name]
    routed = next((index for index, nic in enumerate(guest.nics) if spec.networks[nic.network].uplink), None)
    nics = []
    for index, nic in enumerate(guest.nics):
        network = spec.networks[nic.network]
        gateway4, gateway6 = (_gateway(network, family) if index == routed else None for family in FAMILIES)
        mac = macs[name, index]
        nics.append(
            ResolvedNic(
                network=nic.network,
                mac=mac,
                tap=_tap(spec, uid, name, nic, mac),
                model=nic.model,
                mtu=_mtu(network, spec),
                ipv4=addresses.get((name, index, "ipv4")),
                ipv6=addresses.get((name, index, "ipv6")),
                gateway4=gateway4,
                gateway6=gateway6,
                group=nic.group,
                isolated=nic.isolated,
                vlan=nic.vlan or 0,
                trunk=sorted(set(nic.trunk)),
                rate_out=nic.rate_out or 0,
                rate_in=nic.rate_in or 0,
                mirror=_mirror(nic, spec, uid, macs),
                queues=nic.queues,
                vhost_user=network.datapath == "vhost-user",
            )
        )
    return ResolvedGuest(
        name=name,
        host=host,
        home=guest.host,
        image=guest.image,
        vcpus=guest.vcpus.count,
        vcpus_max=guest.vcpus.max or guest.vcpus.count,
        memory=guest.memory.size,
        memory_max=guest.memory.max or guest.memory.size,
        nics=nics,
        disks=[ResolvedDisk(name=disk.name, size=disk.size, bus=disk.bus) for disk in guest.disks],
        disk_size=guest.disk_size,
        cmdline=guest.cmdline,
        user_data=guest.user_data,
        accel=guest.accel,
        cpu=guest.cpu,
        machine=guest.machine,
        emulator=guest.emulator,
        hotplug_slots=guest.hotplug_slots,
        ready=guest.ready,
        xml=guest.xml,
        description=guest.description,
    )


def _mirror(nic: NicSpec, spec: LabSpec, uid: str, macs: Mapping[tuple[str, int], str]) -> str | None:
    """The tap that gets copies of what a NIC sends and gets."""
    if nic.mirror_to is None:
        return None
    there = spec.guests[nic.mirror_to].nics
    index = next(index for index, each in enumerate(there) if each.network == nic.network and each.takes_mirror)
    return _tap(spec, uid, nic.mirror_to, there[index], macs[nic.mirror_to, index])


def _tap(spec: LabSpec, uid: str, guest: str, nic: NicSpec, mac: str) -> str:
    """One that QEMU has and one that somebody else has for it are two: the guest is restarted in between."""
    served = spec.networks[nic.network].datapath == "vhost-user"
    return names.link("v" if served else "t", uid, guest, mac)


def _gateway(network: NetworkSpec, family: str) -> str | None:
    """The first address of the network."""
    cidr: Network | None = getattr(network, family)
    return str(cidr.network_address + 1) if cidr else None


def _nics(spec: LabSpec) -> Iterator[tuple[str, int, NicSpec]]:
    for name, guest in spec.guests.items():
        for index, nic in enumerate(guest.nics):
            yield name, index, nic


def _macs(spec: LabSpec) -> dict[tuple[str, int], str]:
    """``(guest, index of the NIC) → MAC``: by network and not by index, so that NICs may be reordered."""
    macs = {}
    seen: dict[tuple[str, str], int] = {}
    for guest, index, nic in _nics(spec):
        nth = seen[guest, nic.network] = seen.get((guest, nic.network), -1) + 1
        macs[guest, index] = nic.mac or names.mac(spec.lab, guest, nic.network, str(nth))
    return macs
