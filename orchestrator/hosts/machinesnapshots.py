"""Snapshots of whole lab hosts of kind ``vagrant``: memory and disks, kept inside the machine's disk.

They are libvirt's, made as Vagrant's plugin makes them, so ``vagrant snapshot list`` shows them too.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass
from typing import Any

import libvirt

from orchestrator.errors import HostError, NotFoundError, StateError


@dataclass(frozen=True)
class MachineSnapshot:
    """A snapshot of one host; ``created`` in seconds since the epoch."""

    host: str
    name: str
    created: int
    state: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_free(host: str, dom: libvirt.virDomain, name: str) -> None:
    """:raise StateError: there is a snapshot of that name already."""
    if name in (old.getName() for old in dom.listAllSnapshots()):
        raise StateError(
            f"host {host} has a snapshot {name} already",
            hint=f"choose another name, or: orchestrator host snapshot delete {name}",
        )


def save(host: str, dom: libvirt.virDomain, name: str) -> None:
    """Take a snapshot. The machine stands still meanwhile.

    :raise HostError: libvirt refuses.
    """
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "name").text = name
    try:
        dom.snapshotCreateXML(ET.tostring(root, encoding="unicode"))
    except libvirt.libvirtError as error:
        raise HostError(f"host {host}: no snapshot could be taken: {error.get_error_message()}") from error


def restore(host: str, dom: libvirt.virDomain, name: str) -> None:
    """Put the machine back; it runs afterwards.

    :raise NotFoundError: it has no such snapshot.
    :raise HostError: libvirt refuses.
    """
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING | libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_FORCE
    try:
        dom.revertToSnapshot(_find(host, dom, name), flags)
    except libvirt.libvirtError as error:
        raise HostError(f"host {host}: it could not be put back: {error.get_error_message()}") from error


def delete(host: str, dom: libvirt.virDomain, name: str) -> None:
    """:raise NotFoundError: it has no such snapshot.

    :raise HostError: libvirt refuses.
    """
    try:
        _find(host, dom, name).delete()
    except libvirt.libvirtError as error:
        raise HostError(f"host {host}: snapshot {name} stays: {error.get_error_message()}") from error


def listed(host: str, dom: libvirt.virDomain) -> list[MachineSnapshot]:
    """Every snapshot of the machine, the oldest first."""
    found = []
    for snapshot in dom.listAllSnapshots():
        root = ET.fromstring(snapshot.getXMLDesc())
        created = int(root.findtext("creationTime", "0"))
        found.append(MachineSnapshot(host, snapshot.getName(), created, root.findtext("state", "")))
    return sorted(found, key=lambda one: one.created)


def _find(host: str, dom: libvirt.virDomain, name: str) -> libvirt.virDomainSnapshot:
    for snapshot in dom.listAllSnapshots():
        if snapshot.getName() == name:
            return snapshot
    known = ", ".join(one.name for one in listed(host, dom)) or "none"
    raise NotFoundError(f"host {host} has no snapshot {name}", hint=f"it has: {known}")
