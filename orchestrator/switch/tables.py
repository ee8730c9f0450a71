"""What the dispatcher's maps should hold for one network on one host: a pure function of the wish and the links."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface, ip_network

from orchestrator.spec.resolved import ResolvedNetwork, ResolvedNic
from orchestrator.switch.layout import (
    FROM_GUEST,
    NOWHERE,
    TO_GUEST,
    Addresses,
    Attachment,
    Bucket,
    Flag,
    Kind,
    Limited,
    Member,
    Nic,
    Owner,
    Place,
    Where,
    index,
    link_local,
    packed,
    packed_mac,
)
from orchestrator.switch.membership import Listed, Membership
from orchestrator.switch.rules import group_id, mask

BURST_SECONDS = 0.05
LEAST_BURST = 256 << 10
"""Bytes: four of the largest frames that a guest can send at once."""


@dataclass
class Tables:
    """Entries by map, and which addresses lead to which host.

    :ivar hosts: MAC → underlay address of the host that it is on, of the NICs of other hosts.
    """

    ports: dict[bytes, bytes] = field(default_factory=dict)
    list: dict[bytes, bytes] = field(default_factory=dict)
    known: dict[bytes, bytes] = field(default_factory=dict)
    links: dict[bytes, bytes] = field(default_factory=dict)
    trunks: dict[bytes, bytes] = field(default_factory=dict)
    buckets: dict[bytes, bytes] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HostLinks:
    """The links of one network that are on this host.

    :ivar net: index of the gateway link.
    :ivar vxlan: index of the VXLAN; 0: none.
    :ivar taps: tap → index.
    :ivar slots: index of each of these links → where its counters are.
    """

    net: int
    vxlan: int
    taps: Mapping[str, int]
    slots: Mapping[int, int]


def build(wanted: Membership, links: HostLinks) -> Tables:
    """What the maps should hold."""
    made = Tables()
    net, vxlan, slots = links.net, links.vxlan, links.slots
    routed = wanted.network.uplink
    made.links[index(net)] = Attachment(Kind.GATEWAY, net, slots[net]).pack()
    if vxlan:
        made.links[index(vxlan)] = Attachment(Kind.VXLAN, net, slots[vxlan]).pack()
    gateway = Place(
        net=net,
        ifindex=net,
        flags=Flag.HOST,
        group=0,
        mirror=0,
        slot=slots[net],
        vlan=0,
        mac=packed_mac(wanted.network.gateway_mac),
    )
    for address in _gateway_addresses(wanted.network):
        made.list[Where(packed(address), net).pack()] = gateway.pack()
    for listed in wanted.listed:
        _add(made, listed, wanted.local, links, routed)
    return made


def _gateway_addresses(network: ResolvedNetwork) -> list[str]:
    addresses = [str(ip_interface(cidr).ip) for cidr in (network.gateway4, network.gateway6) if cidr]
    return [*addresses, str(link_local(network.gateway_mac))]


def _add(made: Tables, listed: Listed, local_host: str, links: HostLinks, routed: bool) -> None:
    nic, net, taps = listed.nic, links.net, links.taps
    mac = packed_mac(nic.mac)
    flags = Flag.ISOLATED if nic.isolated else Flag(0)
    flags |= Flag.TRUNK if nic.trunk else Flag(0)
    here = taps.get(nic.tap)
    local = flags | (Flag.LIMITED if nic.rate_out or nic.rate_in else Flag(0)) | Flag.LOCAL
    mirror = taps.get(nic.mirror, 0) if nic.mirror else 0
    if here:
        made.ports[index(here)] = _port(nic, net, local, mirror, links.slots[here])
        for direction, rate in ((FROM_GUEST, nic.rate_out), (TO_GUEST, nic.rate_in)):
            if rate:
                made.buckets[Limited(here, direction).pack()] = _bucket(rate)
    if listed.at == local_host:
        if not here:
            return  # it is listed when its tap is made
        place = Place(net, here, local, group_id(nic.group), mirror, links.slots[here], nic.vlan, mac)
    else:
        if not links.vxlan:
            return
        place = Place(net, links.vxlan, flags | Flag.REMOTE, group_id(nic.group), 0, 0, nic.vlan, mac)
        made.hosts[nic.mac] = listed.at
    local_address = link_local(nic.mac)
    for address in (*map(ip_address, nic.addresses), local_address):
        made.list[Where(packed(address), net).pack()] = place.pack()
        if routed and address != local_address:
            made.list[Where(packed(address), 0).pack()] = place.pack()
    made.known[Owner(net, mac).pack()] = Addresses(
        ip6=_of(nic, 6), link_local=local_address.packed, ip4=_of(nic, 4)[12:]
    ).pack()
    for vlan in nic.trunk:
        made.trunks[Member(mac, vlan).pack()] = b"\1"


def _of(nic: ResolvedNic, version: int) -> bytes:
    """The address of that family, 16 bytes; ``::`` for none."""
    return next((packed(one) for one in map(ip_address, nic.addresses) if one.version == version), NOWHERE)


def _port(nic: ResolvedNic, net: int, flags: int, mirror: int, slot: int) -> bytes:
    return Nic(
        net=net,
        flags=flags,
        group=group_id(nic.group),
        mirror=mirror,
        ip4=_of(nic, 4)[12:],
        vlan=nic.vlan,
        mac=packed_mac(nic.mac),
        slot=slot,
        ip6=_of(nic, 6),
        link_local=link_local(nic.mac).packed,
    ).pack()


def _bucket(rate: int) -> bytes:
    """:param rate: bits per second."""
    burst = max(LEAST_BURST, int(rate / 8 * BURST_SECONDS))
    return Bucket(rate=rate // 8, burst=burst, tokens=burst).pack()


def prefixes(network: ResolvedNetwork) -> tuple[bytes, bytes, bytes, bytes]:
    """``net4``, ``mask4`` (4 bytes each), ``net6`` and ``mask6`` (16 bytes) of a network entry."""
    net4 = mask4 = bytes(4)
    net6 = mask6 = NOWHERE
    if network.ipv4:
        known = ip_network(network.ipv4)
        net4, mask4 = known.network_address.packed, mask(known.prefixlen, 4)[12:]
    if network.ipv6:
        known = ip_network(network.ipv6)
        net6, mask6 = known.network_address.packed, mask(known.prefixlen, 6)
    return net4, mask4, net6, mask6
