"""Guests two levels down: under the KVM of a host that is itself a virtual machine."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json

import pytest

from tests.guest_use import *  # noqa: F403 # the tests
from tests.nested.conftest import Lab


@pytest.fixture
def lab(nested: Lab) -> Lab:
    return nested


@pytest.mark.parametrize(("host", "guest"), [("alpha", "ann"), ("beta", "eve")])
def test_qemu_says_that_kvm_is_enabled(lab: Lab, host: str, guest: str) -> None:
    command = f'virsh -c qemu:///system qemu-monitor-command nested.{guest} "{{\\"execute\\": \\"query-kvm\\"}}"'

    answer = json.loads(lab.on(host, command))

    assert answer["return"] == {"enabled": True, "present": True}
    assert lab.guests()[guest]["accel"] == "kvm"


def test_guest_sees_the_kvm_of_its_host(lab: Lab) -> None:
    assert "Hypervisor detected: KVM" in lab.exec("ann", "dmesg")


def test_guests_reach_each_other_across_hosts_by_both_families(lab: Lab) -> None:
    found = lab.json("reach")

    assert len(found) == 4
    assert all(one["milliseconds"] is not None and one["across_hosts"] for one in found)


def test_networks_are_switched_on_the_kernels_of_the_hosts(lab: Lab) -> None:
    shown = lab.json("switch", "show")
    traced = lab.json("switch", "trace", "ann", "eve")

    assert [network["datapath"] for host in shown for network in host["networks"]] == ["ebpf", "ebpf"]
    assert [step["fate"] for step in traced["steps"]] == ["underlay", "guest"]


def test_full_size_datagrams_cross_the_hosts_unfragmented(lab: Lab) -> None:
    assert "2 packets received" in lab.exec("ann", "ping", "-c", "2", "-W", "10", "-s", "1472", "10.10.0.3")


def test_second_up_changes_nothing(lab: Lab) -> None:
    assert lab.json("plan") == {"operations": [], "unreachable": {}}
    assert "nothing to do" in lab.run("up").stderr
