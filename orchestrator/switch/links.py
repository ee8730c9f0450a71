"""The kernel's links of a network on one host, whatever carries its datagrams: gateway, VXLAN, taps.

The gateway link is the host's own place on the network, with the same addresses and the same MAC everywhere (an
anycast gateway): a guest always talks to the gateway of the host it runs on. It is a Linux bridge, which may have
ports or none.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from orchestrator import names
from orchestrator.errors import NetworkError, TakenError
from orchestrator.spec.resolved import ResolvedNetwork, ResolvedNic
from orchestrator.switch.membership import Membership, NetworkFacts

VXLAN_PORT = 4789
UPLINK = "uplink"  # the link of a local host that leads out of its namespace
FLOOD = "00:00:00:00:00:00"
_NODAD = 0x02


class Plugged(NamedTuple):
    """A network on this host: index of its gateway link, and of each tap, by name."""

    gateway: int
    taps: dict[str, int]


@contextlib.contextmanager
def netlink(what: str) -> Iterator[IPRoute]:
    """:raise NetworkError: the kernel refuses."""
    try:
        with IPRoute() as ip:
            yield ip
    except NetlinkError as error:
        hint = "orchestrator doctor" if error.code in (errno.EOPNOTSUPP, errno.EPERM) else None
        raise NetworkError(f"{what}: {error.args[1] if len(error.args) > 1 else error}", hint=hint) from error


def find(ip: IPRoute, name: str) -> Any:
    """The link of that name, or None."""
    found = ip.link_lookup(ifname=name)
    return ip.link("get", index=found[0])[0] if found else None


def owned(link: Any, mark: str) -> Any:
    """:raise TakenError: the link is somebody else's."""
    if not names.is_link_ours(link.get("ifname"), link.get("ifalias"), mark):
        raise TakenError(
            f"link {link.get('ifname')} is there and is not ours",
            hint=f"choose another name in the lab file, or remove it: ip link del {link.get('ifname')}",
        )
    return link


def ensure_link(ip: IPRoute, mark: str, ifname: str, first: str | None = None, **settings: Any) -> Any:
    """The link ``ifname`` with its mark, made with ``settings`` where there is none.

    :param first: a generated name to make it under, where ``ifname`` is none: it gets its other name with its mark.
    :raise TakenError: the link is somebody else's.
    """
    link = find(ip, ifname) or (find(ip, first) if first else None)
    if link is None:
        ip.link("add", ifname=first or ifname, **settings)
        link = find(ip, first or ifname)
    if owned(link, mark).get("ifalias") != mark:
        other = {} if link.get("ifname") == ifname else {"ifname": ifname}
        ip.link("set", index=link["index"], ifalias=mark, **other)
    return link


def port_mark(uid: str, guest: str, nic: ResolvedNic) -> str:
    return names.mark(uid, "port", f"{guest}/{nic.mac}/{nic.network}")


def ports(uid: str, links: list[Any]) -> Iterator[tuple[Any, str, str]]:
    """The taps of a lab among ``links``: the link, ``GUEST/MAC``, and the network's name."""
    for link in links:
        owner = names.parse_mark(link.get("ifalias"))
        if owner and owner[:2] == (uid, "port") and owner[2].count("/") == 2:
            port, _, network = owner[2].rpartition("/")
            yield link, port, network


def _vxlan_data(link: Any, name: str) -> Any:
    data = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
    return data.get_attr(f"IFLA_VXLAN_{name}") if data else None


def _addresses(ip: IPRoute, index: int) -> list[str]:
    return sorted(
        f"{address.get('address')}/{address['prefixlen']}"
        for address in ip.get_addr(index=index)
        if not str(address.get("address")).startswith("fe80:")
    )


def peers(ip: IPRoute, vxlan: int) -> list[str]:
    """Underlay addresses of the hosts that a VXLAN leads to."""
    return sorted(
        str(entry.get("dst"))
        for entry in ip.get_neighbours(family=7, ifindex=vxlan)
        if entry.get("lladdr") == FLOOD and entry.get("dst")
    )


def observe(ip: IPRoute, uid: str, links: list[Any]) -> dict[int, NetworkFacts]:
    """Every network of the lab ``uid`` on this host, by the index of its gateway link."""
    found: dict[int, NetworkFacts] = {}
    for link in links:
        owner = names.parse_mark(link.get("ifalias"))
        if owner and owner[:2] == (uid, "network"):
            found[link["index"]] = NetworkFacts(
                name=owner[2],
                bridge=link.get("ifname"),
                mtu=link.get("mtu"),
                up=link.get("state") == "up",
                mac=link.get("address"),
                addresses=_addresses(ip, link["index"]),
                forwards=_forwarding(link.get("ifname")).read_text().strip() == "1",
            )
    by_name = {facts.name: facts for facts in found.values()}
    for link in links:
        owner = names.parse_mark(link.get("ifalias"))
        if owner and owner[:2] == (uid, "vxlan") and (facts := by_name.get(owner[2])):
            facts.vxlan = link.get("ifname")
            facts.vni = _vxlan_data(link, "ID")
            facts.peers = peers(ip, link["index"])
    for link, port, network in ports(uid, links):
        if facts := by_name.get(network):
            facts.ports[link.get("ifname")] = port
    return found


def ensure_gateway(ip: IPRoute, uid: str, network: ResolvedNetwork, *, resolves: bool) -> int:
    """Make the gateway link; its index.

    :param resolves: it asks for MACs by ARP and neighbour discovery.
    :raise TakenError: its name is somebody else's.
    """
    _rename(ip, uid, network)
    link = ensure_link(
        ip,
        names.mark(uid, "network", network.name),
        network.bridge,
        names.link("b", uid, network.name),
        kind="bridge",
        br_stp_state=0,
        br_forward_delay=0,
        br_mcast_snooping=0,
        address=network.gateway_mac,
    )
    index = int(link["index"])
    ip.link("set", index=index, mtu=network.mtu, address=network.gateway_mac, arp=resolves, state="up")
    wanted = sorted(cidr for cidr in (network.gateway4, network.gateway6) if cidr)
    have = _addresses(ip, index)
    for cidr in set(have) - set(wanted):
        address, _, length = cidr.partition("/")
        ip.addr("del", index=index, address=address, prefixlen=int(length))
    for cidr in set(wanted) - set(have):
        address, _, length = cidr.partition("/")
        ip.addr("add", index=index, address=address, prefixlen=int(length), flags=_NODAD if ":" in address else 0)
    return index


def _rename(ip: IPRoute, uid: str, network: ResolvedNetwork) -> None:
    for link in ip.get_links():
        owner = names.parse_mark(link.get("ifalias"))
        if owner == (uid, "network", network.name) and link.get("ifname") != network.bridge:
            if taken := find(ip, network.bridge):
                owned(taken, names.mark(uid, "network", network.name))
            ip.link("set", index=link["index"], state="down")
            ip.link("set", index=link["index"], ifname=network.bridge)


def ensure_vxlan(ip: IPRoute, uid: str, wanted: Membership, master: int) -> int:
    """Make the VXLAN to the network's other hosts, or remove it where there are none; its index, or 0.

    :param master: the bridge that it is a port of; 0: none.
    :raise TakenError: its name is somebody else's.
    """
    network = wanted.network
    mark = names.mark(uid, "vxlan", network.name)
    link = find(ip, network.vxlan)
    if link is not None:
        owned(link, mark)
        if not wanted.peers or (_vxlan_data(link, "ID"), _vxlan_data(link, "LOCAL")) != (network.vni, wanted.local):
            ip.link("del", index=link["index"])
    if not wanted.peers:
        return 0
    index = int(
        ensure_link(
            ip,
            mark,
            network.vxlan,
            kind="vxlan",
            vxlan_id=network.vni,
            vxlan_local=wanted.local,
            vxlan_port=VXLAN_PORT,
            vxlan_learning=1,
            vxlan_ageing=0,
        )["index"]
    )
    _keep_silent(network.vxlan)
    ip.link("set", index=index, master=master, mtu=network.mtu, state="up")
    have = set(peers(ip, index))
    for peer in set(wanted.peers) - have:
        ip.fdb("append", ifindex=index, lladdr=FLOOD, dst=peer)
    for peer in have - set(wanted.peers):
        ip.fdb("del", ifindex=index, lladdr=FLOOD, dst=peer)
    return index


def _forwarding(link: str, family: str = "ipv4") -> Path:
    return Path(f"/proc/sys/net/{family}/conf/{link}/forwarding")


def set_forwarding(bridge: str, forward: str) -> None:
    """Routing is switched on link by link, for what comes in there. Linux wants ``all`` beside it for IPv6; that is
    set only where the namespace is ours."""
    wanted = "0" if forward == "no" else "1"
    settings = [_forwarding(bridge), _forwarding(bridge, "ipv6")]
    if forward == "all":
        settings += [_forwarding(UPLINK), _forwarding("all", "ipv6")]
    for setting in settings:
        if setting.exists() and setting.read_text().strip() != wanted:
            setting.write_text(wanted)


def ensure_tap(ip: IPRoute, uid: str, guest: str, nic: ResolvedNic) -> Any:
    """Make the tap of a guest's NIC.

    :raise TakenError: a link of the tap's name is somebody else's.
    """
    link = ensure_link(ip, port_mark(uid, guest, nic), nic.tap, kind="tuntap", mode="tap", ifr={"vnet_hdr": 1})
    _keep_silent(nic.tap)
    if link.get("qdisc") != "noqueue":
        # A tap has a queue of its own, towards QEMU: another one before it only costs.
        ip.tc("replace", "noqueue", link["index"], parent=0xFFFFFFFF)
    return link


def _keep_silent(link: str) -> None:
    """The host itself has no IPv6 address at a link that is none of its own, and sends nothing there."""
    setting = Path(f"/proc/sys/net/ipv6/conf/{link}/disable_ipv6")
    if setting.exists():
        setting.write_text("1")


def remove(uid: str, name: str) -> None:
    """Remove the network with its VXLAN and its taps from this host; does nothing where there is none."""
    with netlink(f"network {name}") as ip:
        links = ip.get_links()
        taps = [link["index"] for link, _, network in ports(uid, links) if network == name]
        marks = (names.mark(uid, kind, name) for kind in ("vxlan", "network"))
        for index in [*taps, *(link["index"] for mark in marks for link in links if link.get("ifalias") == mark)]:
            ip.link("del", index=index)


def remove_port(uid: str, guest: str, tap: str) -> None:
    """Remove a tap; does nothing where there is none.

    :raise TakenError: it is somebody else's.
    """
    with netlink(f"tap of guest {guest}") as ip:
        link = find(ip, tap)
        if link is None:
            return
        owner = names.parse_mark(link.get("ifalias"))
        if owner is None or owner[:2] != (uid, "port"):
            raise TakenError(f"link {tap} is there and is not ours", hint=f"ip link show {tap}")
        ip.link("del", index=link["index"])
