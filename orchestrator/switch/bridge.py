"""The bridge datapath: one Linux bridge per network and host, a tap per NIC, VXLAN between the hosts.

On each host the bridge is the network's gateway, with the same addresses and the same MAC everywhere (an anycast
gateway): a guest always talks to the gateway of the host it runs on. The VXLAN port suppresses neighbour discovery
for those addresses, so that a host never hears another one answer for them.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@contextlib.contextmanager
def _netlink(what: str) -> Iterator[IPRoute]:
    """:raise NetworkError: the kernel refuses."""
    try:
        with IPRoute() as ip:
            yield ip
    except NetlinkError as error:
        hint = "orchestrator doctor" if error.code in (errno.EOPNOTSUPP, errno.EPERM) else None
        raise NetworkError(f"{what}: {error.args[1] if len(error.args) > 1 else error}", hint=hint) from error


def _link(ip: IPRoute, name: str) -> Any:
    """The link of that name, or None."""
    found = ip.link_lookup(ifname=name)
    return ip.link("get", index=found[0])[0] if found else None


def _owned(link: Any, mark: str) -> Any:
    """:raise TakenError: the link is somebody else's."""
    if not names.is_link_ours(link.get("ifname"), link.get("ifalias"), mark):
        raise TakenError(
            f"link {link.get('ifname')} is there and is not ours",
            hint=f"choose another name in the lab file, or remove it: ip link del {link.get('ifname')}",
        )
    return link


def _ensure_link(ip: IPRoute, mark: str, ifname: str, first: str | None = None, **settings: Any) -> Any:
    """The link ``ifname`` with its mark, made with ``settings`` where there is none.

    :param first: a generated name to make it under, where ``ifname`` is none: it gets its other name with its mark.
    :raise TakenError: the link is somebody else's.
    """
    link = _link(ip, ifname) or (_link(ip, first) if first else None)
    if link is None:
        ip.link("add", ifname=first or ifname, **settings)
        link = _link(ip, first or ifname)
    if _owned(link, mark).get("ifalias") != mark:
        other = {} if link.get("ifname") == ifname else {"ifname": ifname}
        ip.link("set", index=link["index"], ifalias=mark, **other)
    return link


def _vxlan_data(link: Any, name: str) -> Any:
    data = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
    return data.get_attr(f"IFLA_VXLAN_{name}") if data else None


def _addresses(ip: IPRoute, index: int) -> list[str]:
    return sorted(
        f"{address.get('address')}/{address['prefixlen']}"
        for address in ip.get_addr(index=index)
        if not str(address.get("address")).startswith("fe80:")
    )


def _flood_peers(ip: IPRoute, index: int) -> list[str]:
    return sorted(
        str(entry.get("dst"))
        for entry in ip.get_neighbours(family=7, ifindex=index)
        if entry.get("lladdr") == FLOOD and entry.get("dst")
    )


def observe(uid: str) -> list[NetworkFacts]:
    """Every network of the lab ``uid`` on this host."""
    with _netlink("the networks cannot be listed") as ip:
        links = ip.get_links()
        found: dict[int, NetworkFacts] = {}
        for link in links:
            owner = names.parse_mark(link.get("ifalias"))
            if owner and owner[0] == uid and owner[1] == "network":
                found[link["index"]] = NetworkFacts(
                    name=owner[2],
                    bridge=link.get("ifname"),
                    mtu=link.get("mtu"),
                    up=link.get("state") == "up",
                    mac=link.get("address"),
                    addresses=_addresses(ip, link["index"]),
                    forwards=_forwarding(link.get("ifname")).read_text().strip() == "1",
                )
        for link in links:
            owner = names.parse_mark(link.get("ifalias"))
            facts = found.get(link.get("master"))
            if not owner or owner[0] != uid or facts is None:
                continue
            if owner[1] == "vxlan":
                facts.vxlan = link.get("ifname")
                facts.vni = _vxlan_data(link, "ID")
                facts.peers = _flood_peers(ip, link["index"])
            elif owner[1] == "port":
                facts.ports[link.get("ifname")] = owner[2]
    return list(found.values())


def ensure(uid: str, wanted: Membership) -> None:
    """Make the network on this host as ``wanted``; nothing that is right already is touched.

    :raise TakenError: a link of a name that we need is somebody else's.
    :raise NetworkError: the kernel refuses.
    """
    network = wanted.network
    with _netlink(f"network {network.name}") as ip:
        _rename(ip, uid, network)
        bridge = _ensure_bridge(ip, uid, network)
        for link in ip.get_links():
            owner = names.parse_mark(link.get("ifalias"))
            is_port = link.get("master") == bridge and owner is not None and owner[:2] == (uid, "port")
            if is_port and link.get("mtu") != network.mtu:
                ip.link("set", index=link["index"], mtu=network.mtu)
        if wanted.peers:
            _ensure_vxlan(ip, uid, wanted, bridge)
        elif vxlan := _link(ip, network.vxlan):
            _owned(vxlan, names.mark(uid, "vxlan", network.name))
            ip.link("del", index=vxlan["index"])
    _set_forwarding(network.bridge, wanted.forward)


def _rename(ip: IPRoute, uid: str, network: ResolvedNetwork) -> None:
    for link in ip.get_links():
        owner = names.parse_mark(link.get("ifalias"))
        if owner == (uid, "network", network.name) and link.get("ifname") != network.bridge:
            if taken := _link(ip, network.bridge):
                _owned(taken, names.mark(uid, "network", network.name))
            ip.link("set", index=link["index"], state="down")
            ip.link("set", index=link["index"], ifname=network.bridge)


def _ensure_bridge(ip: IPRoute, uid: str, network: ResolvedNetwork) -> int:
    link = _ensure_link(
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
    ip.link("set", index=index, mtu=network.mtu, address=network.gateway_mac, state="up")
    wanted = sorted(cidr for cidr in (network.gateway4, network.gateway6) if cidr)
    have = _addresses(ip, index)
    for cidr in set(have) - set(wanted):
        address, _, length = cidr.partition("/")
        ip.addr("del", index=index, address=address, prefixlen=int(length))
    for cidr in set(wanted) - set(have):
        address, _, length = cidr.partition("/")
        ip.addr("add", index=index, address=address, prefixlen=int(length), flags=_NODAD if ":" in address else 0)
    return index


def _ensure_vxlan(ip: IPRoute, uid: str, wanted: Membership, bridge: int) -> None:
    network = wanted.network
    link = _link(ip, network.vxlan)
    if link is not None:
        _owned(link, names.mark(uid, "vxlan", network.name))
        if (_vxlan_data(link, "ID"), _vxlan_data(link, "LOCAL")) != (network.vni, wanted.local):
            ip.link("del", index=link["index"])
    index = _ensure_link(
        ip,
        names.mark(uid, "vxlan", network.name),
        network.vxlan,
        kind="vxlan",
        vxlan_id=network.vni,
        vxlan_local=wanted.local,
        vxlan_port=VXLAN_PORT,
        vxlan_learning=1,
    )["index"]
    ip.link("set", index=index, master=bridge, mtu=network.mtu, state="up")
    ip.brport("set", index=index, neigh_suppress=1)
    have = set(_flood_peers(ip, index))
    for peer in set(wanted.peers) - have:
        ip.fdb("append", ifindex=index, lladdr=FLOOD, dst=peer)
    for peer in have - set(wanted.peers):
        ip.fdb("del", ifindex=index, lladdr=FLOOD, dst=peer)


def _forwarding(link: str, family: str = "ipv4") -> Path:
    return Path(f"/proc/sys/net/{family}/conf/{link}/forwarding")


def _set_forwarding(bridge: str, forward: str) -> None:
    """Routing is switched on link by link, for what comes in there. Linux wants ``all`` beside it for IPv6; that is
    set only where the namespace is ours."""
    wanted = "0" if forward == "no" else "1"
    settings = [_forwarding(bridge), _forwarding(bridge, "ipv6")]
    if forward == "all":
        settings += [_forwarding(UPLINK), _forwarding("all", "ipv6")]
    for setting in settings:
        if setting.exists() and setting.read_text().strip() != wanted:
            setting.write_text(wanted)


def remove(uid: str, name: str) -> None:
    """Remove the network with its VXLAN and its taps from this host; does nothing where there is none."""
    with _netlink(f"network {name}") as ip:
        links = ip.get_links()
        bridges = {link["index"] for link in links if names.parse_mark(link.get("ifalias")) == (uid, "network", name)}
        for link in links:
            owner = names.parse_mark(link.get("ifalias"))
            ours = owner is not None and owner[0] == uid
            member = link.get("master") in bridges and owner is not None and owner[1] == "port"
            if ours and (member or owner == (uid, "vxlan", name)):
                ip.link("del", index=link["index"])
        for index in bridges:
            ip.link("del", index=index)


def ensure_port(uid: str, guest: str, nic: ResolvedNic, bridge: str) -> None:
    """Make the tap of a guest's NIC and put it on the network's bridge.

    :raise TakenError: a link of the tap's name is somebody else's.
    """
    mark = names.mark(uid, "port", f"{guest}/{nic.mac}")
    with _netlink(f"tap of guest {guest}") as ip:
        bridge_index = ip.link_lookup(ifname=bridge)
        if not bridge_index:
            raise NetworkError(f"guest {guest}: bridge {bridge} is not there", hint="orchestrator up")
        link = _ensure_link(ip, mark, nic.tap, kind="tuntap", mode="tap", ifr={"vnet_hdr": 1})
        if link.get("master") != bridge_index[0] or link.get("mtu") != nic.mtu or link.get("state") != "up":
            ip.link("set", index=link["index"], master=bridge_index[0], mtu=nic.mtu, state="up")


def remove_port(uid: str, guest: str, tap: str) -> None:
    """Remove a tap; does nothing where there is none.

    :raise TakenError: it is somebody else's.
    """
    with _netlink(f"tap of guest {guest}") as ip:
        link = _link(ip, tap)
        if link is None:
            return
        owner = names.parse_mark(link.get("ifalias"))
        if owner is None or owner[:2] != (uid, "port"):
            raise TakenError(f"link {tap} is there and is not ours", hint=f"ip link show {tap}")
        ip.link("del", index=link["index"])
