"""The virtual machines that are hosts of labs, as this machine's libvirt knows them.

Vagrant makes them, with our mark as their description; what a Vagrant that was killed leaves is found by it.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import xml.etree.ElementTree as ET

import libvirt

from orchestrator import names
from orchestrator.hosts import libvirtd


def prefix(lab: str) -> str:
    """What the names of a lab's machines, and of their disks, begin with."""
    return f"orc-{lab}-"


def lab_of(name: str, host: str) -> str:
    """The lab to which the machine ``name`` of ``host`` belongs: :func:`prefix` backwards."""
    return name.removeprefix("orc-").removesuffix(f"-{host}")


def mark_of(dom: libvirt.virDomain) -> tuple[str, str, str] | None:
    """Our mark, see :func:`orchestrator.names.parse_mark`; None where it is not ours."""
    root = ET.fromstring(dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    return names.parse_mark(root.findtext("description", "").strip())


def all_marked(conn: libvirt.virConnect) -> list[tuple[libvirt.virDomain, tuple[str, str, str]]]:
    """Every machine that is ours, with its mark."""
    return [(dom, mark) for dom in conn.listAllDomains() if (mark := mark_of(dom))]


def erase(dom: libvirt.virDomain) -> None:
    """End and remove a machine, with its disks and snapshots.

    :raise libvirt.libvirtError: libvirt refuses.
    """
    name = dom.name()
    if dom.isActive():
        dom.destroy()
    dom.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
    erase_disks(name)


def erase_disks(name: str) -> None:
    """Remove the disks of a machine that is not there."""
    libvirtd.remove_volumes(f"{name}.img", f"{name}-vd")
