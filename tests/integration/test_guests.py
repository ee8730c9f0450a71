"""One lab with two guests on local hosts: what runs, and (from :mod:`tests.guest_use`) how guests are used."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Sandbox
from tests.guest_use import *  # noqa: F403 # the tests

pytestmark = pytest.mark.privileged

LAB = """\
lab: guests
hosts: {alpha: {}, beta: {}}
networks: {lan: {ipv4: 10.10.0.0/24, ipv6: "fd10::/64"}}
defaults: {guest: {memory: 192M, nics: [lan]}}
guests:
  ann: {host: alpha, disks: [{name: data, size: 32M}]}
  eve: {host: beta}
"""


@pytest.fixture(scope="module")
def lab(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    shared_sandbox.file(LAB)
    shared_sandbox.run("up")
    yield shared_sandbox
    shared_sandbox.run("down")


def pid_of(guest: str) -> int:
    found = subprocess.run(["pgrep", "-f", f"guest={guest},"], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[0])


# -- what a guest is ---------------------------------------------------------------------------------------------


def test_auto_accelerator_is_what_the_probe_found(lab: Sandbox) -> None:
    from orchestrator.hosts import accel

    verdict = accel.probe()

    assert {guest["accel"] for guest in lab.guests().values()} == {verdict.kind}
    command = Path(f"/proc/{pid_of('ann')}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    assert f"-accel {verdict.kind}" in command


def test_memory_is_a_shared_memfd(lab: Sandbox) -> None:
    maps = Path(f"/proc/{pid_of('ann')}/maps").read_text()

    assert re.search(r"rw-s .*/memfd:", maps), "guest memory is not a shared memfd"


def test_qemu_does_not_run_as_root(lab: Sandbox) -> None:
    status = Path(f"/proc/{pid_of('ann')}/status").read_text()

    uids = re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)
    assert uids
    assert uids[1] != "0"


def test_each_host_has_its_own_agent_and_libvirt(lab: Sandbox) -> None:
    owners = [json.loads(path.read_text()) for path in Path(lab.env["ORCHESTRATOR_RUN"]).glob("*/owner.json")]

    assert sorted(owner["host"] for owner in owners) == ["alpha", "beta"]
    assert len({owner["pid"] for owner in owners}) == 2
    namespaces = {Path(f"/proc/{owner['pid']}/ns/net").readlink() for owner in owners}
    assert len(namespaces) == 2
