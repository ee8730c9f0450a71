"""A guest as a libvirt domain: the XML that makes it, and what is read back from a domain's XML.

The wish, the resolved guest as it was when the domain was last defined or changed, travels in the domain's
metadata as JSON. What can change while the guest runs (vCPUs, memory, NICs, disks) is read from the live XML.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import json
import uuid
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from orchestrator import names, paths
from orchestrator.errors import GuestError
from orchestrator.spec.resolved import ResolvedDisk, ResolvedGuest, ResolvedNic

NAMESPACE = "urn:orchestrator:guest:1"
_TAG = f"{{{NAMESPACE}}}guest"
ROOT_DISK = "root"
SEED_DISK = "seed"
CONSOLE_LOG = "console.log"
MIGRATING = "migrating"
"""Reason of a guest that is paused because it is just moving to another host, or from one."""
_FOREIGN_NAMESPACES = {"qemu": "http://libvirt.org/schemas/domain/qemu/1.0"}  # what `xml:` may have brought in
_UNITS = {"b": 1, "bytes": 1, "KiB": 1 << 10, "k": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class GuestImage:
    """The image of a guest, as files of the host that runs it."""

    id: str
    kernel: str | None
    initrd: str | None
    disk: str | None
    disk_format: str | None
    cmdline: str
    cloud_init: bool
    ready: str


@dataclass(frozen=True)
class Identity:
    """Which lab a domain belongs to."""

    lab: str
    uid: str
    host: str


@dataclass
class GuestFacts:
    """What is observed of one guest. Sizes are bytes; ``memory_total`` is what is plugged in,
    ``memory`` what the balloon leaves to the guest. ``arriving_from`` names the host that a migration which was not
    brought to its end comes from: the guest is here only if it is no longer there."""

    name: str
    host: str
    state: str
    reason: str
    ready: bool
    wish: dict[str, Any]
    image: str
    accel: str
    vcpus: int
    memory: int
    memory_total: int
    nics: list[str] = field(default_factory=list)
    disks: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)
    since: float | None = None
    snapshots: list[str] = field(default_factory=list)
    arriving_from: str | None = None

    @property
    def is_on(self) -> bool:
        """It has a QEMU that could run it at once, be it paused."""
        return self.state in ("running", "paused")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GuestFacts:
        return cls(**data)


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(paths.templates() / "libvirt"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
    )


def guest_uuid(uid: str, name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{NAMESPACE}:{uid}:{name}"))


def interface_xml(nic: ResolvedNic, identity: Identity) -> str:
    socket = names.vhost_socket(names.runtime_dir(identity.uid, identity.host), nic.tap)
    return _templates().get_template("interface.xml.j2").render(nic=nic, socket=str(socket))


def disk_target(serial: str, bus: str, index: int) -> str:
    """The target name that libvirt wants: ``vda``, ``sdb`` …"""
    letters = ""
    while index >= 0:
        letters = chr(ord("a") + index % 26) + letters
        index = index // 26 - 1
    return ("vd" if bus == "virtio" else "sd") + letters


def disk_xml(
    file: Path | str, serial: str, bus: str, target: str, disk_format: str = "qcow2", device: str = "disk"
) -> str:
    return (
        _templates()
        .get_template("disk.xml.j2")
        .render(file=str(file), serial=serial, bus=bus, target=target, format=disk_format, device=device)
    )


def _disks(guest: ResolvedGuest, image: GuestImage, folder: Path) -> list[str]:
    found = []
    index = {"virtio": 0, "scsi": 0}
    if image.disk:
        found.append(
            disk_xml(folder / file_name(ROOT_DISK), ROOT_DISK, "virtio", disk_target(ROOT_DISK, "virtio", 0))
        )
        index["virtio"] += 1
    for disk in guest.disks:
        target = disk_target(disk.name, disk.bus, index[disk.bus])
        found.append(disk_xml(disk_file(folder, disk), disk.name, disk.bus, target))
        index[disk.bus] += 1
    if image.cloud_init:
        bus = "sata" if guest.machine == "q35" else "ide"
        target = "sdz" if bus == "sata" else "hdd"
        found.append(disk_xml(folder / file_name(SEED_DISK), SEED_DISK, bus, target, "raw", "cdrom"))
    return found


def disk_file(folder: Path, disk: ResolvedDisk) -> Path:
    return folder / file_name(disk.name)


def file_name(serial: str) -> str:
    """The file of the disk with that serial number, in its guest's folder."""
    return {ROOT_DISK: "root.qcow2", SEED_DISK: "seed.iso"}.get(serial, f"disk-{serial}.qcow2")


def render(
    guest: ResolvedGuest,
    image: GuestImage,
    identity: Identity,
    *,
    domain_name: str,
    accel: str,
    emulator: str,
    folder: Path,
    cmdline: str,
) -> str:
    """The domain's XML. Everything that comes from the lab file is escaped, except the escape hatch ``xml``."""
    disks = _disks(guest, image, folder)
    devices = len(guest.nics) + len(disks) + 4  # 4: virtio-serial, balloon, random numbers, SCSI controller
    return (
        _templates()
        .get_template("guest.xml.j2")
        .render(
            namespace=NAMESPACE,
            lab=identity.lab,
            uid=identity.uid,
            guest=guest,
            wish=payload(guest, image.id, guest.ready or image.ready),
            domain_name=domain_name,
            uuid=guest_uuid(identity.uid, guest.name),
            accel=accel,
            emulator=emulator,
            kernel=image.kernel,
            initrd=image.initrd,
            cmdline=cmdline,
            console_log=str(folder / CONSOLE_LOG),
            pcie_ports=devices + guest.hotplug_slots,
            disks=[Markup(disk) for disk in disks],
            interface=lambda nic: Markup(interface_xml(nic, identity)),
        )
    )


def payload(guest: ResolvedGuest, image_id: str, ready: str) -> str:
    """What travels in the metadata: the wish, the image's id, and what tells that the guest is up."""
    return json.dumps({"guest": guest.model_dump(mode="json"), "image": image_id, "ready": ready}, sort_keys=True)


def metadata_xml(guest: ResolvedGuest, image_id: str, ready: str, identity: Identity) -> str:
    """The metadata element on its own, for changing it while the guest runs."""
    element = ET.Element("guest", lab=identity.lab, uid=identity.uid, name=guest.name, host=guest.host)
    element.text = payload(guest, image_id, ready)
    return ET.tostring(element, encoding="unicode")


def relocate(xml: str, *, host: str, emulator: str, folder: Path, image: GuestImage) -> str:
    """The XML of a guest as it is on another host: with that host's name and files, and nothing else changed, because
    the machine that it describes is running.

    :param folder: the guest's folder there.
    :param image: the files of its image there.
    """
    for prefix, namespace in {"orchestrator": NAMESPACE, **_FOREIGN_NAMESPACES}.items():
        ET.register_namespace(prefix, namespace)
    root = ET.fromstring(xml)
    mark = root.find(f"metadata/{_TAG}")
    if mark is None:
        raise GuestError(f"domain {root.findtext('name')} carries no mark of ours")
    data = json.loads(mark.text or "{}")
    data["guest"]["host"] = mark.attrib["host"] = host
    mark.text = json.dumps(data, sort_keys=True)
    for path, file in (("devices/emulator", emulator), ("os/kernel", image.kernel), ("os/initrd", image.initrd)):
        element = root.find(path)
        if element is not None and file is not None:
            element.text = file
    for disk in root.findall("devices/disk"):
        source, serial = disk.find("source"), disk.findtext("serial")
        if source is not None and serial:
            source.set("file", str(folder / file_name(serial)))
        for chain in disk.findall("backingStore"):  # libvirt finds it out again
            disk.remove(chain)
    for log in (*root.findall("devices/serial/log"), *root.findall("devices/console/log")):
        log.set("file", str(folder / CONSOLE_LOG))
    return ET.tostring(root, encoding="unicode")


def _bytes(element: ET.Element | None) -> int:
    if element is None:
        return 0
    return int(element.text or 0) * _UNITS[element.get("unit", "KiB")]


@dataclass(frozen=True)
class DomainView:
    """What a domain's XML says."""

    name: str
    identity: Identity
    wish: dict[str, Any]
    image: str
    ready: str
    accel: str
    vcpus: int
    memory: int
    memory_total: int
    nics: list[str]
    disks: dict[str, str]
    """Serial number → target name."""
    console_path: str | None
    agent_connected: bool


def parse(xml: str) -> DomainView | None:
    """What a domain's XML says, or None where the domain is none of ours.

    :raise GuestError: it carries our mark but cannot be understood.
    """
    root = ET.fromstring(xml)
    mark = root.find(f"metadata/{_TAG}")
    if mark is None:
        return None
    try:
        data = json.loads(mark.text or "")
        wish, image, ready = data["guest"], str(data["image"]), str(data["ready"])
        if not isinstance(wish, dict):
            raise TypeError(f"its wish is {type(wish).__name__}")
        identity = Identity(lab=mark.attrib["lab"], uid=mark.attrib["uid"], host=mark.attrib["host"])
        name = mark.attrib["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise GuestError(f"domain {root.findtext('name')}: its metadata cannot be read: {error!r}") from error
    vcpu = root.find("vcpu")
    channel = root.find("devices/channel/target[@name='org.qemu.guest_agent.0']")
    pty = root.find("devices/serial")
    return DomainView(
        name=name,
        identity=identity,
        wish=wish,
        image=image,
        ready=ready,
        accel="kvm" if root.get("type") == "kvm" else "tcg",
        vcpus=int(vcpu.get("current") or vcpu.text or 1) if vcpu is not None else 1,
        memory=_bytes(root.find("currentMemory")),
        memory_total=_bytes(root.find("memory")),
        nics=[mac.attrib["address"] for mac in root.findall("devices/interface/mac")],
        disks={
            disk.findtext("serial", ""): target.attrib["dev"]
            for disk in root.findall("devices/disk")
            if (target := disk.find("target")) is not None
        },
        console_path=source.get("path") if pty is not None and (source := pty.find("source")) is not None else None,
        agent_connected=channel is not None and channel.get("state") == "connected",
    )
