"""The eBPF datapath: the switch of ``bpf/dispatch.bpf.c``, one for all networks of a lab on a host.

The program sits at every tap, at each network's VXLAN and gateway link, and at the NICs that are uplinks. Its tables
live as long as it sits anywhere, so the switch goes on when the agent ends, and whoever comes next finds program and
tables by the filters. What is right already is never touched: a change of the list loses no frame of anybody else.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from orchestrator import names, paths
from orchestrator.switch import bpf, filters, links, rules, tables
from orchestrator.switch.bpf import BpfError, Map, Object
from orchestrator.switch.filters import EGRESS, INGRESS, Filter
from orchestrator.switch.layout import (
    DISPATCH,
    FROM_GUEST,
    LAYOUT,
    MAPS,
    NOWHERE,
    TO_GUEST,
    UPLINK,
    Addresses,
    Attachment,
    Bucket,
    Counters,
    Flag,
    Kind,
    Limited,
    Member,
    NetworkEntry,
    Nic,
    Owner,
    Place,
    Where,
    index,
    mac_of,
    packed_mac,
    unpacked,
)
from orchestrator.switch.membership import Membership, NetworkFacts, describe

Entries = Mapping[bytes, bytes]
_REACHABLE = 2  # NUD_REACHABLE and nothing else: an entry that a frame from elsewhere may move
_SELF = 2  # NTF_SELF: the VXLAN's own table
_COUNTED_FROM_ZERO = Counters(0, 0, 0, 0, 0, 0, bytes(MAPS["counters_of"][1] - 48)).pack()
_FIRST_UPLINK_PRIORITY = 1000


def object_file() -> Path:
    return paths.bpf() / "dispatch.bpf.o"


@functools.cache
def unavailable() -> str | None:
    """Why the eBPF datapath cannot be had on this host; None where it can. Found out by loading it."""
    if not object_file().exists():
        return f"{object_file()} is not there: the toolkit was installed without clang"
    try:
        _spare.append(Object(object_file()))
    except BpfError as error:
        return error.message
    return None


_spare: list[Object] = []
"""What :func:`unavailable` has loaded, for the first who needs it: it takes the kernel a while to verify."""


@functools.cache
def _version() -> str:
    return f"{LAYOUT}:{names.digest(object_file().read_bytes().hex())}"


class Switch:
    """The dispatcher of one lab on this host, running or about to.

    :ivar maps: its tables.
    """

    def __init__(self, ip: IPRoute, uid: str, running: Filter | None) -> None:
        """:param running: where its program sits; None: it does not run."""
        self._ip = ip
        self._label = _label(uid)
        self._name = self._label + _version()
        self._priority = _FIRST_UPLINK_PRIORITY + int(uid, 16) % 30000
        self._object: Object | None = None
        self._programs: dict[str, int] = {}
        self.maps: dict[str, Map] = {}
        if running is not None:
            program = bpf.program_by_id(running.program)
            self.maps = bpf.maps_of(program)
            if running.name == self._name:
                self._programs[DISPATCH] = program
            else:
                os.close(program)
        if {name: found.shape for name, found in self.maps.items()} != MAPS:
            self._close()
            self._object = _spare.pop() if _spare else Object(object_file())
            self.maps = {name: self._object.map(name) for name in MAPS}

    def _close(self) -> None:
        for found in self.maps.values():
            found.close()
        for program in self._programs.values():
            os.close(program)
        self._programs.clear()

    def close(self) -> None:
        self._close()
        if self._object:
            self._object.close()

    # -- filters -------------------------------------------------------------------------------------------------

    def attach(self, link: int, direction: int, program: str = DISPATCH) -> None:
        """Put a program at a link, unless it sits there in this version, with these tables, already."""
        found = filters.find(self._ip, link, direction, self._label)
        if found and found.name == self._name and DISPATCH in self._programs:
            return
        priority = self._priority if program == UPLINK else 1
        filters.attach(self._ip, link, direction, self.program(program), self._name, priority)

    def program(self, name: str) -> int:
        """A program's file descriptor, valid until :meth:`close`."""
        if name not in self._programs:
            if self._object is None:
                self._object = Object(object_file(), self.maps)
            self._programs[name] = self._object.program(name)
        return self._programs[name]

    def sitting_at(self, link: int, direction: int) -> int | None:
        """A file descriptor of the program that sits at a link, for the caller to close; None where none does."""
        found = filters.find(self._ip, link, direction, self._label)
        return bpf.program_by_id(found.program) if found else None

    def detach(self, link: int, direction: int) -> None:
        filters.detach(self._ip, link, direction, self._label)

    # -- tables --------------------------------------------------------------------------------------------------

    def reconcile(
        self,
        name: str,
        wanted: Entries,
        scope: Callable[[bytes, bytes], bool],
        same: Callable[[bytes, bytes], bool] = bytes.__eq__,
    ) -> None:
        """Make the entries of a table within ``scope`` those that are ``wanted``; first what is new or different."""
        table = self.maps[name]
        for key, value in wanted.items():
            if (there := table.get(key)) is None or not same(there, value):
                table.set(key, value, bpf.LOCKED if there is not None and name == "buckets" else bpf.ANY)
        for key, value in list(table.items()):
            if key not in wanted and scope(key, value):
                table.delete(key)

    def network(self, net: int) -> NetworkEntry | None:
        raw = self.maps["networks"].get(index(net))
        return NetworkEntry.unpack(raw) if raw else None

    def networks(self) -> dict[int, NetworkEntry]:
        return {int.from_bytes(key, "little"): NetworkEntry.unpack(raw) for key, raw in self.maps["networks"].items()}

    def rules_of(self, entry: NetworkEntry) -> list[bytes]:
        found = (
            self.maps["rules"].get(index(number))
            for number in range(entry.first_rule, entry.first_rule + entry.rules)
        )
        return [raw for raw in found if raw]

    def slots_of(self, wanted: Iterable[int]) -> dict[int, int]:
        """Where links, by index, have their counters. Who has none yet is given some, and counts from zero.

        :raise BpfError: there are none left.
        """
        taken = {key: Nic.unpack(raw).slot for key, raw in self.maps["ports"].items()}
        taken |= {key: Attachment.unpack(raw).slot for key, raw in self.maps["links"].items()}
        used = set(taken.values())
        free = (slot for slot in range(1, MAPS["counters_of"][2]) if slot not in used)
        found = {}
        for link in wanted:
            slot = taken.get(index(link)) or next(free, None)
            if slot is None:
                raise BpfError(f"the table 'counters_of' is full: it has {MAPS['counters_of'][2]} entries")
            if slot not in used:
                self.maps["counters_of"].set(index(slot), _COUNTED_FROM_ZERO)
            found[link] = slot
        return found

    def forget_port(self, link: int) -> None:
        """Take a tap from the tables."""
        raw = self.maps["ports"].get(index(link))
        self.maps["ports"].delete(index(link))
        for direction in (FROM_GUEST, TO_GUEST):
            self.maps["buckets"].delete(Limited(link, direction).pack())
        if raw is None:
            return
        nic = Nic.unpack(raw)
        owner = Owner(nic.net, nic.mac).pack()
        here = False
        for address in (bytes(10) + b"\xff\xff" + nic.ip4, nic.ip6, nic.link_local):
            for net in (nic.net, 0):
                key = Where(address, net).pack()
                place = self.maps["list"].get(key)
                if place and Place.unpack(place).ifindex == link:
                    self.maps["list"].delete(key)
                    here = True
        if here:
            self.maps["known"].delete(owner)
            for key in self.maps["trunks"].all_keys():
                if Member.unpack(key).mac == nic.mac:
                    self.maps["trunks"].delete(key)


@contextlib.contextmanager
def _netlink_of(uid: str, what: str) -> Iterator[tuple[IPRoute, list[Any]]]:
    with links.netlink(what) as ip:
        yield ip, ip.get_links()


def _label(uid: str) -> str:
    """What the names of the lab's filters begin with."""
    return f"{names.PREFIX}:{uid}:"


def _running(ip: IPRoute, uid: str, found: list[Any]) -> Filter | None:
    """Where the lab's program sits on this host: at the gateway link of every network."""
    for link in found:
        owner = names.parse_mark(link.get("ifalias"))
        if owner and owner[:2] == (uid, "network"):
            sits = filters.find(ip, link["index"], EGRESS, _label(uid))
            if sits:
                return sits
    return None


@contextlib.contextmanager
def opened(ip: IPRoute, uid: str, found: list[Any]) -> Iterator[Switch | None]:
    """The lab's switch on this host, if it runs."""
    running = _running(ip, uid, found)
    if running is None:
        yield None
        return
    with contextlib.closing(Switch(ip, uid, running)) as switch:
        yield switch


# -- the datapath ----------------------------------------------------------------------------------------------------


def observe(uid: str) -> list[NetworkFacts]:
    """Every network of the lab ``uid`` on this host, whatever its datapath."""
    with _netlink_of(uid, "the networks cannot be listed") as (ip, found):
        facts = links.observe(ip, uid, found)
        with opened(ip, uid, found) as switch:
            entries = switch.networks() if switch else {}
            for net, each in facts.items():
                if switch and net in entries:
                    _observe_network(ip, switch, net, entries[net], each, found)
                else:
                    each.lacks = unavailable()
                    members = {link.get("ifname") for link in found if link.get("master") == net}
                    each.ports = {tap: port for tap, port in each.ports.items() if tap in members}
    return list(facts.values())


def _observe_network(
    ip: IPRoute, switch: Switch, net: int, entry: NetworkEntry, facts: NetworkFacts, found: list[Any]
) -> None:
    facts.datapath = "ebpf"
    facts.multicast = "flood" if entry.flags & Flag.FLOOD else "drop"
    facts.rules = rules.digest(switch.rules_of(entry))
    hosts = hosts_behind(ip, entry.vxlan)
    taps = {link["index"]: link.get("ifname") for link in found}
    trunks: dict[bytes, list[int]] = {}
    for member in map(Member.unpack, switch.maps["trunks"].all_keys()):
        trunks.setdefault(member.mac, []).append(member.vlan)
    for key, raw in switch.maps["known"].items():
        owner, addresses = Owner.unpack(key), Addresses.unpack(raw)
        if owner.net != net:
            continue
        ip4 = bytes(10) + b"\xff\xff" + addresses.ip4
        given = [one for one in (ip4, addresses.ip6) if one not in (NOWHERE, NOWHERE[:10] + b"\xff\xff" + bytes(4))]
        leads = [switch.maps["list"].get(Where(one, net).pack()) for one in (*given, addresses.link_local)]
        places = {place for place in leads if place}
        if len(places) != 1 or None in leads:
            continue  # half of it is missing
        place = Place.unpack(places.pop())
        here = bool(place.flags & Flag.LOCAL)
        if here and not _serves(switch, place, owner):
            continue
        facts.listed[mac_of(owner.mac)] = describe(
            at=None if here else hosts.get(mac_of(owner.mac), "nowhere"),
            addresses=[str(unpacked(one)) for one in given],
            vlan=place.vlan,
            trunk=trunks.get(owner.mac, []),
            group=place.group,
            isolated=bool(place.flags & Flag.ISOLATED),
            rates=(_rate(switch, place, FROM_GUEST), _rate(switch, place, TO_GUEST)),
            mirror=taps.get(place.mirror),
        )


def _serves(switch: Switch, place: Place, owner: Owner) -> bool:
    """The port that a place leads to is the NIC's."""
    raw = switch.maps["ports"].get(index(place.ifindex))
    return raw is not None and Nic.unpack(raw).mac == owner.mac


def _rate(switch: Switch, place: Place, direction: int) -> int:
    raw = switch.maps["buckets"].get(Limited(place.ifindex, direction).pack())
    return Bucket.unpack(raw).rate if raw and place.flags & Flag.LIMITED else 0


def hosts_behind(ip: IPRoute, vxlan: int) -> dict[str, str]:
    """MAC → underlay address of its host, as the VXLAN knows."""
    if not vxlan:
        return {}
    return {
        str(entry.get("lladdr")): str(entry.get("dst"))
        for entry in ip.get_neighbours(family=7, ifindex=vxlan)
        if entry.get("dst") and entry.get("lladdr") != links.FLOOD
    }


def ensure(uid: str, wanted: Membership) -> links.Plugged:
    """Make the network on this host as ``wanted``; nothing that is right already is touched.

    :raise TakenError: a link of a name that we need is somebody else's.
    :raise NetworkError: the kernel refuses, or a table is full.
    """
    network = wanted.network
    with links.netlink(f"network {network.name}") as ip:
        net = links.ensure_gateway(ip, uid, network, resolves=False)
        vxlan = links.ensure_vxlan(ip, uid, wanted, master=0)
        links.set_forwarding(network.bridge, wanted.forward)
        found = ip.get_links()
        taps = {}
        for link, _, name in links.ports(uid, found):
            if name == network.name:
                taps[link.get("ifname")] = link["index"]
        with contextlib.closing(Switch(ip, uid, _running(ip, uid, found))) as switch:
            slots = switch.slots_of((net, *([vxlan] if vxlan else []), *taps.values()))
            here = tables.HostLinks(net, vxlan, taps, slots)
            made = tables.build(wanted, here)
            _write(switch, wanted, here, made)
            if vxlan:
                _lead(ip, vxlan, made.hosts)
                switch.attach(vxlan, INGRESS)
            switch.attach(net, EGRESS)
            for link, _, name in links.ports(uid, found):
                if name == network.name:
                    switch.attach(link["index"], INGRESS)
                    if link.get("master") or link.get("mtu") != network.mtu or link.get("state") != "up":
                        ip.link("set", index=link["index"], master=0, mtu=network.mtu, state="up")
            _uplinks(ip, switch, found, wanted)
    return links.Plugged(net, taps)


def _write(switch: Switch, wanted: Membership, here: tables.HostLinks, made: tables.Tables) -> None:
    net, maps = here.net, switch.maps
    macs = {Owner.unpack(key).mac for key in (*made.known, *maps["known"].all_keys()) if Owner.unpack(key).net == net}
    mine = {int.from_bytes(key, "little") for key in made.ports}
    mine |= {int.from_bytes(key, "little") for key, raw in maps["ports"].items() if Nic.unpack(raw).net == net}
    _write_network(switch, wanted, here)
    switch.reconcile("trunks", made.trunks, lambda key, _: Member.unpack(key).mac in macs)
    switch.reconcile("buckets", made.buckets, lambda key, _: Limited.unpack(key).ifindex in mine, _same_rate)
    switch.reconcile("known", made.known, lambda key, _: Owner.unpack(key).net == net)
    switch.reconcile("list", made.list, lambda _, value: Place.unpack(value).net == net)
    switch.reconcile("ports", made.ports, lambda _, value: Nic.unpack(value).net == net)
    switch.reconcile("links", made.links, lambda _, value: Attachment.unpack(value).net == net)


def _same_rate(there: bytes, wanted: bytes) -> bool:
    one, other = Bucket.unpack(there), Bucket.unpack(wanted)
    return (one.rate, one.burst) == (other.rate, other.burst)


def _write_network(switch: Switch, wanted: Membership, here: tables.HostLinks) -> None:
    network, before = wanted.network, switch.network(here.net)
    packed = rules.packed(network.rules)
    first, generation = (before.first_rule, before.generation) if before else (0, 0)
    if not before or switch.rules_of(before) != packed:
        first, generation = _room_for(switch, len(packed)), generation + 1
        for number, rule in enumerate(packed):
            switch.maps["rules"].set(index(first + number), rule)
    flags = Flag.UPLINK if wanted.forward != "no" else Flag(0)
    flags |= Flag.FLOOD if network.multicast == "flood" else Flag(0)
    flags |= Flag.RULES if packed else Flag(0)
    net4, mask4, net6, mask6 = tables.prefixes(network)
    entry = NetworkEntry(
        flags=flags,
        vxlan=here.vxlan,
        mtu=network.mtu,
        generation=generation,
        first_rule=first,
        rules=len(packed),
        net4=net4,
        mask4=mask4,
        net6=net6,
        mask6=mask6,
        gateway=packed_mac(network.gateway_mac),
        slot=here.slots[here.net],
    )
    if entry != before:
        switch.maps["networks"].set(index(here.net), entry.pack())


def _room_for(switch: Switch, count: int) -> int:
    """The first of ``count`` free places in a row in the table of rules; those in use stay as they are until the
    network's entry names the new ones.

    :raise BpfError: there are not as many.
    """
    start = 0
    for entry in sorted(switch.networks().values(), key=lambda each: each.first_rule):
        if entry.rules and entry.first_rule - start >= count:
            break
        start = max(start, entry.first_rule + entry.rules) if entry.rules else start
    if start + count > MAPS["rules"][2]:
        raise BpfError(f"the table 'rules' is full: it has {MAPS['rules'][2]} entries", hint="fewer rules")
    return start


def _lead(ip: IPRoute, vxlan: int, hosts: Mapping[str, str]) -> None:
    """Tell the VXLAN which host each MAC is on."""
    have = hosts_behind(ip, vxlan)
    for mac, host in hosts.items():
        if have.get(mac) != host:
            ip.fdb("replace", ifindex=vxlan, lladdr=mac, dst=host, state=_REACHABLE, flags=_SELF)
    for mac in have.keys() - hosts.keys():
        ip.fdb("del", ifindex=vxlan, lladdr=mac, dst=have[mac])


def _uplinks(ip: IPRoute, switch: Switch, found: list[Any], wanted: Membership | None) -> None:
    """Have the program sit at the NICs that lead out, as long as a network has an uplink."""
    table = switch.maps["links"]
    routed = any(entry.flags & Flag.UPLINK for entry in switch.networks().values())
    physical = _physical(ip, found) if routed else set()
    known = {
        int.from_bytes(key, "little") for key, raw in table.items() if Attachment.unpack(raw).kind == Kind.PHYSICAL
    }
    for link in physical:
        if link not in known:
            table.set(index(link), Attachment(Kind.PHYSICAL, 0, 0).pack())
        switch.attach(link, INGRESS, UPLINK)
    for link in known - physical:
        switch.detach(link, INGRESS)
        table.delete(index(link))


def _physical(ip: IPRoute, found: list[Any]) -> set[int]:
    """The NICs that a default route leads through, or that a local host has for it; Ethernet only."""
    named = {link["index"]: link for link in found}
    out = {link["index"] for link in found if link.get("ifname") == links.UPLINK}
    for family in (2, 10):
        for route in ip.get_routes(family=family, table=254):
            if route["dst_len"] == 0:
                hops = [hop["oif"] for hop in route.get("multipath") or []]
                out |= {number for number in (route.get("oif"), *hops) if number}
    return {number for number in out if number in named and named[number]["ifi_type"] == 1}


def remove(uid: str, name: str) -> None:
    """Remove the network with its VXLAN and its taps from this host; does nothing where there is none."""
    with _netlink_of(uid, f"network {name}") as (ip, found), opened(ip, uid, found) as switch:
        net = next((each["index"] for each in found if each.get("ifalias") == names.mark(uid, "network", name)), 0)
        if switch and net:
            for key, raw in list(switch.maps["ports"].items()):
                if Nic.unpack(raw).net == net:
                    switch.forget_port(int.from_bytes(key, "little"))
            switch.maps["networks"].delete(index(net))
            _uplinks(ip, switch, found, None)
            switch.reconcile("list", {}, lambda _, value: Place.unpack(value).net == net)
            switch.reconcile("known", {}, lambda key, _: Owner.unpack(key).net == net)
            switch.reconcile("links", {}, lambda _, value: Attachment.unpack(value).net == net)
        links.remove(uid, name)


def remove_port(uid: str, guest: str, tap: str) -> None:
    """Remove a tap; does nothing where there is none.

    :raise TakenError: it is somebody else's.
    """
    with _netlink_of(uid, f"tap of guest {guest}") as (ip, found):
        link = next((each for each in found if each.get("ifname") == tap), None)
        links.remove_port(uid, guest, tap)
        if link is not None:
            with opened(ip, uid, found) as switch:
                if switch:
                    switch.forget_port(link["index"])


def leave(ip: IPRoute, uid: str, network: str, found: list[Any]) -> None:
    """Take the switch from a network that is to be bridged."""
    with opened(ip, uid, found) as switch:
        mark = names.mark(uid, "network", network)
        net = next((each["index"] for each in found if each.get("ifalias") == mark), 0)
        if not switch or not net:
            return
        entry = switch.network(net)
        for link, _, name in links.ports(uid, found):
            if name == network:
                switch.detach(link["index"], INGRESS)
        if entry and entry.vxlan:
            switch.detach(entry.vxlan, INGRESS)
        switch.maps["networks"].delete(index(net))
        _uplinks(ip, switch, found, None)
        switch.detach(net, EGRESS)
