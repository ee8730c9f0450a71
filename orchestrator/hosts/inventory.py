"""What a machine is: processors, memory, PCI devices, NICs, and what its kernel offers.

Read from /proc and /sys; what cannot be read is None, so that an odd kernel gives fewer facts and never an error.
Sizes are in bytes. A local host shares all but its NICs with the machine that it is part of.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pyroute2 import IPRoute

from orchestrator.hosts import pci
from orchestrator.hosts.pci import PciDevice
from orchestrator.hosts.sysfs import entries, link_name, number, target, text, whole

FLAGS = (
    "svm", "npt", "avic", "x2avic", "vnmi", "vgif", "nrip_save", "flushbyasid", "decodeassists", "pausefilter",
    "vmx", "ept", "ept_ad", "vpid", "apicv", "posted_intr", "unrestricted_guest", "pml", "flexpriority",
    "x2apic", "tsc_deadline_timer", "constant_tsc", "nonstop_tsc", "rdtscp", "pdpe1gb", "la57",
    "hypervisor", "tdx_guest", "sev", "sev_es", "sev_snp",
)  # fmt: skip
"""The processor's flags that say what guests can have, of /proc/cpuinfo's ``flags`` and ``vmx flags``."""

SYSCTLS = (
    "vm.unprivileged_userfaultfd",
    "vm.overcommit_memory",
    "kernel.io_uring_disabled",
    "kernel.kexec_load_disabled",
    "kernel.modules_disabled",
    "kernel.unprivileged_bpf_disabled",
    "net.bridge.bridge-nf-call-iptables",
    "net.bridge.bridge-nf-call-ip6tables",
    "net.ipv4.ip_forward",
    "net.ipv6.conf.all.forwarding",
)
"""Switches that matter to labs. Some also tell that their feature is there: userfaultfd, io_uring (from Linux 6.6
on), kexec, br_netfilter."""

_LOOPBACK = 1 << 3  # IFF_LOOPBACK
_TAP = 2  # IFLA_TUN_TYPE


@dataclass(frozen=True)
class Cpu:
    """Processors that are online.

    :param threads: what the kernel calls CPUs.
    :param virtualization: what guests can be accelerated by: AMD's SVM or Intel's VMX.
    :param flags: those of :data:`FLAGS` that are there.
    """

    model: str | None
    vendor: str | None
    architecture: str | None
    sockets: int | None
    cores: int | None
    threads: int | None
    virtualization: Literal["svm", "vmx"] | None
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Kvm:
    """KVM as the kernel has it; whether it runs a guest is found out by :mod:`orchestrator.hosts.accel`.

    :param device: the kernel offers /dev/kvm.
    :param modules: ``kvm`` and those that begin with ``kvm_``; builtin ones count.
    :param nested: guests may use KVM themselves.
    :param two_dimensional_paging: guests' page tables are walked by the processor (AMD's NPT, Intel's EPT).
    """

    device: bool | None
    modules: tuple[str, ...]
    nested: bool | None
    two_dimensional_paging: bool | None


@dataclass(frozen=True)
class HugePages:
    """One size of huge pages: how many there are, and how many are not in use."""

    size: int
    total: int | None
    free: int | None


@dataclass(frozen=True)
class Memory:
    """:param transparent_hugepages: ``always``, ``madvise`` or ``never``."""

    total: int | None
    available: int | None
    swap_total: int | None
    swap_free: int | None
    hugepages: tuple[HugePages, ...]
    transparent_hugepages: str | None


@dataclass(frozen=True)
class NumaNode:
    """:param cpus: a list such as ``0-3,8``, as the kernel, ``taskset`` and libvirt write it.
    :param distances: to each node, in the nodes' order; 10 is its own.
    """

    id: int
    cpus: str | None
    memory: int | None
    distances: tuple[int, ...]


@dataclass(frozen=True)
class Nic:
    """A network link.

    :param kind: ``physical`` where it belongs to a device, else what it was made as: ``bridge``, ``tap``, ``veth`` …
    :param mtu: in bytes.
    :param speed: in Mbit/s; None where it is not known, as of links without a cable.
    :param pci: address of the device that it belongs to.
    :param addresses: in CIDR notation.
    """

    name: str
    kind: str
    mac: str | None
    mtu: int | None
    state: str | None
    addresses: tuple[str, ...] = ()
    speed: int | None = None
    driver: str | None = None
    pci: str | None = None


@dataclass(frozen=True)
class Kernel:
    """:param btf: the kernel's type information, which BPF programs are fitted to, is there.
    :param cgroup: ``v2`` alone, ``v1`` alone, or ``hybrid``.
    :param ksm: identical pages of guests are being merged.
    :param iommus: the IOMMUs that are in use, by name; empty where none is.
    :param lockdown: ``none``, ``integrity`` or ``confidentiality``.
    :param sysctls: the value of each of :data:`SYSCTLS`.
    """

    release: str | None
    btf: bool
    cgroup: Literal["v1", "v2", "hybrid"] | None
    ksm: bool | None
    iommus: tuple[str, ...]
    apparmor: bool | None
    selinux: Literal["enforcing", "permissive", "disabled"] | None
    lockdown: str | None
    sysctls: dict[str, int | None]


@dataclass(frozen=True)
class Inventory:
    """:param os: the distribution, such as ``Debian GNU/Linux 12 (bookworm)``."""

    os: str | None
    cpu: Cpu
    kvm: Kvm
    memory: Memory
    numa: tuple[NumaNode, ...]
    pci: tuple[PciDevice, ...]
    nics: tuple[Nic, ...]
    kernel: Kernel

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def take(root: Path = Path("/"), links: Iterable[Nic] | None = None) -> Inventory:
    """Look at everything, which takes some 20 ms.

    :param root: the folder that holds ``proc`` and ``sys``.
    :param links: the NICs without what sysfs adds; default: those of this process's network namespace.
    """
    return Inventory(
        os=_os(root),
        cpu=cpu(root),
        kvm=kvm(root),
        memory=memory(root),
        numa=numa(root),
        pci=pci.devices(root),
        nics=nics(root, _links() if links is None else links),
        kernel=kernel(root),
    )


def cpu(root: Path) -> Cpu:
    facts = _first_processor(root)
    known = {*facts.get("flags", "").split(), *facts.get("vmx flags", "").split()}
    folders = [each for each in entries(root / "sys/devices/system/cpu") if re.fullmatch(r"cpu\d+", each.name)]
    topologies = [folder / "topology" for folder in folders if entries(folder / "topology")]  # only where online
    return Cpu(
        model=facts.get("model name"),
        vendor=facts.get("vendor_id"),
        architecture=text(root / "proc/sys/kernel/arch"),
        sockets=_different(topologies, "package_cpus_list", "core_siblings_list"),
        cores=_different(topologies, "core_cpus_list", "thread_siblings_list"),
        threads=len(topologies) or None,
        virtualization="svm" if "svm" in known else "vmx" if "vmx" in known else None,
        flags=tuple(flag for flag in FLAGS if flag in known),
    )


def _first_processor(root: Path) -> dict[str, str]:
    """The first paragraph of /proc/cpuinfo: the kernel takes a while to write those of hundreds of processors."""
    facts = {}
    try:
        with open(root / "proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, colon, value = line.partition(":")
                if not colon:
                    break
                facts[key.strip()] = value.strip()
    except OSError:
        pass  # then nothing is known
    return facts


def _different(topologies: Iterable[Path], *names: str) -> int | None:
    """How many different sets of CPUs there are in the first of these files that is there; older kernels have the
    second one. Counting sets is right also where numbers of cores repeat from die to die."""
    sets = {next(filter(None, (text(folder / name) for name in names)), None) for folder in topologies}
    return len(sets) if sets and None not in sets else None


def kvm(root: Path) -> Kvm:
    modules = [
        folder for folder in entries(root / "sys/module") if folder.name == "kvm" or folder.name.startswith("kvm_")
    ]

    def parameter(*names: str) -> bool | None:
        files = [folder / "parameters" / name for folder in modules for name in names]
        return next((value for value in map(_yes, files) if value is not None), None)

    misc = text(root / "proc/misc")
    return Kvm(
        device=None if misc is None else "kvm" in misc.split(),
        modules=tuple(folder.name for folder in modules),
        nested=parameter("nested"),
        two_dimensional_paging=parameter("npt", "ept"),
    )


def memory(root: Path = Path("/")) -> Memory:
    facts = _meminfo(text(root / "proc/meminfo"))
    sizes = {}
    for folder in entries(root / "sys/kernel/mm/hugepages"):
        if match := re.fullmatch(r"hugepages-(\d{1,12})kB", folder.name):
            sizes[int(match[1]) << 10] = folder
    return Memory(
        total=facts.get("MemTotal"),
        available=facts.get("MemAvailable"),
        swap_total=facts.get("SwapTotal"),
        swap_free=facts.get("SwapFree"),
        hugepages=tuple(
            HugePages(size, number(folder / "nr_hugepages"), number(folder / "free_hugepages"))
            for size, folder in sorted(sizes.items())
        ),
        transparent_hugepages=_chosen(text(root / "sys/kernel/mm/transparent_hugepage/enabled")),
    )


def _meminfo(lines: str | None) -> dict[str, int]:
    """``[Node 0] MemTotal:  24684092 kB`` → bytes by name."""
    found = re.findall(r"^(?:Node \d+ )?(\w+): +(\d{1,16}) kB$", lines or "", re.MULTILINE)
    return {name: int(size) << 10 for name, size in found}


def numa(root: Path) -> tuple[NumaNode, ...]:
    folders = {}
    for folder in entries(root / "sys/devices/system/node"):
        if match := re.fullmatch(r"node(\d{1,6})", folder.name):
            folders[int(match[1])] = folder
    return tuple(
        NumaNode(
            id=node,
            cpus=text(folder / "cpulist"),
            memory=_meminfo(text(folder / "meminfo")).get("MemTotal"),
            distances=tuple(filter(None, map(whole, (text(folder / "distance") or "").split()))),
        )
        for node, folder in sorted(folders.items())
    )


def nics(root: Path, links: Iterable[Nic]) -> tuple[Nic, ...]:
    """``links`` with what sysfs says of the devices that they belong to."""
    return tuple(_with_device(link, root / "sys/class/net" / link.name) for link in links)


def _with_device(link: Nic, folder: Path) -> Nic:
    device = target(folder / "device")
    if device is None:
        return link
    speed = number(folder / "speed")
    above = [part for part in device.parts if pci.ADDRESS.fullmatch(part)]  # bridges, then what is behind them
    return replace(
        link,
        kind="physical",
        speed=speed if speed is not None and 0 < speed < 0xFFFFFFFF else None,  # SPEED_UNKNOWN, signed or not
        driver=link_name(device / "driver"),
        pci=above[-1] if above else None,
    )


def _links() -> list[Nic]:
    """The links of this network namespace, from the kernel's netlink."""
    with IPRoute() as ip:
        addresses: dict[int, list[str]] = {}
        for each in ip.get_addr():
            address = each.get("local") or each.get("address")  # of two peers, the near one
            addresses.setdefault(each["index"], []).append(f"{address}/{each['prefixlen']}")
        return [
            Nic(
                name=link.get("ifname"),
                kind=_kind(link),
                mac=link.get("address"),
                mtu=link.get("mtu"),
                state=(link.get("operstate") or "").lower() or None,
                addresses=tuple(addresses.get(link["index"], ())),
            )
            for link in ip.get_links()
        ]


def _kind(link: Any) -> str:
    kind = link.get(("linkinfo", "kind"))
    if kind == "tun":
        return "tap" if link.get(("linkinfo", "data", "tun_type")) == _TAP else "tun"
    return str(kind) if kind else "loopback" if link["flags"] & _LOOPBACK else "virtual"


def kernel(root: Path) -> Kernel:
    ksm = number(root / "sys/kernel/mm/ksm/run")
    return Kernel(
        release=text(root / "proc/sys/kernel/osrelease"),
        btf=target(root / "sys/kernel/btf/vmlinux") is not None,
        cgroup=_cgroup(text(root / "proc/self/cgroup")),
        ksm=None if ksm is None else ksm == 1,
        iommus=tuple(entry.name for entry in entries(root / "sys/class/iommu")),
        apparmor=_yes(root / "sys/module/apparmor/parameters/enabled"),
        selinux=_selinux(root),
        lockdown=_chosen(_mounted(root, "kernel/security/lockdown")),
        sysctls={name: number(root / "proc/sys" / name.replace(".", "/")) for name in SYSCTLS},
    )


def _cgroup(lines: str | None) -> Literal["v1", "v2", "hybrid"] | None:
    """By the hierarchies that a process is in (cgroups(7)): that of version 2 has the number 0."""
    if not lines:
        return None
    numbers = {line.partition(":")[0] for line in lines.splitlines()}
    if "0" not in numbers:
        return "v1"
    return "v2" if numbers == {"0"} else "hybrid"


def _selinux(root: Path) -> Literal["enforcing", "permissive", "disabled"] | None:
    """The file system of SELinux is registered only where it was switched on at boot."""
    systems = text(root / "proc/filesystems")
    if systems is not None and "selinuxfs" not in systems.split():
        return "disabled"
    enforcing = _mounted(root, "fs/selinux/enforce")
    return None if enforcing is None else "enforcing" if enforcing == "1" else "permissive"


def _mounted(root: Path, file: str) -> str | None:
    """A file of a file system that is mounted below /sys. ``ip netns exec`` gives local hosts a /sys without those,
    hence look also where process 1 has them."""
    found = text(root / "sys" / file)
    return text(root / "proc/1/root/sys" / file) if found is None else found


def _chosen(words: str | None) -> str | None:
    """``always [madvise] never`` → ``madvise``."""
    match = re.search(r"\[(\w+)\]", words or "")
    return match[1] if match else None


def _yes(file: Path) -> bool | None:
    """A module's parameter, as modules of all ages write it."""
    return {"Y": True, "1": True, "N": False, "0": False}.get(text(file) or "")


def _os(root: Path) -> str | None:
    match = re.search(r"^PRETTY_NAME=[\"']?([^\"'\n]+)", text(root / "etc/os-release") or "", re.MULTILINE)
    return match[1] if match else None
