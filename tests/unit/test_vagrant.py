"""What Vagrant is told, what is understood of its answers, and which driver a host gets."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import libvirt
import pytest

from orchestrator import paths, sshkeys
from orchestrator.errors import CancelledError, CommandError, HostError
from orchestrator.hosts import accel, machinesnapshots, vagrant, vagrantcli
from orchestrator.hosts.vagrantcli import Project
from tests.unit.labs import resolved

FakeVagrant = Callable[[str], None]

LAB = {
    "lab": "two",
    "underlay": {"cidr": "10.77.0.0/22", "mtu": 1600},
    "hosts": {
        "alpha": {"kind": "vagrant", "accel": "tcg"},
        "beta": {
            "kind": "vagrant",
            "accel": "tcg",
            "vcpus": 3,
            "memory": "3G",
            "address": "10.77.0.9",
            "disks": [{"name": "data", "size": "20G"}],
        },
    },
    "networks": {"lan": {"ipv4": "10.1.0.0/24"}},
    "guests": {"ann": {"host": "alpha", "nics": ["lan"]}},
}

PRINTED = """\
Bringing machine 'alpha' up with 'libvirt' provider...
==> alpha: Uploading base box image as volume into Libvirt storage...
==> alpha: Creating image (snapshot of base box volume).
==> alpha:  -- Memory:            2048M
==> alpha: Starting domain.
==> alpha: Waiting for domain to get an IP address...
    alpha: Inserting generated public key within guest...
"""


@pytest.fixture
def fake(places: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVagrant:
    """A ``vagrant`` that is a shell script."""
    folder = places / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(script: str) -> None:
        file = folder / "vagrant"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    return write


def transport(name: str) -> vagrant.VagrantTransport:
    lab = resolved(LAB)
    return vagrant.VagrantTransport(lab, lab.hosts[name], lambda _: "orchestrator/labhost-1")


def verdict(kind: Literal["kvm", "tcg"], reason: str) -> accel.Verdict:
    return accel.Verdict(kind=kind, works=True, reason=reason, seconds=1.0, emulator="qemu-system-x86_64")


# -- which driver ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "works", "nested", "driver", "why"),
    [
        ("auto", True, True, "kvm", "can be nested"),
        ("auto", True, False, "qemu", "cannot be nested here"),
        ("auto", False, True, "qemu", "emulated: /dev/kvm is not there"),
        ("tcg", True, True, "qemu", "as the lab file says"),
        ("kvm", True, False, "kvm", "as the lab file says"),
    ],
)
def test_driver(
    monkeypatch: pytest.MonkeyPatch, wanted: str, works: bool, nested: bool, driver: str, why: str
) -> None:
    found_here = verdict("kvm", "it runs") if works else verdict("tcg", "/dev/kvm is not there; more")
    monkeypatch.setattr(accel, "probe", lambda *_: found_here)
    monkeypatch.setattr(vagrant, "_reads", lambda _file, _values: nested)

    found, reason = vagrant.choose_driver(wanted)

    assert found == driver
    assert why in reason
    assert "more" not in reason


def test_kvm_that_is_demanded_and_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "probe", lambda *_: verdict("tcg", "/dev/kvm is not there"))

    with pytest.raises(HostError, match="/dev/kvm is not there"):
        vagrant.choose_driver("kvm")


# -- what Vagrant is told --------------------------------------------------------------------------------------------


def test_description_has_all_that_the_vagrantfile_reads(places: Path) -> None:
    for name in ("alpha", "beta"):
        made = transport(name)
        made.project.describe(made._common(), name, made._description("a/box"))
    folder = paths.state() / "labs" / "two" / "vagrant"
    told = json.loads((folder / "hosts.json").read_text())
    ruby = (folder / "Vagrantfile").read_text()

    assert set(re.findall(r'lab\["(\w+)"\]', ruby)) == set(told)
    assert set(re.findall(r'host\["(\w+)"\]', ruby)) == set(told["hosts"]["alpha"]) == set(told["hosts"]["beta"])
    assert (told["network"], told["underlay_prefix"], told["mtu"]) == ("orc-two", 22, 1600)
    beta = told["hosts"]["beta"]
    assert (beta["address"], beta["vcpus"], beta["memory"]) == ("10.77.0.9", 3, 3072)
    assert beta["disks"] == [{"name": "data", "size": "20480M"}]
    assert (beta["driver"], beta["cpu_mode"], beta["box"]) == ("qemu", "maximum", "a/box")
    assert told["hosts"]["alpha"]["mark"] != beta["mark"]


def test_machine_of_our_box_is_told_the_key_that_it_lets_in(places: Path) -> None:
    ours, others = transport("alpha"), transport("beta")
    sshkeys.make(ours._key, "orchestrator-two-alpha")

    told = ours._description("orchestrator/labhost-1")["authorized_key"]

    assert re.fullmatch(r"ssh-ed25519 [\w+/=]+ orchestrator-two-alpha", told), (
        "what QEMU's option and sed take as it is"
    )
    others_told = others._description("a/box")
    assert others_told["key"] is others_told["authorized_key"] is None


def test_machine_is_taken_out_of_the_description_and_the_others_stay(places: Path) -> None:
    project = Project("two")
    project.describe({"prefix": "x"}, "alpha", {"box": "a"})
    project.describe({"prefix": "x"}, "beta", {"box": "b"})

    project.describe({"prefix": "x"}, "alpha", None)

    assert project.described() == {"beta": {"box": "b"}}
    assert [each.folder for each in vagrantcli.all_projects()] == [project.folder]


def test_folder_without_a_description_has_no_machines(places: Path) -> None:
    assert Project("two").described() == {}
    assert Project("two").machine_id("alpha") is None


# -- what Vagrant says -----------------------------------------------------------------------------------------------


def test_steps_are_told_and_details_are_not(fake: FakeVagrant, places: Path) -> None:
    fake(f"cat <<'X'\n{PRINTED}X")
    project = Project("two")
    project.describe({}, "alpha", {})
    told: list[str] = []

    project.up("alpha", told.append, None)

    assert told == [
        "waiting for another machine",
        "creating",
        "uploading base box image as volume into Libvirt storage",
        "creating image (snapshot of base box volume)",
        "starting domain",
        "waiting for domain to get an IP address",
        "inserting generated public key within guest",
    ]


def test_others_are_made_as_soon_as_one_starts(fake: FakeVagrant, places: Path) -> None:
    """Each machine waits until both have started: one that held the lock until its end would wait for ever."""
    fake(
        f"echo '==> x: Starting domain.'; touch {places}/started-$2; "
        f"until [ -e {places}/started-alpha ] && [ -e {places}/started-beta ]; do sleep 0.1; done"
    )
    project = Project("two")
    project.describe({}, "alpha", {})
    threads = [
        threading.Thread(target=project.up, args=(name, lambda _: None, None), daemon=True)
        for name in ("alpha", "beta")
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert not any(thread.is_alive() for thread in threads)


def test_failure_has_what_vagrant_said_without_the_trace_of_ruby(fake: FakeVagrant, places: Path) -> None:
    fake("echo '==> alpha: Creating image.'; echo 'No room.' >&2; echo \"  from /usr/x.rb:3:in \\`new'\" >&2; exit 3")
    project = Project("two")
    project.describe({}, "alpha", {})

    with pytest.raises(HostError) as caught:
        project.up("alpha", lambda _: None, None)

    assert caught.value.message.startswith("host alpha does not start: ")
    assert sorted(caught.value.tail) == ["==> alpha: Creating image.", "No room."]
    assert caught.value.command == f"cd {project.folder} && vagrant up alpha"


def test_vagrant_that_is_not_installed(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/sbin")
    project = Project("two")
    project.describe({}, "alpha", {})

    with pytest.raises(HostError) as caught:
        project.destroy("alpha", lambda _: None)
    with pytest.raises(CommandError) as listing:
        vagrantcli.list_boxes()

    assert caught.value.hint == listing.value.hint == "apt-get install vagrant vagrant-libvirt"


def test_vagrant_is_ended_when_it_is_given_up(fake: FakeVagrant, places: Path) -> None:
    fake(f"trap 'touch {places}/ended; exit 1' INT TERM; echo '==> x: Starting domain.'; while :; do sleep 0.1; done")
    project = Project("two")
    project.describe({}, "alpha", {})
    cancel = threading.Event()

    def said(text: str) -> None:
        if text == "starting domain":
            cancel.set()

    with pytest.raises(CancelledError):
        project.up("alpha", said, cancel)

    assert (places / "ended").exists()


def test_list_of_boxes(fake: FakeVagrant, places: Path) -> None:
    fake(
        """cat <<'X'
1,,ui,info,orchestrator/labhost-1 (libvirt%!(VAGRANT_COMMA) 1.0.0)
1,,box-name,orchestrator/labhost-1
1,,box-provider,libvirt
1,,box-version,1.0.0
1,,box-name,other/box
1,,box-provider,virtualbox
X"""
    )

    assert vagrantcli.list_boxes() == ["orchestrator/labhost-1"]


# -- the machine, with libvirt's driver for tests --------------------------------------------------------------------


@pytest.fixture
def domain() -> libvirt.virDomain:
    """A domain that runs, with 8 GiB and two processors."""
    return libvirt.open("test:///default").lookupByName("test")


def test_differences_between_file_and_machine(places: Path, domain: libvirt.virDomain) -> None:
    assert transport("beta")._differences(domain) == ["vcpus: 2 → 3", "memory: 8G → 3G"]


def test_states_in_words(domain: libvirt.virDomain) -> None:
    domain.suspend()
    paused = vagrant._state(domain)
    domain.destroy()

    assert (paused, vagrant._state(domain), vagrant._state(None)) == ("paused", "off", "missing")


def test_guests_are_paused_for_a_snapshot_of_a_machine_that_runs_emulated() -> None:
    domain = FakeDomain("qemu"), FakeDomain("kvm"), FakeDomain("qemu", active=False)

    assert [machinesnapshots.needs_guests_paused(one) for one in domain] == [True, False, False]


@dataclass
class FakeDomain:
    """What is asked of a domain; libvirt's test driver has none that is emulated."""

    kind: str
    active: bool = True

    def isActive(self) -> bool:  # noqa: N802
        return self.active

    def XMLDesc(self) -> str:  # noqa: N802
        return f"<domain type='{self.kind}'/>"


def test_snapshots_of_a_machine(domain: libvirt.virDomain) -> None:
    machinesnapshots.save("alpha", domain, "clean", paused=["ann", "bob"])
    found = machinesnapshots.listed("alpha", domain)
    with pytest.raises(Exception, match="has a snapshot clean already"):
        machinesnapshots.check_free("alpha", domain, "clean")
    domain.destroy()
    restored = machinesnapshots.restore("alpha", domain, "clean")
    machinesnapshots.delete("alpha", domain, "clean")

    assert [(one.host, one.name, one.state, one.paused) for one in found] == [
        ("alpha", "clean", "running", ("ann", "bob"))
    ]
    assert restored == ("ann", "bob")
    assert domain.isActive()
    assert machinesnapshots.listed("alpha", domain) == []
    with pytest.raises(Exception, match="no snapshot"):
        machinesnapshots.restore("alpha", domain, "clean")
