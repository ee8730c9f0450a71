"""A lab in other forms: status, graphs, ssh_config, an Ansible inventory."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import CommandError, HostError
from orchestrator.hosts.opening import reached_by_ssh
from orchestrator.hosts.transport import HostFacts
from orchestrator.plan.build import build
from orchestrator.plan.operations import ObservedHost, ObservedLab
from orchestrator.render import GraphFormat, graph, inventory, ssh_arguments, ssh_config, status
from orchestrator.spec.resolved import ResolvedLab
from orchestrator.state import LabState
from orchestrator.testing import perfect
from tests.unit.labs import demo, resolved

pytestmark = pytest.mark.usefixtures("places")

needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="needs ssh")


@pytest.fixture
def lab(places: Path) -> ResolvedLab:
    return demo()


def observed(lab: ResolvedLab, host: str, **changes: Any) -> ObservedLab:
    """Perfect but for one host."""
    seen = perfect(lab)
    return ObservedLab({**seen.hosts, host: replace(seen.hosts[host], **changes)}, seen.images)


def status_of(lab: ResolvedLab, seen: ObservedLab) -> dict[str, Any]:
    return status(lab, seen, build(lab, seen))


def guest_state(lab: ResolvedLab, **facts: Any) -> dict[str, Any]:
    """What status says of ``ann``, of whom ``facts`` are observed."""
    guests = perfect(lab).hosts["alpha"].guests
    seen = observed(lab, "alpha", guests=(replace(guests[0], **facts), *guests[1:]))
    return dict(status_of(lab, seen)["guests"][0])


# -- status ----------------------------------------------------------------------------------------------------------


def test_status_of_a_perfect_lab(lab: ResolvedLab) -> None:
    data = status_of(lab, perfect(lab))

    assert [(host["name"], host["state"], host["guests"]) for host in data["hosts"]] == [
        ("alpha", "up", 2),
        ("beta", "up", 2),
    ]
    assert [(guest["name"], guest["host"], guest["state"]) for guest in data["guests"]] == [
        ("ann", "alpha", "running"),
        ("bob", "alpha", "running"),
        ("eve", "beta", "running"),
        ("dan", "beta", "running"),
    ]
    assert data["guests"][3]["addresses"] == ["10.10.0.50", "fd10::5"]
    assert data["changes"] == 0


def test_status_is_plain_data_with_the_same_keys_for_every_guest(lab: ResolvedLab) -> None:
    data = status_of(lab, observed(lab, "alpha", guests=perfect(lab).hosts["alpha"].guests[:1]))

    assert json.loads(json.dumps(data)) == data
    assert [sorted(guest) for guest in data["guests"]] == [sorted(data["guests"][0])] * 4


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({}, "running"),
        ({"ready": False}, "starting"),
        ({"state": "paused", "ready": False}, "paused"),
        ({"state": "off", "ready": False, "reason": "shut down"}, "off"),
        ({"state": "crashed", "ready": False, "tail": ["Kernel panic"]}, "crashed"),
    ],
)
def test_status_tells_the_state_of_a_guest(lab: ResolvedLab, facts: dict[str, Any], state: str) -> None:
    guest = guest_state(lab, **facts)

    assert guest["state"] == state
    assert guest["reason"] == facts.get("reason", "")
    assert guest["tail"] == facts.get("tail", [])


def test_status_shows_what_is_observed_not_what_is_wished(lab: ResolvedLab) -> None:
    guest = guest_state(lab, memory=1 << 27, vcpus=3, host="beta")

    assert (guest["memory"], guest["vcpus"], guest["host"]) == (1 << 27, 3, "beta")


def test_status_tells_what_is_absent(lab: ResolvedLab) -> None:
    data = status_of(lab, ObservedLab({"alpha": ObservedHost(), "beta": ObservedHost(HostFacts(True, True))}))

    assert [host["state"] for host in data["hosts"]] == ["absent", "up"]
    assert {guest["state"] for guest in data["guests"]} == {"absent"}
    assert data["changes"] > 0


def test_status_tells_what_cannot_be_known(lab: ResolvedLab) -> None:
    silent = ObservedHost(problem=HostError("no route to host"))
    data = status_of(lab, ObservedLab({**perfect(lab).hosts, "beta": silent}))

    assert [(host["state"], host["problem"]) for host in data["hosts"]] == [
        ("up", None),
        ("unreachable", "no route to host"),
    ]
    assert [guest["state"] for guest in data["guests"]] == ["running", "running", "unknown", "unknown"]


# -- graphs ----------------------------------------------------------------------------------------------------------


def test_mermaid_has_hosts_networks_guests_and_addresses(lab: ResolvedLab) -> None:
    lines = graph(lab, GraphFormat.MERMAID).splitlines()

    assert lines[0] == "flowchart LR"
    assert '  subgraph host_alpha["alpha (local, 10.213.0.2)"]' in lines
    assert '    guest_ann["ann"]' in lines
    assert '  network_lan(("lan 10.10.0.0/24 fd10::/64"))' in lines
    assert '  guest_dan ---|"10.10.0.50<br/>fd10::5"| network_lan' in lines
    assert sum(line.strip() == "end" for line in lines) == sum("subgraph" in line for line in lines) == 2


def test_dot_has_hosts_networks_guests_and_addresses(lab: ResolvedLab) -> None:
    text = graph(lab, GraphFormat.DOT)

    assert text.startswith('graph "demo" {')
    assert text.endswith("}")
    assert text.count("{") == text.count("}") == 3
    assert '"guest dan" -- "network lan" [label="10.10.0.50\\nfd10::5"];' in text


def test_nic_without_addresses_is_labelled_with_its_mac() -> None:
    lab = resolved(
        {"lab": "l2", "hosts": {"a": {}}, "networks": {"n": {}}, "guests": {"g": {"host": "a", "nics": ["n"]}}}
    )
    mac = lab.guests["g"].nics[0].mac

    assert f'guest_g ---|"{mac}"| network_n' in graph(lab, GraphFormat.MERMAID)
    assert f'[label="{mac}"]' in graph(lab, GraphFormat.DOT)


@pytest.mark.parametrize("kind", [GraphFormat.MERMAID, GraphFormat.DOT])
def test_empty_lab_can_be_drawn(kind: GraphFormat) -> None:
    drawn = graph(resolved({"lab": "empty", "hosts": {"alpha": {}}}), kind)

    assert "alpha" in drawn


def test_svg_is_made_by_graphviz(lab: ResolvedLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "dot"
    program.write_text('#!/bin/sh\n[ "$1" = -Tsvg ] && echo "<svg>" && head -n 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    assert graph(lab, GraphFormat.SVG).splitlines() == ["<svg>", 'graph "demo" {']


def test_svg_without_graphviz_is_an_error_with_a_way_out(
    lab: ResolvedLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(CommandError, match="dot: not found") as caught:
        graph(lab, GraphFormat.SVG)

    assert "mermaid" in str(caught.value.hint)


# -- ssh -------------------------------------------------------------------------------------------------------------


def test_ssh_goes_through_the_agent_with_the_folders_of_now(lab: ResolvedLab, places: Path) -> None:
    options = ssh_arguments(lab.guests["ann"], LabState("demo"))

    words = shlex.split(options["ProxyCommand"].replace("%%", "%"))
    assert words[0] == "env"
    assert f"ORCHESTRATOR_STATE={places}/state" in words
    assert words[words.index(sys.executable) :] == [
        sys.executable, "-m", "orchestrator", "connect", "--lab", "demo", "ann", "22",
    ]  # fmt: skip
    assert options["IdentityFile"] == f"{places}/state/labs/demo/ssh_key"


def test_ssh_without_moved_folders_needs_no_environment(lab: ResolvedLab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATE", "CACHE", "RUN"):
        monkeypatch.delenv(f"ORCHESTRATOR_{name}")

    assert ssh_arguments(lab.guests["ann"], LabState("demo"))["ProxyCommand"].startswith(sys.executable)


def ssh_sees(config: str, name: str, tmp_path: Path) -> dict[str, str]:
    """The options that ssh itself reads from ``config`` for the host ``name``."""
    file = tmp_path / "ssh_config"
    file.write_text(config)
    done = subprocess.run(["ssh", "-G", "-F", file, name], capture_output=True, text=True, check=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


@needs_ssh
@pytest.mark.parametrize("name", ["ann", "demo.ann"])
def test_ssh_reads_the_config_that_we_write(lab: ResolvedLab, tmp_path: Path, name: str) -> None:
    state = LabState("demo")

    seen = ssh_sees(ssh_config(lab, state, {}), name, tmp_path)

    assert seen["user"] == "root"
    assert seen["identityfile"] == str(state.ssh_key)
    assert seen["userknownhostsfile"] == str(state.known_hosts)
    assert seen["proxycommand"].endswith("connect --lab demo ann 22")
    assert seen["hostkeyalias"] == "demo.ann"
    assert seen["stricthostkeychecking"] == "accept-new"


@needs_ssh
@pytest.mark.parametrize("folder", ["my labs", "100%d"])
def test_ssh_reads_paths_with_odd_characters(
    lab: ResolvedLab, tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STATE", str(tmp_path / folder))
    state = LabState("demo")

    seen = ssh_sees(ssh_config(lab, state, {}), "ann", tmp_path)

    assert seen["identityfile"].replace("%%", "%") == str(state.ssh_key)
    assert "%d/" not in seen["identityfile"].replace("%%d", "")


@needs_ssh
def test_ssh_config_leaves_other_hosts_alone(lab: ResolvedLab, tmp_path: Path) -> None:
    seen = ssh_sees(ssh_config(lab, LabState("demo"), {}), "elsewhere", tmp_path)

    assert "proxycommand" not in seen


def test_ssh_config_has_the_hosts_that_ssh_reaches(tmp_path: Path) -> None:
    host = {"kind": "ssh", "address": "192.0.2.7", "underlay": "192.0.2.7", "user": "me", "known_hosts": "/known"}
    lab = resolved({"lab": "far", "hosts": {"web-1": host, "here": {}}})

    text = ssh_config(lab, LabState("far"), reached_by_ssh(lab))

    seen = ssh_sees(text, "web-1", tmp_path)
    assert (seen["hostname"], seen["user"], seen["userknownhostsfile"]) == ("192.0.2.7", "me", "/known")
    assert "Host here" not in text


# -- inventory -------------------------------------------------------------------------------------------------------


def test_inventory_has_hosts_and_guests_by_host(lab: ResolvedLab) -> None:
    groups = inventory(lab, LabState("demo"), {})["all"]["children"]

    assert groups["lab_hosts"]["hosts"] == {
        "alpha": {"ansible_connection": "local"},
        "beta": {"ansible_connection": "local"},
    }
    members = groups["guests"]["children"]
    assert {name: list(group["hosts"]) for name, group in members.items()} == {
        "guests_on_alpha": ["ann", "bob"],
        "guests_on_beta": ["eve", "dan"],
    }
    ann = members["guests_on_alpha"]["hosts"]["ann"]
    assert ann["ansible_user"] == "root"
    assert ann["addresses"] == ["10.10.0.2", "fd10::2"]
    words = shlex.split(ann["ansible_ssh_common_args"])
    assert "StrictHostKeyChecking=accept-new" in words
    assert any(word.startswith("ProxyCommand=env ") and word.endswith("connect --lab demo ann 22") for word in words)


def test_inventory_has_the_settings_of_ssh_hosts() -> None:
    host = {
        "kind": "ssh", "address": "192.0.2.7", "underlay": "192.0.2.7", "port": 2222, "user": "me", "key": "/keys/me",
        "jump": "gate.example",
    }  # fmt: skip

    lab = resolved({"lab": "far", "hosts": {"web-1": host}})
    made = inventory(lab, LabState("far"), reached_by_ssh(lab))

    groups = made["all"]["children"]
    assert groups["lab_hosts"]["hosts"]["web-1"] == {
        "ansible_host": "192.0.2.7",
        "ansible_port": 2222,
        "ansible_user": "me",
        "ansible_ssh_private_key_file": "/keys/me",
        "ansible_ssh_common_args": "-o ProxyJump=gate.example",
    }
    assert list(groups["guests"]["children"]) == ["guests_on_web_1"]
    assert json.loads(json.dumps(made)) == made
