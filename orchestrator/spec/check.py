"""What a lab must be beyond the shape of its parts: names that exist, addresses that fit and are unique."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Hashable, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from xml.etree import ElementTree

from ruamel.yaml.nodes import MappingNode

from orchestrator.hosts.model import UNDERLAY_HOSTS
from orchestrator.spec.model import LabSpec
from orchestrator.spec.node import Keys, Node
from orchestrator.spec.report import Report, nearest_or_all, show, spell, wrong
from orchestrator.spec.yamltree import MalformedError, compose
from orchestrator.switch.model import ANYONE, GROUP, NicSpec, prefix_of

VXLAN_OVERHEAD = 50  # bytes: outer IPv4, UDP and VXLAN headers, and the inner Ethernet header
BUILT_IN_IMAGES = ("tiny", "debian")

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address


def check(spec: LabSpec, tree: Node, report: Report) -> None:
    """Report everything that is wrong between the parts of ``spec``.

    :param tree: the file. It may have entries that ``spec`` lacks, because they are wrong in themselves; what
        refers to those is not looked at.
    """
    checks = _Checks(spec, tree, report)
    checks.hosts()
    checks.networks()
    checks.images()
    checks.guests()
    checks.nics()


class _Checks:
    def __init__(self, spec: LabSpec, tree: Node, report: Report) -> None:
        self.spec = spec
        self.tree = tree
        self.report = report

    def hosts(self) -> None:
        taken: list[tuple[Hashable, Keys]] = []
        for name, host in self.spec.hosts.items():
            if isinstance(host, UNDERLAY_HOSTS):
                keys: Keys = ("hosts", name, "address")
                address = host.address
                if address and (fault := _unusable(address, self.spec.underlay.cidr)):
                    self._wrong(keys, fault)
            else:
                keys = ("hosts", name, "underlay")
                address = host.underlay
            if address:
                taken.append((address, keys))
        self._unique(taken)

    def networks(self) -> None:
        ranges: list[tuple[Network, Keys]] = []
        if any(isinstance(host, UNDERLAY_HOSTS) for host in self.spec.hosts.values()):
            ranges.append((self.spec.underlay.cidr, ("underlay", "cidr")))
        for name, network in self.spec.networks.items():
            ranges += [
                (cidr, ("networks", name, f"ipv{cidr.version}")) for cidr in (network.ipv4, network.ipv6) if cidr
            ]
            self._carried(name, network.mtu)
        self._disjoint(ranges)
        self._unique(
            (net.bridge, ("networks", name, "bridge")) for name, net in self.spec.networks.items() if net.bridge
        )
        for name, network in self.spec.networks.items():
            for index, rule in enumerate(network.rules):
                for side in ("source", "destination"):
                    self._party(getattr(rule, side), name, ("networks", name, "rules", index, side))

    def _party(self, party: str, network: str, keys: Keys) -> None:
        """A side of a rule must be something that there is."""
        plugged = {
            guest: nics
            for guest, each in self.spec.guests.items()
            if (nics := [nic for nic in each.nics if nic.network == network])
        }
        if party == ANYONE or party in plugged:
            return
        if party.startswith(GROUP):
            groups = {nic.group for nics in plugged.values() for nic in nics if nic.group}
            if party.removeprefix(GROUP) not in groups:
                self._wrong(keys, "a group that a NIC on the network is in", hint=nearest_or_all(party, groups))
        elif prefix_of(party) is None:
            what = "the name of a guest on the network, group:NAME, any, or an address or network"
            self._wrong(keys, what, hint=nearest_or_all(party, plugged))

    def _carried(self, name: str, mtu: int | None) -> None:
        """An MTU must leave room for VXLAN on the underlay that we make; of other underlays it is not known."""
        local = all(isinstance(host, UNDERLAY_HOSTS) for host in self.spec.hosts.values())
        room = self.spec.underlay.mtu - VXLAN_OVERHEAD
        if mtu is not None and local and len(self.spec.hosts) > 1 and mtu > room:
            self._say(
                ("networks", name, "mtu"),
                f"{mtu} bytes do not fit the underlay, which carries {room} of them",
                hint=f"raise `underlay.mtu` to {mtu + VXLAN_OVERHEAD}, or lower this",
            )

    def images(self) -> None:
        for name, image in self.spec.images.items():
            if name in BUILT_IN_IMAGES:
                self._say(("images", name), f"{name!r} is the name of a built-in image", hint="choose another name")
            self._console(image.ready, ("images", name, "ready"))

    def guests(self) -> None:
        hosts, images = self._names("hosts"), {*self._names("images"), *BUILT_IN_IMAGES}
        for name, guest in self.spec.guests.items():
            at: Keys = ("guests", name)
            self._known(guest.host, (*at, "host"), "the name of a host", hosts)
            self._known(guest.image, (*at, "image"), "the name of an image", images)
            self._console(guest.ready, (*at, "ready"))
            self._unique((disk.name, (*at, "disks", i, "name")) for i, disk in enumerate(guest.disks))
            if guest.user_data is not None and (fault := _user_data_fault(guest.user_data)):
                self._say((*at, "user_data"), fault)
            if guest.xml is not None and (fault := _xml_fault(guest.xml)):
                self._say((*at, "xml"), fault)

    def nics(self) -> None:
        nics: list[tuple[NicSpec, Keys]] = [
            (nic, ("guests", name, "nics", index))
            for name, guest in self.spec.guests.items()
            for index, nic in enumerate(guest.nics)
        ]
        names = self._names("networks")
        addresses: list[tuple[Hashable, Keys]] = []
        for nic, at in nics:
            self._known(nic.network, (*at, "network"), "the name of a network", names)
            for address in (nic.ipv4, nic.ipv6):
                if address:
                    keys = (*at, f"ipv{address.version}")
                    addresses.append(((nic.network, address), keys))
                    self._fits(address, nic.network, keys)
            self._mirrors(nic, at)
            self._device(nic, at)
        self._unique(addresses)
        self._unique((nic.mac, (*at, "mac")) for nic, at in nics if nic.mac)

    def _device(self, nic: NicSpec, at: Keys) -> None:
        network = self.spec.networks.get(nic.network)
        vhost_user = network is not None and network.datapath == "vhost-user"
        if vhost_user and nic.model != "virtio":
            self._wrong((*at, "model"), "virtio, which alone has virtqueues for `datapath: vhost-user`")
        if network is not None and not vhost_user and nic.queues > 1:
            self._wrong((*at, "queues"), f"1, unless networks.{nic.network} has `datapath: vhost-user`")

    def _mirrors(self, nic: NicSpec, at: Keys) -> None:
        """Who is to get copies must be there, be willing, and be on the same host."""
        if nic.mirror_to is None:
            return
        keys, owner = (*at, "mirror_to"), str(at[1])
        self._known(nic.mirror_to, keys, "the name of another guest", self._names("guests") - {owner})
        target = self.spec.guests.get(nic.mirror_to)
        if target is None or nic.mirror_to == owner:
            return
        if not any(each.network == nic.network and each.takes_mirror for each in target.nics):
            self._say(
                keys,
                f"guest {nic.mirror_to} has no NIC on {nic.network} that takes copies",
                hint=f"give guests.{nic.mirror_to}.nics one with `takes_mirror: true`",
            )
        elif target.host != self.spec.guests[owner].host:
            self._say(keys, f"guest {nic.mirror_to} is on another host, and copies do not leave a host")

    def _fits(self, address: Address, name: str, keys: Keys) -> None:
        network = self.spec.networks.get(name)
        if network is None:
            return
        cidr = network.ipv4 if isinstance(address, IPv4Address) else network.ipv6
        if cidr is None:
            self._say(
                keys,
                f"the network {name!r} has no IPv{address.version} addresses",
                hint=f"give networks.{name} an `ipv{address.version}:`",
            )
        elif fault := _unusable(address, cidr):
            self._wrong(keys, fault)

    def _disjoint(self, ranges: list[tuple[Network, Keys]]) -> None:
        """Report ranges that overlap. CIDRs are nested or disjoint, so one sweep in their order finds all."""
        order = {keys: index for index, (_, keys) in enumerate(ranges)}
        widest: tuple[Network, Keys] | None = None
        for found in sorted(ranges, key=lambda r: (r[0].version, int(r[0].network_address), r[0].prefixlen)):
            if widest and widest[0].version == found[0].version and found[0].network_address in widest[0]:
                (other, first), (cidr, second) = sorted((widest, found), key=lambda r: order[r[1]])
                self._say(second, f"{show(str(cidr))} overlaps {other}, which is {self._spell(first)}")
            else:
                widest = found

    def _console(self, ready: str | None, keys: Keys) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a regular expression that may change its meaning still is one
                re.compile((ready or "").removeprefix("console:"))
        except (re.error, OverflowError, RecursionError) as error:
            self._wrong(keys, f"console: and a regular expression ({error})")

    def _names(self, section: str) -> set[str]:
        node, left = self.tree.nearest((section,))
        return set() if left else set(node.value)

    def _known(self, name: str, keys: Keys, what: str, names: Collection[str]) -> None:
        if name not in names:
            self._wrong(keys, what, hint=nearest_or_all(name, names))

    def _unique(self, found: Iterable[tuple[Hashable, Keys]]) -> None:
        first: dict[Hashable, Keys] = {}
        for value, keys in found:
            if value in first:
                shown = show(self.tree.nearest(keys)[0].value)
                self._say(keys, f"{shown} is taken by {self._spell(first[value])}")
            else:
                first[value] = keys

    def _spell(self, keys: Keys) -> str:
        node, left = self.tree.nearest(keys)
        return f"{spell(keys)} ({node.place})" if len(left) < len(keys) else f"{spell(keys)} (the default)"

    def _wrong(self, keys: Keys, expected: str, hint: str | None = None) -> None:
        self.report.wrong(self.tree.nearest(keys)[0], expected, hint)

    def _say(self, keys: Keys, message: str, hint: str | None = None) -> None:
        self.report.add(self.tree.nearest(keys)[0], message, hint=hint)


def _unusable(address: Address, network: Network) -> str | None:
    """Why ``address`` cannot be given to a host or guest of ``network``, as what was expected."""
    if address not in network:
        return f"an address of {network}"
    if address == network.network_address:
        return "a free address: it is the network itself"
    if address == network.network_address + 1:
        return "a free address: it is the gateway's"
    if isinstance(network, IPv4Network) and address == network.broadcast_address:
        return "a free address: it is the broadcast address"
    return None


def _user_data_fault(text: str) -> str | None:
    """What keeps cloud-init from reading ``text``."""
    if text.startswith(("#!", "## template:")):
        return None
    try:
        root = compose(text)
    except MalformedError as error:
        return f"line {error.line} of the user data: {error.message}"
    if isinstance(root, MappingNode) or (root is None and text.startswith("#cloud-config")):
        return None
    return wrong(text, "cloud-init user data: a script that begins with #!, or a YAML mapping")


def _xml_fault(text: str) -> str | None:
    """What keeps ``text`` from being elements that can stand in a domain's XML."""
    if re.search(r"<!(DOCTYPE|ENTITY)", text, re.IGNORECASE):
        return "document type and entity declarations are not allowed in XML here"
    try:
        root = ElementTree.fromstring(f"<x>\n{text}</x>")
    except ElementTree.ParseError as error:
        return f"malformed XML: {str(error).split(':')[0]} in line {max(1, error.position[0] - 1)}"
    outside = [root.text, *(child.tail for child in root)]
    if any(piece and piece.strip() for piece in outside):
        return "expected XML elements, found text outside of them"
    return None
