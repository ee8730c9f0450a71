"""What the switch of a host has counted: of each port, of each network's other links, and of each pair who talk.

The program counts for each CPU; what is told here are the sums. A bridge counts nothing of that: of a bridged network
there is what the kernel counts at each link.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from orchestrator.errors import NetworkError
from orchestrator.switch import dispatcher, links
from orchestrator.switch.layout import (
    FROM_GUEST,
    NOWHERE,
    TO_GUEST,
    Attachment,
    Bucket,
    Counters,
    Flag,
    Limited,
    Member,
    NetworkEntry,
    Nic,
    Owner,
    Pair,
    Traffic,
    index,
    mac_of,
    unpacked,
)
from orchestrator.switch.membership import NetworkFacts

HOST = "host"
"""The name of whoever has a network's gateway MAC: the host itself, and all that it routes."""
_ETHERNET_BYTES = 14


class Table(Protocol):
    """What is read of a :class:`~orchestrator.switch.bpf.Map`."""

    def get(self, key: bytes, /) -> bytes | None: ...
    def each(self, key: bytes, /) -> list[bytes]: ...
    def all_keys(self) -> list[bytes]: ...


Tables = Mapping[str, Table]


@dataclass(frozen=True)
class Counted:
    """Sums since a link was made, seen from who is behind it: ``tx`` is what he has sent, ``rx`` what he got.

    :ivar answered: questions for a MAC that the switch has answered; None: nobody counts them.
    :ivar dropped: frames of his that were dropped, by reason; without those that never were.
    :ivar last_seen_seconds_ago: of his last frame; None: there was none, or nobody looks.
    """

    tx_packets: int = 0
    tx_bytes: int = 0
    rx_packets: int = 0
    rx_bytes: int = 0
    answered: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    last_seen_seconds_ago: float | None = None


@dataclass(frozen=True)
class PortStats:
    """A guest's NIC.

    :ivar plugged: the datapath knows the tap; else nothing goes through it.
    :ivar addresses: those that the guest may use; a bridge knows none.
    :ivar group: number of its group, in hexadecimal.
    :ivar rate_out: bits per second; 0: no limit.
    :ivar mirror: guest that gets copies.
    :ivar overruns: frames for the guest that it did not take in time, or while nobody was there to take them.
    :ivar vhost_user: of a NIC that a process serves: whether QEMU is connected, why it is not served, and frames that
        went by the switch, or found no room, or could not be read. None: it is none.
    """

    guest: str
    mac: str
    tap: str
    network: str
    plugged: bool = True
    addresses: list[str] = field(default_factory=list)
    vlan: int = 0
    trunk: list[int] = field(default_factory=list)
    group: str | None = None
    isolated: bool = False
    rate_out: int = 0
    rate_in: int = 0
    mirror: str | None = None
    overruns: int = 0
    vhost_user: dict[str, Any] | None = None
    counted: Counted = field(default_factory=Counted)

    def to_json(self) -> dict[str, Any]:
        """Flat: what is counted stands beside what the port is."""
        data = asdict(self)
        counted: dict[str, Any] = data.pop("counted")
        return data | counted


@dataclass(frozen=True)
class PairStats:
    """How much one sends to another. Names are of guests, or ``host``; None: the MAC is nobody's whom we know."""

    sender: str | None
    sender_mac: str
    receiver: str | None
    receiver_mac: str
    network: str | None
    packets: int
    bytes: int
    last_seen_seconds_ago: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NetworkStats:
    """A network on this host.

    :ivar lacks: why the host cannot have the switch; it is set only where the network is bridged.
    :ivar gateway: the host's own addresses, in CIDR notation.
    :ivar rules: how many there are; None: a bridge has none.
    :ivar listed: NICs on the list, those of other hosts too; None as for ``rules``.
    :ivar host: counted at the gateway link: ``tx`` is what the host itself sends, or routes, to guests.
    :ivar underlay: counted at the VXLAN: ``tx`` is what comes from the network's other hosts. None: there are none.
    """

    network: str
    bridge: str
    datapath: str
    lacks: str | None
    mtu: int
    gateway: list[str]
    gateway_mac: str
    uplink: bool
    multicast: str
    rules: int | None
    listed: int | None
    vxlan: str | None
    peers: list[str]
    ports: list[PortStats]
    host: Counted
    underlay: Counted | None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ports": [port.to_json() for port in self.ports]}


@dataclass(frozen=True)
class HostStats:
    """
    :ivar clock: seconds; the difference of two says how far two readings are apart.
    :ivar pairs: None where they were not asked for.
    """

    clock: float
    networks: list[NetworkStats]
    pairs: list[PairStats] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "clock": self.clock,
            "networks": [network.to_json() for network in self.networks],
            "pairs": None if self.pairs is None else [pair.to_json() for pair in self.pairs],
        }


# -- beside the switch -----------------------------------------------------------------------------------------------

_SERVED = ("connected", "failed", "slow_packets", "dropped_full", "dropped_malformed")


def with_copied(stats: HostStats, told: Mapping[str, Any]) -> HostStats:
    """``stats`` with what the vhost-user process has copied from guest to guest.

    :param told: as :meth:`Vswitch.stats <orchestrator.switch.vswitch.Vswitch.stats>` gives it; empty: there is none.
    """
    if not told:
        return stats
    now = int(stats.clock * 1e9)
    networks = [
        replace(network, ports=[_with_copied(port, told["ports"].get(port.tap), now) for port in network.ports])
        for network in stats.networks
    ]
    networks = [
        replace(network, datapath="vhost-user") if any(port.vhost_user for port in network.ports) else network
        for network in networks
    ]
    return replace(stats, networks=networks, pairs=_pairs_with_copied(stats, told["pairs"], now))


def _with_copied(port: PortStats, told: Mapping[str, Any] | None, now: int) -> PortStats:
    if told is None:
        return port
    seen = [port.counted.last_seen_seconds_ago, _ago(told["last_seen_ns"], now)]
    counted = replace(
        port.counted,
        tx_packets=port.counted.tx_packets + told["tx_packets"],
        tx_bytes=port.counted.tx_bytes + told["tx_bytes"],
        rx_packets=port.counted.rx_packets + told["rx_packets"],
        rx_bytes=port.counted.rx_bytes + told["rx_bytes"],
        last_seen_seconds_ago=min((each for each in seen if each is not None), default=None),
    )
    return replace(port, vhost_user={name: told[name] for name in _SERVED}, counted=counted)


def _pairs_with_copied(stats: HostStats, told: Sequence[Mapping[str, Any]], now: int) -> list[PairStats] | None:
    if stats.pairs is None:
        return None
    known = {port.mac: (port.guest, network.network) for network in stats.networks for port in network.ports}
    found = {(pair.sender_mac, pair.receiver_mac): pair for pair in stats.pairs}
    for each in told:
        key = sender, receiver = each["from"], each["to"]
        (name, network), (other, _) = (known.get(mac, (None, None)) for mac in key)
        before = found.get(key, PairStats(name, sender, other, receiver, network, 0, 0, None))
        seen = [before.last_seen_seconds_ago, _ago(each["last_seen_ns"], now)]
        found[key] = replace(
            before,
            packets=before.packets + each["packets"],
            bytes=before.bytes + each["bytes"],
            last_seen_seconds_ago=min((one for one in seen if one is not None), default=None),
        )
    return sorted(found.values(), key=lambda pair: (-pair.bytes, pair.sender_mac, pair.receiver_mac))


# -- out of the tables -----------------------------------------------------------------------------------------------


def _ago(seen: int, now: int) -> float | None:
    """Nanoseconds since boot, and now, to seconds."""
    return max(0, now - seen) / 1e9 if seen else None


def counted(copies: Iterable[bytes], now: int) -> Counted:
    """The sum of a link's counters of all CPUs.

    :param now: nanoseconds since boot.
    """
    each = [Counters.unpack(raw) for raw in copies]
    dropped: dict[str, int] = {}
    for one in each:
        for reason, count in one.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    return Counted(
        tx_packets=sum(one.tx_packets for one in each),
        tx_bytes=sum(one.tx_bytes for one in each),
        rx_packets=sum(one.rx_packets for one in each),
        rx_bytes=sum(one.rx_bytes for one in each),
        answered=sum(one.answered for one in each),
        dropped={reason: count for reason, count in dropped.items() if count},
        last_seen_seconds_ago=_ago(max((one.last_seen for one in each), default=0), now),
    )


def pairs(table: Table, names: Mapping[str, str], networks: Mapping[str, str], now: int) -> list[PairStats]:
    """Those who talk, the busiest first.

    :param names: MAC → guest.
    :param networks: MAC → network.
    """
    found = []
    for key in table.all_keys():
        copies = [Traffic.unpack(raw) for raw in table.each(key)]
        if not copies:
            continue  # it has just made room for another one
        sender, receiver = (mac_of(raw) for raw in (Pair.unpack(key).sender, Pair.unpack(key).receiver))
        found.append(
            PairStats(
                sender=names.get(sender),
                sender_mac=sender,
                receiver=names.get(receiver),
                receiver_mac=receiver,
                network=networks.get(sender) or networks.get(receiver),
                packets=sum(one.packets for one in copies),
                bytes=sum(one.bytes for one in copies),
                last_seen_seconds_ago=_ago(max(one.last_seen for one in copies), now),
            )
        )
    return sorted(found, key=lambda pair: (-pair.bytes, pair.sender_mac, pair.receiver_mac))


def port(
    tables: Tables,
    number: int,
    head: PortStats,
    guests: Mapping[int, str],
    trunks: Mapping[bytes, Sequence[int]],
    now: int,
) -> PortStats:
    """A port with what the switch knows of it.

    :param number: the tap's index.
    :param head: who it is, and ``overruns``.
    :param guests: index of a tap → guest.
    :param trunks: MAC → the VLANs that it is in by tagged frames.
    """
    raw = tables["ports"].get(index(number))
    if raw is None:
        return replace(head, plugged=False)
    nic = Nic.unpack(raw)
    given = [bytes(10) + b"\xff\xff" + nic.ip4] if any(nic.ip4) else []
    given += [nic.ip6] if nic.ip6 != NOWHERE else []
    return replace(
        head,
        addresses=[str(unpacked(address)) for address in given],
        vlan=nic.vlan,
        trunk=sorted(trunks.get(nic.mac, ())),
        group=f"{nic.group:08x}" if nic.group else None,
        isolated=bool(nic.flags & Flag.ISOLATED),
        rate_out=_rate(tables, number, FROM_GUEST),
        rate_in=_rate(tables, number, TO_GUEST),
        mirror=guests.get(nic.mirror),
        counted=counted(tables["counters_of"].each(index(nic.slot)), now),
    )


def _rate(tables: Tables, number: int, direction: int) -> int:
    raw = tables["buckets"].get(Limited(number, direction).pack())
    return Bucket.unpack(raw).rate * 8 if raw else 0


# -- out of the kernel's links ---------------------------------------------------------------------------------------


def _of_link(link: Any, *, ours: bool = False) -> Counted:
    """What the kernel counts at a link.

    :param ours: the host is behind it; else somebody at the other end.
    """
    found = link.get_attr("IFLA_STATS64") or {}
    come, gone = ("tx", "rx") if ours else ("rx", "tx")
    return Counted(
        tx_packets=int(found.get(f"{come}_packets", 0)),
        tx_bytes=int(found.get(f"{come}_bytes", 0)),
        rx_packets=int(found.get(f"{gone}_packets", 0)),
        rx_bytes=int(found.get(f"{gone}_bytes", 0)),
    )


def _overruns(link: Any) -> int:
    return int((link.get_attr("IFLA_STATS64") or {}).get("tx_dropped", 0))


@dataclass(frozen=True)
class _Reader:
    """One reading of one host: the links as they are, and the tables of the switch if one runs."""

    uid: str
    links: Sequence[Any]
    tables: Tables
    entries: Mapping[int, NetworkEntry]
    now: int

    def _link(self, name: str | None) -> Any:
        return next((link for link in self.links if link.get("ifname") == name), None)

    def _heads(self, network: str) -> dict[int, PortStats]:
        """Index → who is behind it."""
        found = {}
        for link, port, name in links.ports(self.uid, list(self.links)):
            guest, _, mac = port.partition("/")
            if name == network:
                found[link["index"]] = PortStats(guest, mac, link.get("ifname"), name, overruns=_overruns(link))
        return dict(sorted(found.items(), key=lambda item: (item[1].guest, item[1].mac)))

    def network(self, net: int, facts: NetworkFacts, lacks: str | None) -> NetworkStats:
        """:param net: index of its gateway link."""
        entry, heads = self.entries.get(net), self._heads(facts.name)
        here, away = self._link(facts.bridge), self._link(facts.vxlan) if facts.vxlan else None
        found = NetworkStats(
            network=facts.name,
            bridge=facts.bridge,
            datapath="bridge",
            lacks=lacks,
            mtu=facts.mtu,
            gateway=facts.addresses,
            gateway_mac=facts.mac,
            uplink=facts.forwards,
            multicast=facts.multicast,
            rules=None,
            listed=None,
            vxlan=facts.vxlan,
            peers=facts.peers,
            ports=self._bridged(heads, net),
            host=_of_link(here, ours=True),
            underlay=_of_link(away) if away else None,
        )
        if entry is None:
            return found
        owners = map(Owner.unpack, self.tables["known"].all_keys())
        return replace(
            found,
            datapath="ebpf",
            lacks=None,
            uplink=bool(entry.flags & Flag.UPLINK),
            multicast="flood" if entry.flags & Flag.FLOOD else "drop",
            rules=entry.rules,
            listed=sum(owner.net == net for owner in owners),
            ports=self._switched(heads),
            host=counted(self.tables["counters_of"].each(index(entry.slot)), self.now),
            underlay=self._underlay(entry.vxlan, away) if away else None,
        )

    def _switched(self, heads: Mapping[int, PortStats]) -> list[PortStats]:
        trunks: dict[bytes, list[int]] = {}
        for member in map(Member.unpack, self.tables["trunks"].all_keys()):
            trunks.setdefault(member.mac, []).append(member.vlan)
        guests = {number: head.guest for number, head in heads.items()}
        return [port(self.tables, number, head, guests, trunks, self.now) for number, head in heads.items()]

    def _bridged(self, heads: Mapping[int, PortStats], net: int) -> list[PortStats]:
        found = {link["index"]: link for link in self.links}
        return [
            replace(head, plugged=found[number].get("master") == net, counted=_of_link(found[number]))
            for number, head in heads.items()
        ]

    def _underlay(self, number: int, link: Any) -> Counted:
        """The program counts what comes in by the VXLAN, the kernel what leaves by it, without Ethernet's header."""
        raw = self.tables["links"].get(index(number))
        slot = Attachment.unpack(raw).slot if raw else 0
        come, gone = counted(self.tables["counters_of"].each(index(slot)), self.now), _of_link(link)
        return replace(come, rx_packets=gone.rx_packets, rx_bytes=gone.rx_bytes + gone.rx_packets * _ETHERNET_BYTES)

    def macs(self, facts: Mapping[int, NetworkFacts]) -> dict[str, str]:
        """MAC → its network, of all that are known."""
        owners = map(Owner.unpack, self.tables["known"].all_keys())
        found = {mac_of(owner.mac): facts[owner.net].name for owner in owners if owner.net in facts}
        for network in facts.values():
            found |= {head.mac: network.name for head in self._heads(network.name).values()}
            found[network.mac] = network.name
        return found


def networks_of(switch: dispatcher.Switch) -> dict[int, NetworkEntry]:
    """The networks that a switch carries, by the index of their gateway link.

    :raise NetworkError: the one that runs is of a version whose tables cannot be read.
    """
    entries = switch.networks()
    if not entries:  # it was given new tables, as those of the one that runs have another layout
        raise NetworkError("the switch that runs here is of another version", hint="orchestrator up")
    return entries


def read(uid: str, names: Mapping[str, str], *, with_pairs: bool = False) -> HostStats:
    """All that this host tells of the networks of the lab ``uid``.

    :param names: MAC → guest, of all guests of the lab.
    :param with_pairs: who sends how much to whom, too.
    :raise NetworkError: the kernel refuses, or the switch that runs is of a version that cannot be read.
    """
    with links.netlink("the switch cannot be read") as ip:
        found = ip.get_links()
        facts = links.observe(ip, uid, found)
        with dispatcher.opened(ip, uid, found) as switch:
            now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            entries = networks_of(switch) if switch else {}
            reader = _Reader(uid, found, switch.maps if switch else {}, entries, now)
            lacks = dispatcher.unavailable() if facts.keys() - entries.keys() else None
            networks = [reader.network(net, each, lacks) for net, each in facts.items()]
            talk = None
            if with_pairs:
                here = {port.mac: port.guest for network in networks for port in network.ports}
                known = {**names, **here, **{each.mac: HOST for each in facts.values()}}
                talk = pairs(reader.tables["pairs"], known, reader.macs(facts), now) if switch else []
    return HostStats(now / 1e9, networks, talk)
