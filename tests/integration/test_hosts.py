"""``host``: real local hosts, a machine that does not answer, and what is told of them."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Sandbox

pytestmark = pytest.mark.privileged

LAB = """\
lab: hosts
hosts:
  alpha: {}
  beta: {}
  gone: {kind: ssh, address: 127.0.0.1, port: 1}
networks:
  lan: {ipv4: 10.10.0.0/24}
guests:
  ann: {host: alpha, memory: 192M, nics: [lan]}
"""
PCI = Path("/sys/bus/pci/devices")


@pytest.fixture(scope="module")
def lab(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    """Up but for the host that does not answer."""
    shared_sandbox.file(LAB)
    shared_sandbox.run("up", status=4)
    yield shared_sandbox
    shared_sandbox.run("down", "--forget", status=None)


def facts(lab: Sandbox, host: str) -> dict[str, Any]:
    return dict(lab.json("host", "facts", host))


def kill_agent(lab: Sandbox, host: str) -> None:
    owners = [json.loads(file.read_text()) for file in Path(lab.env["ORCHESTRATOR_RUN"]).rglob("owner.json")]
    (pid,) = [owner["pid"] for owner in owners if owner["host"] == host]
    os.kill(pid, signal.SIGKILL)


def test_list_has_every_host_and_the_reason_why_one_does_not_answer(lab: Sandbox) -> None:
    done = lab.run("host", "list", "-o", "json", status=4)

    alpha, beta, gone = json.loads(done.stdout)
    assert [(host["name"], host["state"], host["guests"]) for host in (alpha, beta)] == [
        ("alpha", "up", 1),
        ("beta", "up", 0),
    ]
    assert alpha["cpus"] == os.cpu_count()
    assert alpha["accel"] in ("kvm", "tcg")
    assert 0 < alpha["memory_available"] < alpha["memory"]
    assert (gone["state"], gone["guests"]) == ("unreachable", None)
    assert "127.0.0.1" in gone["problem"]
    assert "gone: " in lab.run("host", "list", status=4).stdout


def test_nics_are_those_of_the_host_alone(lab: Sandbox) -> None:
    found = facts(lab, "alpha")

    kinds = sorted((nic["kind"], nic["state"]) for nic in found["nics"] if nic["kind"] != "loopback")
    assert [kind for kind, _ in kinds] == ["bridge", "tap", "veth"]
    (underlay,) = [nic for nic in found["nics"] if nic["name"] == "underlay"]
    assert f"{found['address']}/24" in underlay["addresses"]
    assert underlay["mtu"] == 9000
    assert "tap" not in {nic["kind"] for nic in facts(lab, "beta")["nics"]}


def test_all_else_is_that_of_the_machine(lab: Sandbox) -> None:
    found = facts(lab, "alpha")

    assert found["cpu"]["threads"] == os.cpu_count()
    assert found["memory"]["total"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    assert found["kernel"]["release"] == os.uname().release
    assert [node["id"] for node in found["numa"]] == sorted(
        int(path.name.removeprefix("node")) for path in Path("/sys/devices/system/node").glob("node[0-9]*")
    )
    assert found["accel"]["works"]


def test_bus_masters_are_those_whose_command_register_says_so(lab: Sandbox) -> None:
    devices = facts(lab, "alpha")["pci"]

    enabled = {path.name: bool((path / "config").read_bytes()[4] & 4) for path in PCI.glob("*")}
    assert {device["address"]: device["bus_master"]["enabled"] for device in devices} == enabled
    assert all(device["bus_master"]["capable"] for device in devices if device["bus_master"]["enabled"])


def test_facts_are_printed_in_sections(lab: Sandbox) -> None:
    printed = lab.run("host", "facts", "alpha").stdout.splitlines()

    assert {"HOST", "CPU", "MEMORY", "KERNEL"} <= {line.strip() for line in printed}
    assert any(line.startswith("PCI ") and "BUS MASTER" in line for line in printed)


def test_agent_that_was_killed_is_started_again(lab: Sandbox) -> None:
    kill_agent(lab, "beta")
    first = facts(lab, "beta")
    kill_agent(lab, "beta")
    second = json.loads(lab.run("host", "list", "-o", "json", status=4).stdout)[1]

    assert first["name"] == "beta"
    assert second["state"] == "up"


def test_doctor_runs_on_the_host_and_prints_as_the_local_one(lab: Sandbox) -> None:
    words = ["--only", "memfd", "--only", "namespaces"]

    there = lab.run("host", "doctor", "beta", *words)
    here = lab.run("doctor", *words)

    assert there.stdout == here.stdout
    assert there.stdout.startswith("✓ memfd ")


def test_doctor_of_a_host_that_does_not_answer_ends_with_4(lab: Sandbox) -> None:
    assert "host gone" in lab.run("host", "doctor", "gone", status=4).stderr
