"""The PCI devices of a machine, and which of them can be bus masters: reach the machine's memory by themselves.

Everything is read from sysfs (the kernel's ``Documentation/ABI/testing/sysfs-bus-pci``), and nothing is ever written.
Whether a device *is* a bus master now is bit 2 of its Command register (PCI Local Bus 3.0, 6.2.2). Whether it *could*
be is in no register: one would have to write that bit and see whether it stays. So it is told from what can be read,
see :func:`bus_master`, and left open where that does not tell.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.hosts.sysfs import entries, link_name, number, text, whole

ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
"""``DOMAIN:BUS:DEVICE.FUNCTION`` in hexadecimal, as sysfs names the devices."""

HEADER_SIZE = 64
"""Bytes of configuration space that everybody may read; the rest wants CAP_SYS_ADMIN."""

MSI, MSI_X = 0x05, 0x11  # ids of capabilities

_CONFIG_SIZE = 256  # what follows, on PCI Express, is of no use here
_ID_FILES = ("usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids")  # Debian and Ubuntu; Fedora

_COMMAND = 0x04
_BUS_MASTER = 1 << 2  # in the Command register
_CAPABILITY_LIST = 1 << 4  # in the Status register
_HEADER_TYPE = 0x0E
_CAPABILITY_POINTER = {0: 0x34, 1: 0x34, 2: 0x14}  # by type of header: device, bridge to PCI, bridge to CardBus
_MIN_GNT, _MAX_LAT = 0x3E, 0x3F
_ABSENT = 0xFFFF

_IDE = 0x0101
_IDE_BUS_MASTER = 1 << 7  # in the programming interface

_CLASSES: Mapping[int, tuple[str, Mapping[int, str]]] = {
    0x00: ("Unclassified device", {0x01: "VGA compatible unclassified device"}),
    0x01: (
        "Mass storage controller",
        {
            0x00: "SCSI storage controller",
            0x01: "IDE interface",
            0x04: "RAID bus controller",
            0x06: "SATA controller",
            0x07: "Serial Attached SCSI controller",
            0x08: "Non-Volatile memory controller",
        },
    ),
    0x02: ("Network controller", {0x00: "Ethernet controller", 0x07: "Infiniband controller"}),
    0x03: ("Display controller", {0x00: "VGA compatible controller", 0x02: "3D controller"}),
    0x04: ("Multimedia controller", {0x01: "Multimedia audio controller", 0x03: "Audio device"}),
    0x05: ("Memory controller", {0x00: "RAM memory", 0x02: "CXL memory device"}),
    0x06: (
        "Bridge",
        {0x00: "Host bridge", 0x01: "ISA bridge", 0x04: "PCI bridge", 0x07: "CardBus bridge"},
    ),
    0x07: ("Communication controller", {0x00: "Serial controller"}),
    0x08: ("Generic system peripheral", {0x01: "DMA controller", 0x05: "SD Host controller", 0x06: "IOMMU"}),
    0x09: ("Input device controller", {}),
    0x0A: ("Docking station", {}),
    0x0B: ("Processor", {0x40: "Co-processor"}),
    0x0C: ("Serial bus controller", {0x00: "FireWire (IEEE 1394)", 0x03: "USB controller", 0x05: "SMBus"}),
    0x0D: ("Wireless controller", {}),
    0x0E: ("Intelligent controller", {}),
    0x0F: ("Satellite communications controller", {}),
    0x10: ("Encryption controller", {}),
    0x11: ("Signal processing controller", {}),
    0x12: ("Processing accelerators", {}),
    0x13: ("Non-Essential Instrumentation", {}),
    0x40: ("Coprocessor", {}),
    0xFF: ("Unassigned class", {}),
}


@dataclass(frozen=True)
class BusMaster:
    """Whether a device can reach memory by itself.

    :param capable: True: it can, ``reason`` says how that is known. False: it cannot. None: cannot be told without
        writing to it.
    :param enabled: it may do so now; None: its Command register cannot be read.
    """

    capable: bool | None
    enabled: bool | None
    reason: str


@dataclass(frozen=True)
class PciDevice:
    """One function of a device. What is None could not be read, or the device has none.

    :param vendor: id, four hexadecimal digits; ``device`` likewise.
    :param class_code: base class, subclass and programming interface, six hexadecimal digits.
    :param name: vendor's and device's names, where ``pci.ids`` is installed and knows them.
    """

    address: str
    vendor: str | None
    device: str | None
    class_code: str | None
    class_name: str | None
    name: str | None
    driver: str | None
    iommu_group: int | None
    numa_node: int | None
    bus_master: BusMaster


def devices(root: Path) -> tuple[PciDevice, ...]:
    """Every PCI device, in the order of their addresses.

    :param root: the folder that holds ``sys``, as a rule ``/``.
    """
    found = [folder for folder in entries(root / "sys/bus/pci/devices") if ADDRESS.fullmatch(folder.name)]
    ids = {folder: (_hex(folder / "vendor", 4), _hex(folder / "device", 4)) for folder in found}
    names = _names(root, {(vendor, device) for vendor, device in ids.values() if vendor and device})
    return tuple(_device(folder, *ids[folder], names) for folder in found)


def _device(folder: Path, vendor: str | None, device: str | None, names: Mapping[tuple[str, str], str]) -> PciDevice:
    code = _hex(folder / "class", 6)
    node = number(folder / "numa_node")
    return PciDevice(
        address=folder.name,
        vendor=vendor,
        device=device,
        class_code=code,
        class_name=class_name(code) if code else None,
        name=names.get((vendor, device)) if vendor and device else None,
        driver=link_name(folder / "driver"),
        iommu_group=whole(link_name(folder / "iommu_group") or ""),
        numa_node=node if node is not None and node >= 0 else None,
        bus_master=bus_master(_config(folder), code),
    )


def bus_master(config: bytes, class_code: str | None = None) -> BusMaster:
    """What the first bytes of a configuration space tell about bus mastering.

    A device can be a bus master if it is one now; if it has MSI or MSI-X, which are memory writes that the Command
    register's bit governs (PCI Express 3.0, 7.5.1.1); or if it asks for time on the bus (Min_Gnt, Max_Lat: PCI Local
    Bus 3.0, 6.2.4, always zero on PCI Express). Bridges forward what is asked for behind them. The class of IDE
    controllers says it either way. That a device speaks PCI Express says nothing: it, too, may be a pure target,
    whose bit is hardwired to 0.

    :param config: may be cut off or damaged.
    :param class_code: as in :class:`PciDevice`.
    """
    if len(config) < HEADER_SIZE:
        return BusMaster(None, None, "its configuration space cannot be read")
    command, status = struct.unpack_from("<HH", config, _COMMAND)
    if command == status == _ABSENT:  # what a bus gives for a device that has gone
        return BusMaster(None, None, "it does not answer")
    enabled = bool(command & _BUS_MASTER)
    capable, reason = _evidence(config, enabled, class_code)
    return BusMaster(capable, enabled, reason)


def _evidence(config: bytes, enabled: bool, class_code: str | None) -> tuple[bool | None, str]:
    header = config[_HEADER_TYPE] & 0x7F
    if header in (1, 2):
        return True, "a bridge: it forwards the requests of what is behind it"
    if enabled:
        return True, "it is enabled as one"
    found, complete = capabilities(config)
    if {MSI, MSI_X} & set(found):
        return True, "it has MSI, which is writing to memory"
    if header == 0 and (config[_MIN_GNT] or config[_MAX_LAT]):
        return True, "it asks for time on the bus"
    if class_code and int(class_code[:4], 16) == _IDE:
        able = bool(int(class_code[4:], 16) & _IDE_BUS_MASTER)
        return able, f"its class is that of IDE {'with' if able else 'without'} DMA"
    if not complete:
        return None, "its list of capabilities cannot be read to the end"
    return None, "nothing says so, and it is not enabled as one"


def capabilities(config: bytes) -> tuple[list[int], bool]:
    """The ids of a device's capabilities (PCI Local Bus 3.0, 6.7), and whether the list was read to its end.

    :param config: at least the header; a list that leaves it, or comes back to itself, ends there.
    """
    if not struct.unpack_from("<H", config, _COMMAND + 2)[0] & _CAPABILITY_LIST:
        return [], True
    pointer = _CAPABILITY_POINTER.get(config[_HEADER_TYPE] & 0x7F)
    if pointer is None:
        return [], False
    found: dict[int, int] = {}  # id by place
    place = config[pointer] & ~3  # the two low bits are reserved
    while place:
        if place < HEADER_SIZE or place + 1 >= len(config) or place in found or config[place] == 0xFF:
            return list(found.values()), False
        found[place] = config[place]
        place = config[place + 1] & ~3
    return list(found.values()), True


def class_name(code: str) -> str:
    """A class in words, as ``lspci`` says it.

    :param code: as in :class:`PciDevice`.
    """
    base, subclass = int(code[:2], 16), int(code[2:4], 16)
    name, known = _CLASSES.get(base, (f"Class {code[:4]}", {}))
    return known.get(subclass, name)


def _config(folder: Path) -> bytes:
    """As much of the configuration space as we may read."""
    try:
        with open(folder / "config", "rb") as file:
            return file.read(_CONFIG_SIZE)
    except OSError:
        return b""


def _hex(file: Path, digits: int) -> str | None:
    """The number in a file such as ``0x1af4``, without its prefix."""
    match = re.fullmatch(r"0x([0-9a-f]+)", text(file) or "")
    return match[1] if match and len(match[1]) == digits else None


def _names(root: Path, wanted: Collection[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Vendor and device in words, by their ids, from the first ``pci.ids`` that is installed."""
    listing = next(filter(None, (text(root / file) for file in _ID_FILES)), "") if wanted else ""
    vendors = {vendor for vendor, _ in wanted}
    found: dict[tuple[str, str], str] = {}
    vendor = vendor_name = ""
    for line in listing.splitlines():
        if line.startswith("C "):  # classes follow, and nothing else
            break
        if line[:1] not in ("\t", "#", ""):
            vendor, _, vendor_name = line.partition(" ")
        elif vendor in vendors and line[:1] == "\t" and line[1:2] != "\t":
            device, _, name = line[1:].partition(" ")
            if (vendor, device) in wanted:
                found[vendor, device] = f"{vendor_name.strip()} {name.strip()}"
    return found
