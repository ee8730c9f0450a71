"""Snapshots of whole lab hosts of kind ``vagrant``: memory and disks, kept inside the machine's disk.

They are libvirt's, made as Vagrant's plugin makes them, so ``vagrant snapshot list`` shows them too.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import libvirt

from orchestrator.errors import HostError, NotFoundError, StateError

_PAUSED = "guests paused for it: "


@dataclass(frozen=True)
class MachineSnapshot:
    """A snapshot of one host; ``created`` in seconds since the epoch.

    :param paused: the guests that ran and were paused for it, which have to go on when it is restored.
    """

    host: str
    name: str
    created: int
    state: str
    paused: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_free(host: str, dom: libvirt.virDomain, name: str) -> None:
    """:raise StateError: there is a snapshot of that name already."""
    if name in (old.getName() for old in dom.listAllSnapshots()):
        raise StateError(
            f"host {host} has a snapshot {name} already",
            hint=f"choose another name, or: orchestrator host snapshot delete {name}",
        )


def needs_guests_paused(dom: libvirt.virDomain) -> bool:
    """Whether a snapshot of the machine is of use only if none of its processors is inside a guest.

    So it is where they are emulated: QEMU then saves that a processor is in guest mode, and refuses to load it
    ("guest-mode inconsistent with migrated kernel nested state").
    """
    return bool(dom.isActive()) and ET.fromstring(dom.XMLDesc()).get("type") == "qemu"


def save(host: str, dom: libvirt.virDomain, name: str, paused: Sequence[str] = ()) -> None:
    """Take a snapshot. The machine stands still meanwhile.

    :param paused: guests to remember with it; see :class:`MachineSnapshot`.
    :raise HostError: libvirt refuses.
    """
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "name").text = name
    if paused:
        ET.SubElement(root, "description").text = _PAUSED + " ".join(paused)
    try:
        dom.snapshotCreateXML(ET.tostring(root, encoding="unicode"))
    except libvirt.libvirtError as error:
        raise HostError(f"host {host}: no snapshot could be taken: {error.get_error_message()}") from error


def restore(host: str, dom: libvirt.virDomain, name: str) -> tuple[str, ...]:
    """Put the machine back; it runs afterwards.

    :return: the guests on it that were paused for the snapshot.
    :raise NotFoundError: it has no such snapshot.
    :raise HostError: libvirt refuses.
    """
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING | libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_FORCE
    snapshot = _find(host, dom, name)
    try:
        dom.revertToSnapshot(snapshot, flags)
        return _paused(ET.fromstring(snapshot.getXMLDesc()))
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
        found.append(MachineSnapshot(host, snapshot.getName(), created, root.findtext("state", ""), _paused(root)))
    return sorted(found, key=lambda one: one.created)


def _paused(snapshot: ET.Element) -> tuple[str, ...]:
    description = snapshot.findtext("description", "")
    return tuple(description.removeprefix(_PAUSED).split()) if description.startswith(_PAUSED) else ()


def _find(host: str, dom: libvirt.virDomain, name: str) -> libvirt.virDomainSnapshot:
    for snapshot in dom.listAllSnapshots():
        if snapshot.getName() == name:
            return snapshot
    known = ", ".join(one.name for one in listed(host, dom)) or "none"
    raise NotFoundError(f"host {host} has no snapshot {name}", hint=f"it has: {known}")
