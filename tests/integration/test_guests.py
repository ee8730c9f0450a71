"""One lab with two guests on local hosts: what runs, what is read, and (from :mod:`tests.guest_use`) how guests are
used."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Sandbox
from tests.guest_use import *  # noqa: F403 # the tests
from tests.guest_use import read_until

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


# -- reading -----------------------------------------------------------------------------------------------------


def test_exec_unknown_guest_names_those_there_are(lab: Sandbox) -> None:
    done = lab.run("exec", "bob", "--", "true", status=1)

    assert "has no guest bob" in done.stderr
    assert "ann, eve" in done.stderr


@pytest.mark.parametrize("command", [["status"], ["inspect"], ["inspect", "ann"], ["plan"], ["image", "list"]])
def test_every_read_has_json_and_yaml(lab: Sandbox, command: list[str]) -> None:
    from ruamel.yaml import YAML

    as_json = json.loads(lab.run(*command, "-o", "json").stdout)
    as_yaml = YAML(typ="safe").load(lab.run(*command, "-o", "yaml").stdout)

    assert type(as_json) is type(as_yaml)
    assert as_json


def test_inspect_xml(lab: Sandbox) -> None:
    assert "<domain type=" in lab.run("inspect", "ann", "--xml").stdout


def test_graph_inventory(lab: Sandbox) -> None:
    from ruamel.yaml import YAML

    mermaid = lab.run("graph").stdout
    dot = lab.run("graph", "--format", "dot").stdout
    inventory = YAML(typ="safe").load(lab.run("inventory").stdout)

    assert mermaid.startswith("flowchart")
    assert "guest_ann" in mermaid
    assert dot.startswith('graph "')
    children = inventory["all"]["children"]
    assert set(children["lab_hosts"]["hosts"]) == {"alpha", "beta"}
    assert set(children["guests"]["children"]["guests_on_alpha"]["hosts"]) == {"ann"}


def test_status_watch_until_ctrl_c(lab: Sandbox) -> None:
    watcher = lab.start("status", "--watch", "--every", "0.2")
    assert watcher.stdout
    read_until(watcher.stdout.fileno(), b"running")

    watcher.send_signal(signal.SIGINT)
    watcher.communicate(timeout=20)

    assert watcher.returncode == 130


def test_doctor_by_the_agent_of_a_host(lab: Sandbox) -> None:
    findings = json.loads(lab.run("doctor", "alpha", "--only", "memfd", "-o", "json").stdout)

    assert [(finding["name"], finding["ok"]) for finding in findings] == [("memfd", True)]


def test_verbose_shows_commands_to_paste(lab: Sandbox) -> None:
    done = lab.run("-v", "graph", "--format", "svg", status=None)

    assert "dot -Tsvg" in done.stderr
