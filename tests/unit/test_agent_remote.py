"""What runs on a host for an SSH session: which libvirt an agent gets, how it is started, and after a boot."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import paths
from orchestrator.agent import remote
from orchestrator.errors import HostError
from orchestrator.hosts import agentproc
from orchestrator.hosts.agentproc import AgentPlace, Owner

pytestmark = pytest.mark.usefixtures("places")


class Starts:
    """The agents that were started, each with the command before it."""

    def __init__(self) -> None:
        self.places: list[AgentPlace] = []
        self.prefixes: list[list[str]] = []
        self.fail: set[str] = set()

    def __call__(self, place: AgentPlace, prefix: list[str]) -> None:
        if place.lab in self.fail:
            raise HostError(f"lab {place.lab}: no", tail=["because"])
        self.places.append(place)
        self.prefixes.append(prefix)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Starts:
    made = Starts()
    monkeypatch.setattr(agentproc, "start", made)
    monkeypatch.setattr(remote, "SYSTEMD", tmp_path / "no-systemd")
    return made


def call(monkeypatch: pytest.MonkeyPatch, action: str, lab: str = "demo", libvirt: str = "auto") -> None:
    options = [] if action == "boot" else [f"--lab={lab}", "--uid=0123abcd", "--host=far", f"--libvirt={libvirt}"]
    monkeypatch.setattr(sys, "argv", ["remote", action, *options])
    remote.main()


def test_choice_of_libvirt_is_made_once(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    for running in (True, False):
        monkeypatch.setattr(remote, "_system_libvirt", lambda running=running: running)
        call(monkeypatch, "start")

    assert [place.libvirt for place in starts.places] == ["system", "system"]


def test_choice_in_the_lab_file_comes_first(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_system_libvirt", lambda: True)
    call(monkeypatch, "start")
    call(monkeypatch, "start", libvirt="embed")
    call(monkeypatch, "start")

    assert [place.libvirt for place in starts.places] == ["system", "embed", "embed"]


def test_agent_gets_a_scope_of_its_own_under_systemd(
    starts: Starts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "SYSTEMD", tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    for _ in range(2):
        call(monkeypatch, "start", libvirt="embed")

    assert [prefix[:2] + prefix[-1:] for prefix in starts.prefixes] == [["systemd-run", "--quiet", "--"]] * 2
    assert starts.prefixes[0] != starts.prefixes[1]  # the scope before may still hold guests


def test_boot_starts_every_agent_as_it_was(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "start", lab="one", libvirt="system")
    call(monkeypatch, "start", lab="two", libvirt="embed")
    before = starts.places[:]
    starts.places.clear()

    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "boot")

    assert end.value.code == 0
    assert starts.places == before


def test_boot_goes_on_when_one_fails(
    starts: Starts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for lab in ("bad", "broken", "good"):
        call(monkeypatch, "start", lab=lab, libvirt="embed")
    starts.places.clear()
    starts.fail = {"bad"}
    for file in paths.state().glob(f"labs/broken/hosts/*/{remote.KEPT}"):
        file.write_text("{")

    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "boot")

    assert end.value.code == 1
    assert [place.lab for place in starts.places] == ["good"]
    said = capsys.readouterr().err
    assert "lab bad: no\nbecause" in said
    assert "broken" in said


def test_boot_of_a_host_without_labs_does_nothing(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "boot")

    assert end.value.code == 0
    assert starts.places == []


def facts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    call(monkeypatch, "facts", libvirt="embed")
    return dict(json.loads(capsys.readouterr().out))


def test_facts_say_which_toolkit_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "installed_digest", lambda: "abc")

    found = facts(monkeypatch, capsys)

    assert found["toolkit"] == "abc"
    assert (found["present"], found["agent"], found["current"]) == (False, False, False)


@pytest.mark.parametrize(("theirs", "current"), [("abc", True), ("older", False), (None, False)])
def test_agent_that_runs_other_code_is_not_current(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], theirs: str | None, current: bool
) -> None:
    monkeypatch.setattr(agentproc, "installed_digest", lambda: "abc")
    owner = Owner("0123abcd", "demo", "far", 1, "1", theirs)
    monkeypatch.setattr(agentproc, "read_owner", lambda run_dir: owner)

    assert facts(monkeypatch, capsys)["current"] is current
