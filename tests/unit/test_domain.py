"""Guests as libvirt domains: the XML that makes them, and what is read back."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import libvirt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.errors import GuestError
from orchestrator.guests import domain
from orchestrator.guests.domain import GuestFacts, GuestImage, Identity, metadata_xml, parse, render
from orchestrator.spec.resolved import ResolvedGuest
from tests.unit.labs import ann, guest_image, lab_files, resolved

IDENTITY = Identity(lab="one", uid="0123abcd", host="alpha")
FOLDER = Path("/state/guests/ann")
DATA = Path(__file__).parent / "data" / "domain"

# What XML 1.0 can carry; a carriage return would come back as a new line.
LEGAL = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters="\t\n", exclude_characters="\ufffe\uffff"),
    max_size=40,
)
NASTY = "a<b>&\"c'd&amp;]]><!-- --><?x?>\n{{ 7 * 7 }}{% raw %}${HOME}\N{SNOWMAN}"


def xml_of(
    guest: ResolvedGuest,
    image: GuestImage | None = None,
    *,
    accel: str = "tcg",
    cmdline: str = "",
    domain_name: str = "ann",
    emulator: str = "/usr/bin/qemu",
    folder: Path = FOLDER,
) -> str:
    return render(
        guest,
        image or guest_image(),
        IDENTITY,
        domain_name=domain_name,
        accel=accel,
        emulator=emulator,
        folder=folder,
        cmdline=cmdline,
    )


def tree(*args: Any, **settings: Any) -> ET.Element:
    return ET.fromstring(xml_of(*args, **settings))


# -- there and back --------------------------------------------------------------------------------------------------


@given(lab_files(), st.sampled_from(["kvm", "tcg"]), st.sampled_from(["agent", "none", "console:ready.*"]))
def test_what_is_rendered_is_read_back(data: dict[str, Any], accel: str, ready: str) -> None:
    made = resolved(data)
    image = guest_image(ready=ready)
    for guest in made.guests.values():
        identity = Identity(lab=made.lab, uid=made.uid, host=guest.host)

        view = parse(
            render(
                guest,
                image,
                identity,
                domain_name=f"made.{guest.name}",
                accel=accel,
                emulator="/usr/bin/qemu",
                folder=FOLDER,
                cmdline=guest.cmdline,
            )
        )

        assert view is not None
        assert (view.name, view.identity, view.image, view.ready) == (guest.name, identity, image.id, ready)
        assert ResolvedGuest.model_validate(view.wish) == guest
        assert (view.accel, view.vcpus, view.memory_total) == (accel, guest.vcpus, guest.memory)
        assert view.nics == [nic.mac for nic in guest.nics]
        assert list(view.disks) == [disk.name for disk in guest.disks]
        assert len(set(view.disks.values())) == len(view.disks)


@given(LEGAL, LEGAL, LEGAL)
@example(NASTY, NASTY, NASTY)
def test_hostile_text_stays_text(cmdline: str, description: str, user_data: str) -> None:
    guest = ann(cmdline=cmdline, description=description, user_data=user_data)

    made = xml_of(guest, cmdline=cmdline, emulator=f"/opt/{cmdline}", domain_name=f"ann{description}")

    root = ET.fromstring(made)
    view = parse(made)
    assert (root.findtext("os/cmdline") or "") == cmdline
    assert root.findtext("devices/emulator") == f"/opt/{cmdline}"
    assert root.findtext("name") == f"ann{description}"
    assert view is not None
    assert ResolvedGuest.model_validate(view.wish) == guest


def test_hostile_paths_stay_text() -> None:
    image = guest_image(id=NASTY, kernel=f"/image/{NASTY}", initrd=f"/initrd/{NASTY}", disk="/disk", ready=NASTY)

    made = xml_of(ann(disks=[{"name": "data", "size": "1G"}]), image, folder=Path(f"/state/{NASTY}"))

    root, view = ET.fromstring(made), parse(made)
    assert (root.findtext("os/kernel"), root.findtext("os/initrd")) == (image.kernel, image.initrd)
    files = [source.attrib["file"] for source in root.findall("devices/disk/source")]
    attribute = NASTY.replace("\n", " ")  # as XML reads attributes
    assert files == [f"/state/{attribute}/root.qcow2", f"/state/{attribute}/disk-data.qcow2"]
    assert view is not None
    assert (view.image, view.ready) == (NASTY, NASTY)


# -- what it is made of ----------------------------------------------------------------------------------------------


def test_memory_without_room_to_grow_has_no_slots() -> None:
    root = tree(ann(memory="256M"))

    assert root.findtext("memory") == str(256 << 20)
    assert root.find("maxMemory") is None
    assert root.find("cpu/numa") is None


def test_memory_with_room_to_grow_has_slots_and_a_node() -> None:
    root = tree(ann(memory={"size": "256M", "max": "1G"}, vcpus={"count": 1, "max": 3}))

    (maximum, cell) = root.find("maxMemory"), root.find("cpu/numa/cell")
    assert maximum is not None
    assert (maximum.text, maximum.get("unit"), maximum.get("slots")) == (str(1 << 30), "b", "16")
    assert cell is not None
    assert (cell.get("cpus"), cell.get("memory"), cell.get("unit")) == ("0-2", str(256 << 10), "KiB")
    assert cell.get("memAccess") == "shared"


def test_memory_is_a_shared_memfd() -> None:
    root = tree(ann())

    backing = {child.tag: child.attrib for child in root.findall("memoryBacking/*")}
    assert backing == {"source": {"type": "memfd"}, "access": {"mode": "shared"}}


def test_vcpus_up_to_the_count_are_enabled_and_the_first_stays() -> None:
    root = tree(ann(vcpus={"count": 2, "max": 3}))

    vcpu = root.find("vcpu")
    assert vcpu is not None
    assert (vcpu.text, vcpu.get("current")) == ("3", "2")
    assert [(each.get("enabled"), each.get("hotpluggable")) for each in root.findall("vcpus/vcpu")] == [
        ("yes", "no"),
        ("yes", "yes"),
        ("no", "yes"),
    ]


@pytest.mark.parametrize(
    ("cpu", "accel", "mode", "model", "without"),
    [
        (None, "kvm", "host-passthrough", None, []),
        (None, "tcg", "maximum", None, ["erms", "fsrm"]),
        ("host-model", "kvm", "host-model", None, []),
        ("maximum", "kvm", "maximum", None, []),
        ("maximum", "tcg", "maximum", None, []),
        ("EPYC-v3", "kvm", "custom", "EPYC-v3", []),
    ],
)
def test_cpu_follows_the_wish_then_the_accelerator(
    cpu: str | None, accel: str, mode: str, model: str | None, without: list[str]
) -> None:
    root = tree(ann(cpu=cpu), accel=accel)

    chosen = root.find("cpu")
    assert chosen is not None
    assert (chosen.get("mode"), chosen.findtext("model")) == (mode, model)
    assert [feature.get("name") for feature in chosen.findall("feature[@policy='disable']")] == without
    assert root.get("type") == {"kvm": "kvm", "tcg": "qemu"}[accel]


def test_guest_without_a_kernel_boots_from_its_disk() -> None:
    root = tree(ann(), guest_image(kernel=None, initrd=None, disk="/image/disk", cloud_init=True))

    assert root.find("os/kernel") is None
    assert root.find("os/boot[@dev='hd']") is not None
    assert [serial.text for serial in root.findall("devices/disk/serial")] == ["root", "seed"]
    assert root.find("devices/disk[@device='cdrom']/readonly") is not None


@pytest.mark.parametrize(("machine", "bus"), [("q35", "sata"), ("pc", "ide")])
def test_seed_is_on_a_bus_that_the_machine_has(machine: str, bus: str) -> None:
    root = tree(ann(machine=machine), guest_image(disk="/image/disk", cloud_init=True))

    assert root.find(f"devices/disk[@device='cdrom']/target[@bus='{bus}']") is not None


def test_disks_are_named_by_bus_after_the_images_own() -> None:
    disks = [
        {"name": name, "size": "1G", "bus": bus} for name, bus in (("a", "virtio"), ("b", "scsi"), ("c", "virtio"))
    ]

    view = parse(xml_of(ann(disks=disks), guest_image(disk="/image/disk")))

    assert view is not None
    assert view.disks == {"root": "vda", "a": "vdb", "b": "sda", "c": "vdc"}


def test_scsi_controller_is_there_where_a_disk_needs_it() -> None:
    without, with_disk = tree(ann()), tree(ann(disks=[{"name": "a", "size": "1G", "bus": "scsi"}]))

    assert without.find("devices/controller[@type='scsi']") is None
    assert with_disk.find("devices/controller[@type='scsi']") is not None


def test_many_disks_have_names_that_libvirt_takes() -> None:
    disks = [{"name": f"d{number}", "size": "1G"} for number in range(30)]

    view = parse(xml_of(ann(disks=disks)))

    assert view is not None
    assert all(re.fullmatch("vd[a-z]+", target) for target in view.disks.values())
    assert len(set(view.disks.values())) == 30


@pytest.mark.parametrize("spare", [0, 4, 28])
def test_each_device_has_a_slot_and_the_spare_ones_are_there(spare: int) -> None:
    guest = ann(hotplug_slots=spare, nics=["lan", "lan"], disks=[{"name": "a", "size": "1G"}])

    ports = tree(guest).findall("devices/controller[@model='pcie-root-port']")

    assert len(ports) == 2 + 1 + 4 + spare


def test_old_machine_has_no_pcie_slots() -> None:
    assert tree(ann(machine="pc")).find("devices/controller[@type='pci']") is None


def test_nic_is_plugged_into_the_tap_that_is_there() -> None:
    guest = ann(nics=[{"network": "lan", "model": "e1000e"}])
    nic = guest.nics[0]

    interface = tree(guest).find("devices/interface")

    assert interface is not None
    assert [(child.tag, child.attrib) for child in interface] == [
        ("mac", {"address": nic.mac}),
        ("target", {"dev": nic.tap, "managed": "no"}),
        ("model", {"type": "e1000e"}),
        ("mtu", {"size": "1500"}),
    ]


def test_xml_of_the_lab_file_is_passed_through() -> None:
    root = tree(ann(xml="<on_lockfailure>poweroff</on_lockfailure>\n<title>a &amp; b</title>"))

    assert root.findtext("on_lockfailure") == "poweroff"
    assert root.findtext("title") == "a & b"


def test_uuid_is_of_the_lab_and_the_guest() -> None:
    made = {domain.guest_uuid(uid, name) for uid in ("0123abcd", "0123abce") for name in ("ann", "bob")}

    assert len(made) == 4
    assert tree(ann()).findtext("uuid") == domain.guest_uuid("0123abcd", "ann")


# -- domains of others, and damaged ones -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "xml",
    [
        "<domain type='kvm'><name>theirs</name></domain>",
        "<domain type='kvm'><name>theirs</name><metadata/></domain>",
        "<domain><name>x</name><metadata><guest xmlns='urn:other' lab='a' uid='b'>{}</guest></metadata></domain>",
        "<domain><name>x</name><metadata><guest lab='a' uid='b' name='c' host='d'>{}</guest></metadata></domain>",
    ],
)
def test_domain_of_somebody_else_is_none(xml: str) -> None:
    assert parse(xml) is None


def marked(text: str, attributes: str = "lab='one' uid='0123abcd' name='ann' host='alpha'") -> str:
    return (
        f"<domain type='qemu'><name>ann</name><metadata><o:guest xmlns:o='{domain.NAMESPACE}' {attributes}>"
        f"{text}</o:guest></metadata></domain>"
    )


WHOLE = json.dumps({"guest": {}, "image": "tiny-1", "ready": "agent"})


@pytest.mark.parametrize(
    "xml",
    [
        marked(""),
        marked("{"),
        marked("[]"),
        marked("7"),
        marked("{}"),
        marked('{"guest": {}, "image": "tiny-1"}'),
        marked(WHOLE, "lab='one' uid='0123abcd' name='ann'"),
        marked(WHOLE, ""),
    ],
)
def test_damaged_mark_is_an_error_that_names_the_domain(xml: str) -> None:
    with pytest.raises(GuestError, match="domain ann: its metadata cannot be read"):
        parse(xml)


@pytest.mark.parametrize("wish", ["7", '"text"', "[]", "null"])
def test_mark_with_a_wish_that_is_no_mapping_is_an_error(wish: str) -> None:
    with pytest.raises(GuestError):
        parse(marked(f'{{"guest": {wish}, "image": "tiny-1", "ready": "agent"}}'))


def test_marked_domain_without_devices_can_be_read() -> None:
    view = parse(marked(WHOLE))

    assert view is not None
    assert (view.vcpus, view.memory, view.nics, view.disks, view.console_path) == (1, 0, [], {}, None)
    assert not view.agent_connected


# -- as libvirt gives it back ----------------------------------------------------------------------------------------

LIVE = f"""
<domain type="kvm" id="3">
  <name>one.ann</name>
  <metadata>
    <orchestrator:guest xmlns:orchestrator="{domain.NAMESPACE}" lab="one" uid="0123abcd" name="ann" host="alpha">
      {WHOLE}
    </orchestrator:guest>
  </metadata>
  <memory unit="KiB">524288</memory>
  <currentMemory unit="MiB">256</currentMemory>
  <vcpu placement="static" current="2">4</vcpu>
  <devices>
    <disk type="file"><target dev="vda" bus="virtio"/><serial>data</serial></disk>
    <disk type="file"><serial>no target</serial></disk>
    <interface type="ethernet"><mac address="02:00:00:00:00:01"/></interface>
    <interface type="ethernet"/>
    <serial type="pty"><source path="/dev/pts/4"/></serial>
    <channel type="unix"><target type="virtio" name="org.other.agent.0" state="connected"/></channel>
    <channel type="unix"><target type="virtio" name="org.qemu.guest_agent.0" state="STATE"/></channel>
  </devices>
</domain>
"""


@pytest.mark.parametrize(("state", "connected"), [("connected", True), ("disconnected", False)])
def test_running_domain_is_read_as_it_is_now(state: str, connected: bool) -> None:
    view = parse(LIVE.replace("STATE", state))

    assert view is not None
    assert (view.vcpus, view.memory, view.memory_total) == (2, 256 << 20, 512 << 20)
    assert (view.nics, view.disks) == (["02:00:00:00:00:01"], {"data": "vda"})
    assert (view.console_path, view.agent_connected, view.accel) == ("/dev/pts/4", connected, "kvm")


@pytest.fixture
def memory_driver(tmp_path: Path) -> Iterator[libvirt.virConnect]:
    """libvirt's own driver for tests: it has the domains of this test only, and no QEMU."""
    (tmp_path / "node.xml").write_text("<node/>")
    connection = libvirt.open(f"test://{tmp_path}/node.xml")
    yield connection
    connection.close()


def test_metadata_changed_while_the_guest_runs_is_read_back(memory_driver: libvirt.virConnect) -> None:
    dom = memory_driver.defineXML(
        "<domain type='test'><name>ann</name><memory>1024</memory><os><type>hvm</type></os></domain>"
    )
    guest = ann(cmdline=NASTY, description=NASTY)

    dom.setMetadata(
        libvirt.VIR_DOMAIN_METADATA_ELEMENT,
        metadata_xml(guest, "tiny-2", "agent", IDENTITY),
        "orchestrator",
        domain.NAMESPACE,
        libvirt.VIR_DOMAIN_AFFECT_CONFIG,
    )
    view = parse(dom.XMLDesc())

    assert view is not None
    assert (view.name, view.identity, view.image, view.ready) == ("ann", IDENTITY, "tiny-2", "agent")
    assert ResolvedGuest.model_validate(view.wish) == guest


def test_readiness_of_the_wish_comes_before_the_images() -> None:
    views = [parse(xml_of(ann(ready=ready), guest_image(ready="agent"))) for ready in (None, "console:up")]

    assert [view.ready for view in views if view] == ["agent", "console:up"]


def test_facts_survive_the_way_to_the_command_line() -> None:
    facts = GuestFacts(
        name="ann",
        host="alpha",
        state="running",
        reason="",
        ready=True,
        wish=ann().model_dump(mode="json"),
        image="tiny-1",
        accel="tcg",
        vcpus=1,
        memory=1,
        memory_total=2,
        nics=["02:00:00:00:00:01"],
        tail=["last words"],
        since=1.5,
    )

    assert GuestFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    assert facts.to_json() == asdict(facts)


# -- on another host -------------------------------------------------------------------------------------------------


def test_guest_on_another_host_has_its_files_there_and_is_the_same_otherwise() -> None:
    """Golden: ``leaving.xml`` is what libvirt says of a guest that moves, ``arriving.xml`` what the other is told."""
    image = guest_image(kernel="/there/images/kernel", initrd="/there/images/initrd", disk="/there/images/disk.qcow2")

    made = domain.relocate(
        (DATA / "leaving.xml").read_text(),
        host="two",
        emulator="/opt/qemu/bin/qemu-system-x86_64",
        folder=Path("/there/guests/web"),
        image=image,
    )

    assert made + "\n" == (DATA / "arriving.xml").read_text()


@given(lab_files(), st.booleans())
def test_guest_there_and_back_is_the_same(data: dict[str, Any], cloud: bool) -> None:
    made = resolved(data)
    image = guest_image(disk="/image/disk", cloud_init=cloud)
    for guest in made.guests.values():
        here = xml_of(guest, image)
        there = domain.relocate(here, host="there", emulator="/q", folder=Path("/f"), image=guest_image(kernel="/k"))
        back = domain.relocate(there, host=guest.host, emulator="/usr/bin/qemu", folder=FOLDER, image=image)
        first, second, last = parse(here), parse(there), parse(back)
        assert first is not None
        assert second is not None
        assert last is not None
        assert second.identity.host == second.wish["host"] == "there"
        assert second.disks == first.disks
        assert last == dataclasses.replace(first, identity=dataclasses.replace(IDENTITY, host=guest.host))


def test_domain_of_somebody_else_is_not_taken_along() -> None:
    with pytest.raises(GuestError, match="carries no mark of ours"):
        domain.relocate("<domain><name>x</name></domain>", host="a", emulator="", folder=FOLDER, image=guest_image())
