"""How an observed guest differs from the wish, and what each difference takes."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from orchestrator.guests.control import NOTED_FIELDS, RESTART_FIELDS, Difference, compare
from orchestrator.guests.domain import GuestFacts
from orchestrator.spec.resolved import ResolvedGuest
from orchestrator.testing import image_id, perfect
from tests.unit.labs import lab_files, one_guest, resolved

TINY = image_id("tiny")


def observed(**settings: Any) -> GuestFacts:
    """``ann`` of a lab with ``settings``, as it is observed when it runs."""
    return perfect(one_guest(**settings)).hosts["alpha"].guests[0]


def wished(**settings: Any) -> ResolvedGuest:
    return one_guest(**settings).guests["ann"]


def difference(
    before: dict[str, Any], after: dict[str, Any], image: str | None = TINY, *, disk: bool = False, **facts: Any
) -> Difference:
    return compare(wished(**after), replace(observed(**before), **facts), image, image_has_disk=disk)


def mac(**settings: Any) -> str:
    return wished(**settings).nics[-1].mac


# Wish before, wish after, and what is to be done.
MEMORY = {"size": "256M", "max": "512M"}
VCPUS = {"count": 2, "max": 4}
DISK = [{"name": "data", "size": "1G"}]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Difference]] = {
    "nothing": ({}, {}, Difference()),
    "memory grows within its maximum": (
        {"memory": MEMORY},
        {"memory": {"size": "384M", "max": "512M"}},
        Difference(live=("memory: 256M → 384M",)),
    ),
    "memory shrinks": ({"memory": "256M"}, {"memory": "128M"}, Difference(live=("memory: 256M → 128M",))),
    "memory grows beyond its maximum": (
        {"memory": MEMORY},
        {"memory": "1G"},
        Difference(restart=("memory maximum: 512M → 1G", "memory: 256M → 1G")),
    ),
    "memory maximum grows": (
        {"memory": "256M"},
        {"memory": MEMORY},
        Difference(restart=("memory maximum: 256M → 512M",)),
    ),
    "memory maximum shrinks": ({"memory": MEMORY}, {"memory": "256M"}, Difference()),
    "vCPUs grow within their maximum": (
        {"vcpus": VCPUS},
        {"vcpus": {"count": 4, "max": 4}},
        Difference(live=("vcpus: 2 → 4",)),
    ),
    "vCPUs shrink under emulation": (
        {"vcpus": VCPUS},
        {"vcpus": {"count": 1, "max": 4}},
        Difference(restart=("vcpus: 2 → 1",)),
    ),
    "vCPUs shrink under KVM": (
        {"vcpus": VCPUS, "accel": "kvm"},
        {"vcpus": {"count": 1, "max": 4}, "accel": "kvm"},
        Difference(live=("vcpus: 2 → 1",)),
    ),
    "vCPUs grow beyond their maximum": (
        {"vcpus": 1},
        {"vcpus": 2},
        Difference(restart=("vcpus maximum: 1 → 2", "vcpus: 1 → 2")),
    ),
    "vCPU maximum shrinks": ({"vcpus": VCPUS}, {"vcpus": 2}, Difference()),
    "disk plugged": ({}, {"disks": DISK}, Difference(live=("disk data of 1G: plugged",))),
    "disk unplugged": (
        {"disks": DISK},
        {},
        Difference(live=("disk data: unplugged, its contents removed",)),
    ),
    "disk resized": (
        {"disks": DISK},
        {"disks": [{"name": "data", "size": "2G"}]},
        Difference(recreate=("disk data size: 1G → 2G",)),
    ),
    "disk on another bus": (
        {"disks": DISK},
        {"disks": [{"name": "data", "size": "1G", "bus": "scsi"}]},
        Difference(recreate=("disk data bus: virtio → scsi",)),
    ),
    "own disk resized": ({}, {"disk_size": "4G"}, Difference(recreate=("disk_size: none → 4G",))),
    "NIC plugged": (
        {"nics": []},
        {"nics": ["lan"]},
        Difference(live=(f"NIC {mac()} on lan: plugged",)),
    ),
    "NIC unplugged": ({"nics": ["lan"]}, {"nics": []}, Difference(live=(f"NIC {mac()}: unplugged",))),
    "second NIC on the same network": (
        {"nics": ["lan"]},
        {"nics": ["lan", "lan"]},
        Difference(live=(f"NIC {mac(nics=['lan', 'lan'])} on lan: plugged",)),
    ),
    "NIC with another MAC": (
        {"nics": ["lan"]},
        {"nics": [{"network": "lan", "mac": "02:00:00:00:00:01"}]},
        Difference(live=(f"NIC {mac()}: unplugged", "NIC 02:00:00:00:00:01 on lan: plugged")),
    ),
    "NIC with another address": (
        {"nics": ["lan"]},
        {"nics": [{"network": "lan", "ipv4": "10.1.0.9"}]},
        Difference(restart=(f"NIC {mac()} ipv4: 10.1.0.2/24 → 10.1.0.9/24",)),
    ),
    "NIC of another model": (
        {"nics": ["lan"]},
        {"nics": [{"network": "lan", "model": "e1000e"}]},
        Difference(restart=(f"NIC {mac()} model: virtio → e1000e",)),
    ),
    "kernel command line": ({}, {"cmdline": "quiet"}, Difference(restart=("cmdline: none → quiet",))),
    "accelerator": ({}, {"accel": "tcg"}, Difference(restart=("accel: auto → tcg",))),
    "CPU model": ({"cpu": "max"}, {}, Difference(restart=("cpu: max → none",))),
    "machine": ({}, {"machine": "pc"}, Difference(restart=("machine: q35 → pc",))),
    "emulator": ({}, {"emulator": "/opt/qemu"}, Difference(restart=("emulator: none → /opt/qemu",))),
    "slots": ({}, {"hotplug_slots": 8}, Difference(restart=("hotplug_slots: 4 → 8",))),
    "XML": ({}, {"xml": "<a/>"}, Difference(restart=("xml: none → <a/>",))),
    "user data": ({}, {"user_data": "#!/bin/sh"}, Difference(restart=("user_data: none → #!/bin/sh",))),
    "description": ({}, {"description": "first"}, Difference(live=("description: none → first",))),
    "readiness": ({}, {"ready": "none"}, Difference(live=("ready: none → none",))),
    "several at once": (
        {"vcpus": VCPUS},
        {"vcpus": {"count": 3, "max": 4}, "cmdline": "quiet", "disks": DISK, "disk_size": "4G"},
        Difference(
            live=("vcpus: 2 → 3", "disk data of 1G: plugged"),
            restart=("cmdline: none → quiet",),
            recreate=("disk_size: none → 4G",),
        ),
    ),
}


@pytest.mark.parametrize(("before", "after", "expected"), CASES.values(), ids=CASES)
def test_change_of_the_wish(before: dict[str, Any], after: dict[str, Any], expected: Difference) -> None:
    found = difference(before, after)

    assert found == expected
    assert bool(found) == (expected != Difference())


@given(lab_files())
def test_guest_that_is_as_wished_has_no_difference(data: dict[str, Any]) -> None:
    lab = resolved(data)
    seen = [facts for host in perfect(lab).hosts.values() for facts in host.guests]

    for facts in seen:
        wish = lab.guests[facts.name]
        assert not compare(wish, facts, facts.image, image_has_disk=True)
    assert len(seen) == len(lab.guests)


# -- what was changed behind our back --------------------------------------------------------------------------------


def test_memory_that_the_balloon_took_is_given_back() -> None:
    assert difference({}, {}, memory=128 << 20) == Difference(live=("memory: 128M → 256M",))


def test_vcpus_that_were_unplugged_are_plugged_again() -> None:
    assert difference({"vcpus": VCPUS}, {"vcpus": VCPUS}, vcpus=1) == Difference(live=("vcpus: 1 → 2",))


def test_nic_and_disk_that_were_unplugged_are_plugged_again() -> None:
    found = difference({"disks": DISK}, {"disks": DISK}, nics=[], disks=[])

    assert found == Difference(live=(f"NIC {mac()} on lan: plugged", "disk data of 1G: plugged"))


def test_nic_and_disk_that_somebody_plugged_are_unplugged() -> None:
    found = difference({}, {}, nics=[mac(), "02:00:00:00:00:99"], disks=["foreign"])

    assert found.live == ("NIC 02:00:00:00:00:99: unplugged", "disk foreign: unplugged, its contents removed")


# -- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disk", "expected"),
    [
        (False, Difference(restart=(f"image: {TINY} → tiny-ffffffffffff",))),
        (True, Difference(recreate=(f"image: {TINY} → tiny-ffffffffffff",))),
    ],
)
def test_rebuilt_image_loses_contents_only_where_it_has_a_disk(disk: bool, expected: Difference) -> None:
    assert difference({}, {}, "tiny-ffffffffffff", disk=disk) == expected


def test_image_that_is_not_built_yet_is_no_difference() -> None:
    assert not difference({}, {}, None, disk=True)


def test_other_image_that_is_not_built_yet_is_told_by_its_name() -> None:
    assert difference({}, {"image": "debian"}, None, disk=True).recreate == (f"image: {TINY} → debian",)


def test_other_name_of_the_same_image_is_a_difference() -> None:
    assert difference({"image": "tiny"}, {"image": "debian"}, TINY, disk=True).recreate


# -- old states and odd values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", [*RESTART_FIELDS, *NOTED_FIELDS, "disk_size", "memory_max", "vcpus_max", "nics", "disks"]
)
def test_wish_of_an_older_version_without_a_field_can_be_compared(key: str) -> None:
    facts = observed()
    del facts.wish[key]

    found = compare(wished(), facts, TINY, image_has_disk=False)

    assert not found.recreate


def test_long_values_are_shortened() -> None:
    (line,) = difference({}, {"cmdline": "x" * 200}).restart

    assert line == f"cmdline: none → {'x' * 57}…"


def test_values_of_several_lines_are_shown_on_one() -> None:
    (line,) = difference({}, {"user_data": "#!/bin/sh\necho\n"}).restart

    assert line.isprintable()


def test_difference_of_every_field_of_a_guest_is_noticed() -> None:
    """A new field of the lab file must be compared, or ``up`` would not notice its change."""
    compared = {*RESTART_FIELDS, *NOTED_FIELDS, "image", "disk_size", "nics", "disks"}
    compared |= {"vcpus", "vcpus_max", "memory", "memory_max"}
    identity = {"name", "host", "home"}  # another guest, or another place

    assert compared | identity == set(ResolvedGuest.model_fields)
