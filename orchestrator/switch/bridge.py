"""The bridge datapath: the gateway link is a Linux bridge, with the taps and the VXLAN as its ports.

It learns, floods and checks nobody's sender. The VXLAN port suppresses neighbour discovery for the gateway's
addresses, so that a host never hears another one answer for them.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from orchestrator.switch import dispatcher, links
from orchestrator.switch.membership import Membership


def ensure(uid: str, wanted: Membership) -> links.Plugged:
    """Make the network on this host as ``wanted``; nothing that is right already is touched.

    :raise TakenError: a link of a name that we need is somebody else's.
    :raise NetworkError: the kernel refuses.
    """
    network = wanted.network
    with links.netlink(f"network {network.name}") as ip:
        dispatcher.leave(ip, uid, network.name, ip.get_links())
        gateway = links.ensure_gateway(ip, uid, network, resolves=True)
        taps = {}
        for link, _, name in links.ports(uid, ip.get_links()):
            wrong = link.get("master") != gateway or link.get("mtu") != network.mtu or link.get("state") != "up"
            if name != network.name:
                continue
            taps[link.get("ifname")] = link["index"]
            if wrong:
                ip.link("set", index=link["index"], master=gateway, mtu=network.mtu, state="up")
        vxlan = links.ensure_vxlan(ip, uid, wanted, master=gateway)
        if vxlan:
            ip.brport("set", index=vxlan, neigh_suppress=1)
    links.set_forwarding(network.bridge, wanted.forward)
    return links.Plugged(gateway, taps)
