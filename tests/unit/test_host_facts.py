"""What a machine is, read from trees that are made up: ordinary, odd and hostile ones."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.hosts import inventory, pci, sysfs
from orchestrator.hosts.inventory import HugePages, Nic, NumaNode
from orchestrator.hosts.pci import MSI, MSI_X, BusMaster, bus_master, capabilities, class_name

BUS_MASTER, CAPABILITY_LIST = 1 << 2, 1 << 4
EXPRESS, POWER = 0x10, 0x01  # ids of other capabilities
ETHERNET, IDE, IDE_WITH_DMA = "020000", "01018a", "010180"
DEVICES = "sys/bus/pci/devices"


def plant(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """``root`` with these files; one whose text begins with ``→`` is a link to what follows."""
    for name, contents in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(contents, bytes):
            path.write_bytes(contents)
        elif contents.startswith("→"):
            path.symlink_to(contents[1:])
        else:
            path.write_text(contents)
    return root


def space(
    *, command: int = 0, status: int = 0, header: int = 0, chain: Iterable[int] = (), size: int = 256
) -> bytearray:
    """A configuration space whose capabilities have the ids of ``chain``, 16 bytes each, from 0x40 on."""
    made = bytearray(256)
    chain = list(chain)
    struct.pack_into("<HH", made, 4, command, status | (CAPABILITY_LIST if chain else 0))
    made[0x0E] = header
    if chain:
        made[0x14 if header == 2 else 0x34] = 0x40
    for number, identity in enumerate(chain):
        here = 0x40 + 16 * number
        made[here : here + 2] = bytes([identity, here + 16 if number + 1 < len(chain) else 0])
    return made[:size]


def flat(root: Path, *, sockets: int, cores: int, threads: int) -> None:
    """Processors of a machine, each socket with so many cores of so many threads."""
    for cpu in range(sockets * cores * threads):
        core = cpu // threads * threads
        socket = cpu // (cores * threads) * (cores * threads)
        plant(
            root / f"sys/devices/system/cpu/cpu{cpu}/topology",
            {
                "core_cpus_list": f"{core}-{core + threads - 1}\n",
                "package_cpus_list": f"{socket}-{socket + cores * threads - 1}\n",
            },
        )


# -- processors and KVM ----------------------------------------------------------------------------------------------


def test_cpu_of_amd(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 7\n"
            "flags\t\t: fpu svm npt x2apic avic\n\nprocessor\t: 1\nflags\t\t: vmx\n",
            "proc/sys/kernel/arch": "x86_64\n",
            "sys/devices/system/cpu/cpufreq/x": "",
            "sys/devices/system/cpu/cpu99/online": "0\n",
        },
    )
    flat(tmp_path, sockets=2, cores=4, threads=2)

    cpu = inventory.cpu(tmp_path)

    assert (cpu.model, cpu.vendor, cpu.architecture) == ("AMD EPYC 7", "AuthenticAMD", "x86_64")
    assert (cpu.sockets, cpu.cores, cpu.threads) == (2, 8, 16)
    assert cpu.virtualization == "svm"
    assert cpu.flags == ("svm", "npt", "avic", "x2apic")


def test_cpu_of_intel_has_the_flags_of_vmx_too(tmp_path: Path) -> None:
    plant(tmp_path, {"proc/cpuinfo": "flags : vmx ept\nvmx flags : apicv unrestricted_guest secret\n"})

    cpu = inventory.cpu(tmp_path)

    assert cpu.virtualization == "vmx"
    assert cpu.flags == ("vmx", "ept", "apicv", "unrestricted_guest")


def test_topology_of_older_kernels_is_understood(tmp_path: Path) -> None:
    for cpu in range(4):
        topology = {"thread_siblings_list": str(cpu % 2), "core_siblings_list": "0-3", "core_id": "0"}
        plant(tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology", topology)

    cpu = inventory.cpu(tmp_path)

    assert (cpu.sockets, cpu.cores, cpu.threads) == (1, 2, 4)


@pytest.mark.parametrize(
    ("module", "parameters", "nested", "paging"),
    [
        ("kvm_amd", {"nested": "1\n", "npt": "1\n"}, True, True),
        ("kvm_intel", {"nested": "Y\n", "ept": "N\n"}, True, False),
        ("kvm_intel", {"nested": "N\n"}, False, None),
        ("kvm_pvm", {}, None, None),
        ("kvm_amd", {"nested": "perhaps\n"}, None, None),
    ],
)
def test_kvm_module_tells_its_parameters(
    tmp_path: Path, module: str, parameters: dict[str, str], nested: bool | None, paging: bool | None
) -> None:
    plant(tmp_path / "sys/module", {"kvm/parameters/x": "", f"{module}/refcnt": "0", "kvmgt/refcnt": "0"})
    plant(tmp_path / f"sys/module/{module}/parameters", parameters)
    plant(tmp_path, {"proc/misc": "235 autofs\n232 kvm\n"})

    kvm = inventory.kvm(tmp_path)

    assert kvm.device
    assert kvm.modules == ("kvm", module)
    assert (kvm.nested, kvm.two_dimensional_paging) == (nested, paging)


def test_machine_without_kvm(tmp_path: Path) -> None:
    assert inventory.kvm(plant(tmp_path, {"proc/misc": "235 autofs\n"})).device is False


# -- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_in_bytes_with_every_size_of_huge_pages(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/meminfo": "MemTotal:   2048 kB\nMemAvailable:  1024 kB\nSwapTotal: 8 kB\nHugePages_Total: 7\n",
            "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages": "2\n",
            "sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages": "1\n",
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "many\n",
            "sys/kernel/mm/hugepages/hugepages-0x1kB/nr_hugepages": "1\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        },
    )

    memory = inventory.memory(tmp_path)

    assert (memory.total, memory.available) == (2 << 20, 1 << 20)
    assert (memory.swap_total, memory.swap_free) == (8 << 10, None)
    assert memory.hugepages == (HugePages(2 << 20, None, None), HugePages(1 << 30, 2, 1))
    assert memory.transparent_hugepages == "madvise"


def test_numa_nodes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for node, cpus in ((0, "0-3,8\n"), (2, "\n"), (10, "4-7\n")):
        plant(
            tmp_path / f"sys/devices/system/node/node{node}",
            {"cpulist": cpus, "meminfo": f"Node {node} MemTotal:   4 kB\n", "distance": "10 21 x 32\n"},
        )

    assert inventory.numa(tmp_path) == (
        NumaNode(0, "0-3,8", 4 << 10, (10, 21, 32)),
        NumaNode(2, "", 4 << 10, (10, 21, 32)),
        NumaNode(10, "4-7", 4 << 10, (10, 21, 32)),
    )


# -- bus masters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "class_code", "capable", "enabled", "reason"),
    [
        pytest.param(space(command=BUS_MASTER), ETHERNET, True, True, "enabled", id="enabled"),
        pytest.param(space(command=BUS_MASTER, size=64), ETHERNET, True, True, "enabled", id="enabled, header only"),
        pytest.param(space(chain=[POWER, MSI]), ETHERNET, True, False, "MSI", id="MSI"),
        pytest.param(space(chain=[MSI_X]), ETHERNET, True, False, "MSI", id="MSI-X"),
        pytest.param(space(chain=[POWER, EXPRESS]), ETHERNET, None, False, "nothing", id="PCI Express alone"),
        pytest.param(space(), ETHERNET, None, False, "nothing", id="nothing"),
        pytest.param(space(chain=[MSI], size=64), ETHERNET, None, False, "to the end", id="MSI, header only"),
        pytest.param(space(chain=[POWER, MSI], header=1), "060400", True, False, "bridge", id="bridge"),
        pytest.param(space(header=0x82), "060700", True, False, "bridge", id="CardBus bridge of many functions"),
        pytest.param(space(header=0x7F, chain=[MSI]), None, None, False, "to the end", id="unknown header"),
        pytest.param(space(), IDE, True, False, "with DMA", id="IDE with DMA"),
        pytest.param(space(), "010105", False, False, "without DMA", id="IDE without DMA"),
        pytest.param(space(command=BUS_MASTER), "010105", True, True, "enabled", id="IDE that is enabled"),
        pytest.param(b"\xff" * 256, ETHERNET, None, None, "not answer", id="device that has gone"),
        pytest.param(space(size=63), ETHERNET, None, None, "cannot be read", id="cut off"),
        pytest.param(b"", None, None, None, "cannot be read", id="empty"),
    ],
)
def test_bus_master(
    config: bytes, class_code: str | None, capable: bool | None, enabled: bool | None, reason: str
) -> None:
    found = bus_master(config, class_code)

    assert (found.capable, found.enabled) == (capable, enabled)
    assert reason in found.reason


@pytest.mark.parametrize("place", [0x3E, 0x3F], ids=["Min_Gnt", "Max_Lat"])
def test_device_that_asks_for_time_on_the_bus_is_a_master_but_those_bytes_of_a_bridge_are_others(place: int) -> None:
    device, bridge = space(), space(header=3)
    device[place] = bridge[place] = 8

    assert bus_master(device).capable
    assert bus_master(bridge).capable is None


def test_virtual_function_whose_ids_read_as_ones_is_not_taken_for_absent() -> None:
    config = space(command=BUS_MASTER)
    config[0:4] = b"\xff" * 4

    assert bus_master(config) == BusMaster(True, True, "it is enabled as one")


@pytest.mark.parametrize(
    ("place", "value", "ids"),
    [
        pytest.param(0x51, 0x50, [POWER, EXPRESS], id="to itself"),
        pytest.param(0x51, 0x40, [POWER, EXPRESS], id="to the first"),
        pytest.param(0x51, 0x3C, [POWER, EXPRESS], id="into the header"),
        pytest.param(0x60, 0xFF, [POWER, EXPRESS], id="to what does not answer"),
        pytest.param(0x34, 0x04, [], id="from the start into the header"),
    ],
)
def test_damaged_list_of_capabilities_ends_there(place: int, value: int, ids: list[int]) -> None:
    config = space(chain=[POWER, EXPRESS, MSI])
    config[place] = value

    assert capabilities(config) == (ids, False)
    assert bus_master(config).capable is None


def test_reserved_bits_of_pointers_are_ignored() -> None:
    config = space(chain=[POWER, MSI])
    config[0x34] |= 3
    config[0x41] |= 3

    assert capabilities(config) == ([POWER, MSI], True)


def test_list_of_capabilities_that_is_cut_off_ends_there() -> None:
    assert capabilities(space(chain=[POWER, MSI], size=0x51)) == ([POWER], False)
    assert capabilities(space(chain=[POWER], header=2, size=128)) == ([POWER], True)


@given(st.binary(max_size=300), st.none() | st.integers(0, 0xFFFFFF).map("{:06x}".format))
def test_any_configuration_space_gives_a_verdict(config: bytes, class_code: str | None) -> None:
    found = bus_master(config, class_code)

    assert found.reason
    assert not (found.enabled and not found.capable)
    assert (found.enabled is None) <= (found.capable is None)


@given(
    st.lists(st.tuples(st.integers(0x40, 0xFF), st.binary(min_size=2, max_size=2)), max_size=80),
    st.integers(0, 255),
    st.sampled_from([64, 65, 128, 256]),
)
def test_any_list_of_capabilities_comes_to_an_end(links: list[tuple[int, bytes]], first: int, size: int) -> None:
    config = space(status=CAPABILITY_LIST)
    config[0x34] = first
    for place, entry in links:
        config[place : min(place + 2, 256)] = entry[: 256 - place]

    found, complete = capabilities(config[:size])

    assert len(found) <= 48
    assert complete or bus_master(config[:size]).reason


# -- PCI devices -----------------------------------------------------------------------------------------------------


def test_pci_device_with_all_its_facts(tmp_path: Path) -> None:
    plant(
        tmp_path / DEVICES / "10000:e1:00.0",
        {
            "vendor": "0x8086\n",
            "device": "0x0a54\n",
            "class": "0x010802\n",
            "config": bytes(space(command=BUS_MASTER)),
            "numa_node": "1\n",
            "driver": "→../../../../bus/pci/drivers/nvme",
            "iommu_group": "→../../../../kernel/iommu_groups/17",
        },
    )
    plant(
        tmp_path,
        {
            "usr/share/misc/pci.ids": "# of vendors\n8085  Other\n\t0a54  wrong\n8086  Intel\n\t0a53  near\n"
            "\t0a54  P4510\n\t\t8086 0a54  card\nC 01  storage\n\t08  NVM\n8086  false\n\t0a54  false\n"
        },
    )

    assert pci.devices(tmp_path) == (
        pci.PciDevice(
            address="10000:e1:00.0",
            vendor="8086",
            device="0a54",
            class_code="010802",
            class_name="Non-Volatile memory controller",
            name="Intel P4510",
            driver="nvme",
            iommu_group=17,
            numa_node=1,
            bus_master=BusMaster(True, True, "it is enabled as one"),
        ),
    )


def test_pci_device_without_anything(tmp_path: Path) -> None:
    plant(tmp_path / DEVICES, {"0000:00:1f.7/vendor": "0x80861\n", "0000:00:1f.7/class": "none\n"})
    plant(tmp_path / DEVICES / "0000:00:1f.7", {"numa_node": "-1\n", "iommu_group": "→groups/x", "config/folder": ""})

    (device,) = pci.devices(tmp_path)

    assert (device.vendor, device.class_code, device.class_name, device.name) == (None, None, None, None)
    assert (device.driver, device.iommu_group, device.numa_node) == (None, None, None)
    assert device.bus_master == BusMaster(None, None, "its configuration space cannot be read")


def test_pci_devices_are_sorted_and_what_is_no_address_is_left_out(tmp_path: Path) -> None:
    for name in ("0000:00:02.0", "0000:00:01.0", "0000:00:01.8", "0000:00:01.0 ", "..00", "0000:00:0g.0"):
        (tmp_path / DEVICES / name).mkdir(parents=True)

    assert [device.address for device in pci.devices(tmp_path)] == ["0000:00:01.0", "0000:00:02.0"]


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("020000", "Ethernet controller"),
        ("02ff00", "Network controller"),
        ("060400", "PCI bridge"),
        ("ff0000", "Unassigned class"),
        ("770100", "Class 7701"),
    ],
)
def test_class_in_words(code: str, name: str) -> None:
    assert class_name(code) == name


# -- NICs ------------------------------------------------------------------------------------------------------------


def nic(name: str, kind: str = "virtual") -> Nic:
    return Nic(name, kind, "02:00:00:00:00:01", 1500, "up", ("10.0.0.1/24",))


def test_nic_of_virtio_is_found_below_its_bridge(tmp_path: Path) -> None:
    real = "devices/pci0000:00/0000:00:02.0/0000:01:00.0"
    plant(
        tmp_path / "sys",
        {
            f"{real}/virtio3/net/eth0/speed": "10000\n",
            f"{real}/virtio3/net/eth0/device": "→../../../virtio3",
            f"{real}/virtio3/driver": "→../../../../../bus/virtio/drivers/virtio_net",
            "class/net/eth0": f"→../../{real}/virtio3/net/eth0",
        },
    )

    (found,) = inventory.nics(tmp_path, [nic("eth0")])

    assert (found.kind, found.speed, found.driver, found.pci) == ("physical", 10000, "virtio_net", "0000:01:00.0")
    assert (found.name, found.mtu, found.addresses) == ("eth0", 1500, ("10.0.0.1/24",))


@pytest.mark.parametrize("speed", ["-1\n", "4294967295\n", "0\n", "fast\n", ""])
def test_speed_that_is_not_known(tmp_path: Path, speed: str) -> None:
    plant(tmp_path / "sys", {"class/net/eth0/speed": speed, "class/net/eth0/device": "→.", "devices/usb1/x": ""})

    (found,) = inventory.nics(tmp_path, [nic("eth0")])

    assert (found.kind, found.speed, found.pci, found.driver) == ("physical", None, None, None)


def test_link_without_a_device_stays_what_the_kernel_calls_it(tmp_path: Path) -> None:
    plant(tmp_path / "sys/class/net", {"tap0/speed": "10\n", "gone/device": "→nowhere", "loop/device": "→device"})
    links = [nic("tap0", "tap"), nic("gone", "veth"), nic("loop", "dummy"), nic("other", "bridge")]

    assert inventory.nics(tmp_path, links) == tuple(links)


def test_links_of_this_machine_have_a_loopback() -> None:
    (loopback,) = [link for link in inventory.take(Path("/nowhere")).nics if link.name == "lo"]

    assert loopback.kind == "loopback"
    assert loopback.mtu


# -- the kernel ------------------------------------------------------------------------------------------------------


def test_kernel_of_a_usual_machine(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/sys/kernel/osrelease": "6.8.0-31-generic\n",
            "proc/sys/vm/unprivileged_userfaultfd": "0\n",
            "proc/sys/net/bridge/bridge-nf-call-iptables": "1\n",
            "proc/self/cgroup": "0::/user.slice/session-1.scope\n",
            "proc/filesystems": "nodev\tsysfs\n\text4\n",
            "sys/kernel/btf/vmlinux": b"\x9f\xeb",
            "sys/kernel/mm/ksm/run": "1\n",
            "sys/class/iommu/dmar0": "",
            "sys/module/apparmor/parameters/enabled": "Y\n",
            "sys/kernel/security/lockdown": "none [integrity] confidentiality\n",
        },
    )

    kernel = inventory.kernel(tmp_path)

    assert kernel.release == "6.8.0-31-generic"
    assert (kernel.btf, kernel.ksm, kernel.cgroup, kernel.iommus) == (True, True, "v2", ("dmar0",))
    assert (kernel.apparmor, kernel.selinux, kernel.lockdown) == (True, "disabled", "integrity")
    assert set(kernel.sysctls) == set(inventory.SYSCTLS)
    assert {name: value for name, value in kernel.sysctls.items() if value is not None} == {
        "vm.unprivileged_userfaultfd": 0,
        "net.bridge.bridge-nf-call-iptables": 1,
    }


@pytest.mark.parametrize(
    ("lines", "version"),
    [("0::/\n", "v2"), ("3:cpu:/\n0::/\n", "hybrid"), ("3:cpu:/\n1:name=systemd:/\n", "v1"), ("", None)],
)
def test_version_of_cgroups(tmp_path: Path, lines: str, version: str | None) -> None:
    assert inventory.kernel(plant(tmp_path, {"proc/self/cgroup": lines})).cgroup == version


@pytest.mark.parametrize(("enforce", "mode"), [("1", "enforcing"), ("0", "permissive"), (None, None)])
def test_selinux_is_seen_by_way_of_process_1_where_sys_has_no_mounts(
    tmp_path: Path, enforce: str | None, mode: str | None
) -> None:
    plant(tmp_path, {"proc/filesystems": "nodev\tselinuxfs\n"})
    if enforce:
        plant(tmp_path, {"proc/1/root/sys/fs/selinux/enforce": enforce})

    assert inventory.kernel(tmp_path).selinux == mode


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n', "Debian GNU/Linux 13 (trixie)"),
        ("NAME=x\nPRETTY_NAME=Alpine\n", "Alpine"),
        ('PRETTY_NAME=""\n', None),
        ("NAME=x\n", None),
    ],
)
def test_name_of_the_distribution(tmp_path: Path, line: str, name: str | None) -> None:
    assert inventory.take(plant(tmp_path, {"etc/os-release": line}), []).os == name


# -- the whole -------------------------------------------------------------------------------------------------------

FILES = (
    "proc/cpuinfo", "proc/meminfo", "proc/misc", "proc/filesystems", "proc/self/cgroup", "proc/sys/kernel/osrelease",
    "proc/sys/kernel/io_uring_disabled", "etc/os-release", "usr/share/misc/pci.ids", "sys/kernel/mm/ksm/run",
    "sys/kernel/security/lockdown", "sys/kernel/mm/transparent_hugepage/enabled", "sys/module/kvm/parameters/nested",
    "sys/kernel/mm/hugepages/hugepages-4kB/nr_hugepages", "sys/devices/system/cpu/cpu0/topology/core_cpus_list",
    "sys/devices/system/node/node0/cpulist", "sys/devices/system/node/node0/distance", "sys/class/net/eth0/speed",
    "sys/devices/system/node/node0/meminfo", f"{DEVICES}/0000:00:00.0/vendor", f"{DEVICES}/0000:00:00.0/class",
    f"{DEVICES}/0000:00:00.0/config", f"{DEVICES}/0000:00:00.0/numa_node",
)  # fmt: skip
WORDS = ["0", "-1", "9" * 5000, "0x1af4", "0x020000", "Y", "[x]", "flags: svm", "MemTotal: 1 kB", "٣", "\0", "a  b"]


def test_tree_that_is_empty_gives_nothing_and_no_error(tmp_path: Path) -> None:
    found = inventory.take(tmp_path, []).to_json()

    assert json.loads(json.dumps(found))["pci"] == []
    assert (found["cpu"]["threads"], found["memory"]["total"], found["kvm"]["device"]) == (None, None, None)
    assert found["kernel"]["selinux"] is None


def test_folders_in_place_of_files_give_no_error(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).mkdir(parents=True)

    assert inventory.take(tmp_path, [nic("eth0")]).memory.total is None


@given(st.dictionaries(st.sampled_from(FILES), st.binary(max_size=300) | st.sampled_from(WORDS)))
def test_whatever_the_files_say_gives_json_and_no_error(files: dict[str, str | bytes]) -> None:
    with tempfile.TemporaryDirectory() as root:
        contents = {name: text if isinstance(text, bytes) else text.encode() for name, text in files.items()}
        found = inventory.take(plant(Path(root), contents), [nic("eth0")])

    assert json.loads(json.dumps(found.to_json()))


def test_this_machine_has_processors_and_memory() -> None:
    found = inventory.take()

    assert found.cpu.threads
    assert found.memory.total
    assert found.kernel.release
    assert json.dumps(found.to_json())


@pytest.mark.parametrize(
    ("word", "value"),
    [("7", 7), ("-1", -1), (str(2**64 - 1), 2**64 - 1), (str(2**64), None), ("1.5", None), ("", None), ("0x1", None)],
)
def test_whole_number(word: str, value: int | None) -> None:
    assert sysfs.whole(word) == value
