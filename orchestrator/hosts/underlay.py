"""The underlay between Vagrant hosts, outside of the namespaces of local ones: a network of this machine's libvirt.

It has no address of this machine and leads nowhere else. Where the lab has local hosts too, their underlay is plugged
into it (:mod:`orchestrator.hosts.local`).
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import xml.etree.ElementTree as ET

import libvirt

from orchestrator import names
from orchestrator.errors import HostError, TakenError
from orchestrator.hosts import libvirtd
from orchestrator.spec.resolved import ResolvedLab

NAMESPACE = "urn:orchestrator:underlay:1"
_TAG = f"{{{NAMESPACE}}}underlay"
_NETWORK_XML = f"""\
<network>
  <name/>
  <metadata><orchestrator:underlay xmlns:orchestrator="{NAMESPACE}"/></metadata>
  <bridge stp="off" delay="0"/>
  <mtu/>
</network>
"""


def network_name(lab: ResolvedLab) -> str:
    return f"orc-{lab.lab}"


def lab_of(network: str) -> str:
    """The name of the lab to which a network belongs: :func:`network_name` backwards."""
    return network.removeprefix("orc-")


def bridge_name(lab: ResolvedLab) -> str:
    return names.link("n", lab.uid, "underlay")


def _mark(lab: ResolvedLab) -> str:
    return names.mark(lab.uid, "network", "underlay")


def mark_of(network: libvirt.virNetwork) -> tuple[str, str, str] | None:
    """Our mark, see :func:`orchestrator.names.parse_mark`; None where it is not ours."""
    found = ET.fromstring(network.XMLDesc()).find(f"metadata/{_TAG}")
    return names.parse_mark(found.get("mark")) if found is not None else None


def all_marked(conn: libvirt.virConnect) -> list[tuple[libvirt.virNetwork, tuple[str, str, str]]]:
    """Every underlay, with its mark."""
    return [(network, mark) for network in conn.listAllNetworks() if (mark := mark_of(network))]


def erase(network: libvirt.virNetwork) -> None:
    """:raise libvirt.libvirtError: libvirt refuses."""
    if network.isActive():
        network.destroy()
    network.undefine()


def ensure(lab: ResolvedLab, conn: libvirt.virConnect) -> None:
    """Make the lab's underlay: a network without any address of this machine, which leads nowhere else.

    :raise TakenError: a network of its name is somebody else's.
    :raise HostError: libvirt refuses.
    """
    try:
        with libvirtd.alone():
            network = _network(lab, conn)
            if network is not None and not _has_mtu(network, lab.underlay_mtu) and not _connections(network):
                erase(network)
                network = None
            if network is None:
                root = ET.fromstring(_NETWORK_XML)
                _child(root, "name").text = network_name(lab)
                _child(root, f"metadata/{_TAG}").set("mark", _mark(lab))
                _child(root, "bridge").set("name", bridge_name(lab))
                _child(root, "mtu").set("size", str(lab.underlay_mtu))
                network = conn.networkDefineXML(ET.tostring(root, encoding="unicode"))
                network.setAutostart(True)
            if not network.isActive():
                network.create()
    except libvirt.libvirtError as error:
        raise HostError(
            f"the underlay of lab {lab.lab} cannot be made: {error.get_error_message()}",
            hint=f"virsh -c {libvirtd.URI} net-list --all",
        ) from error


def remove(lab: ResolvedLab, conn: libvirt.virConnect) -> None:
    """Remove the lab's underlay unless a machine is still plugged into it."""
    with libvirtd.alone():
        try:
            network = _network(lab, conn)
            if network is not None and not _connections(network):
                erase(network)
        except libvirt.libvirtError as error:
            raise HostError(f"the underlay of lab {lab.lab} stays: {error.get_error_message()}") from error


def _network(lab: ResolvedLab, conn: libvirt.virConnect) -> libvirt.virNetwork | None:
    try:
        network = conn.networkLookupByName(network_name(lab))
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
            return None
        raise
    if mark_of(network) != names.parse_mark(_mark(lab)):
        raise TakenError(
            f"libvirt's network {network_name(lab)} belongs to somebody else",
            hint=f"rename the lab, or remove it: virsh -c {libvirtd.URI} net-undefine {network_name(lab)}",
        )
    return network


def _connections(network: libvirt.virNetwork) -> int:
    return int(ET.fromstring(network.XMLDesc()).get("connections", "0"))


def _has_mtu(network: libvirt.virNetwork, mtu: int) -> bool:
    found = ET.fromstring(network.XMLDesc()).find("mtu")
    return found is not None and found.get("size") == str(mtu)


def _child(root: ET.Element, name: str) -> ET.Element:
    found = root.find(name)
    assert found is not None
    return found
