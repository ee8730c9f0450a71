"""``orchestrator host``, on hosts in memory."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML

from orchestrator.cli import app as cli_app
from orchestrator.cli import host as cli_host
from orchestrator.cli import output, session, tools
from orchestrator.cli.session import complete_hosts
from orchestrator.errors import HostError, StateError
from orchestrator.hosts.inventory import Cpu, HugePages, Inventory, Kernel, Kvm, Memory, Nic, NumaNode
from orchestrator.hosts.pci import BusMaster, PciDevice
from orchestrator.hosts.transport import HostFacts
from orchestrator.state import LabState
from orchestrator.testing import MemoryHost, MemoryLab, MemoryTransport, perfect
from tests.unit.labs import demo

PROGRAM = typer.Typer()
for module in (cli_host, tools):
    module.register(PROGRAM)

FACTS = {
    "kernel": "6.8.0",
    "cpus": 8,
    "load": 0.5,
    "memory": 32 << 30,
    "memory_available": 3 << 29,
    "disk_available": 1 << 40,
    "accel": "kvm",
    "accel_reason": "KVM runs a guest (0.10 s)",
}


def device(address: str, *, capable: bool | None, enabled: bool | None) -> PciDevice:
    return PciDevice(
        address=address,
        vendor="8086",
        device="10d3",
        class_code="020000",
        class_name="Ethernet controller",
        name="Intel 82574L [lan]",
        driver="e1000e",
        iommu_group=7,
        numa_node=None,
        bus_master=BusMaster(capable, enabled, "seen"),
    )


INVENTORY = Inventory(
    os="Debian GNU/Linux 13 (trixie)",
    cpu=Cpu("AMD \x1b[31m7", "AuthenticAMD", "x86_64", 1, 4, 8, "svm", ("svm", "npt")),
    kvm=Kvm(device=True, modules=("kvm", "kvm_amd"), nested=True, two_dimensional_paging=None),
    memory=Memory(32 << 30, 3 << 29, 0, 0, (HugePages(2 << 20, 4, 3),), "madvise"),
    numa=(NumaNode(0, "0-7", 32 << 30, (10,)),),
    pci=(
        device("0000:00:01.0", capable=True, enabled=True),
        device("0000:00:02.0", capable=True, enabled=False),
        device("0000:00:03.0", capable=None, enabled=False),
        device("0000:00:04.0", capable=False, enabled=False),
    ),
    nics=(
        Nic("eth0", "physical", "02:00:00:00:00:01", 1500, "up", ("10.0.0.1/24",), 1000, "e1000e", "0000:00:01.0"),
        Nic("lo", "loopback", None, 65536, "unknown"),
    ),
    kernel=Kernel("6.8.0", True, "v2", None, (), True, "disabled", None, {"net.ipv4.ip_forward": 1}),
).to_json()
ACCEL = {"kind": "kvm", "works": True, "reason": "KVM runs a guest", "seconds": 0.1, "emulator": "qemu"}
FINDINGS = [
    {"name": "memfd", "ok": True, "summary": "memory can be shared", "fix": None, "detail": []},
    {"name": "bpf", "ok": False, "summary": "no [bpf]", "fix": "run as root", "detail": ["BTF: there"]},
]


def add_calls(host: MemoryHost) -> None:
    """The calls that a host in memory does not have by itself."""

    def doctor(call: object, only: list[str] | None) -> list[dict[str, Any]]:
        return [finding for finding in FINDINGS if not only or finding["name"] in only]

    calls: dict[str, Callable[..., Any]] = {
        "host_facts": lambda call: dict(FACTS),
        "host_inventory": lambda call: {"accel": ACCEL, **INVENTORY},
        "host_doctor": doctor,
    }
    vars(host).update(calls)


@dataclass
class Result:
    out: str
    err: str

    def rows(self) -> list[list[str]]:
        return [line.split() for line in self.out.splitlines()]


Cli = Callable[..., Result]


@pytest.fixture
def cli(places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in an empty folder, and expect a status."""
    monkeypatch.setattr(cli_app, "app", PROGRAM)
    monkeypatch.setattr(cli_app, "_register", lambda: None)
    monkeypatch.chdir(places)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(output.stdout, "no_color", True)

    def run(*words: str, status: int = 0) -> Result:
        monkeypatch.setattr(sys, "argv", ["orchestrator", *words])
        with pytest.raises(SystemExit) as ended:
            cli_app.main()
        captured = capsys.readouterr()
        assert (ended.value.code or 0) == status, f"{words}: {captured.out}\n{captured.err}"
        return Result(captured.out, captured.err)

    return run


@pytest.fixture
def lab(places: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryLab:
    """The example, up: alpha and beta with two guests each."""
    resolved = demo()
    LabState(resolved.lab).save(resolved)
    made = MemoryLab(perfect(resolved))
    for host in made.hosts.values():
        add_calls(host)
    for module in (session, tools):
        monkeypatch.setattr(module, "open_host", lambda lab, name, *_: made.transport(lab, name))
    return made


# -- list ------------------------------------------------------------------------------------------------------------


def test_hosts_are_listed_with_what_they_have(cli: Cli, lab: MemoryLab) -> None:
    rows = cli("host", "list").rows()

    assert rows[0] == ["HOST", "KIND", "ADDRESS", "STATE", "CPUS", "MEMORY", "AVAILABLE", "ACCEL", "GUESTS"]
    assert rows[1:] == [
        ["alpha", "local", "10.213.0.2", "up", "8", "32", "GiB", "1.5", "GiB", "kvm", "2"],
        ["beta", "local", "10.213.0.3", "up", "8", "32", "GiB", "1.5", "GiB", "kvm", "2"],
    ]


def test_list_as_json_has_all_facts(cli: Cli, lab: MemoryLab) -> None:
    found = json.loads(cli("host", "list", "-o", "json").out)

    head = {"name": "beta", "kind": "local", "address": "10.213.0.3", "state": "up", "problem": None, "guests": 2}
    assert found[1] == head | FACTS
    assert YAML(typ="safe", pure=True).load(cli("host", "list", "-o", "yaml").out) == found


def test_host_that_does_not_answer_is_listed_with_the_reason_and_ends_with_4(cli: Cli, lab: MemoryLab) -> None:
    lab.host("alpha").problem = "no route to [host]"

    shown = cli("host", "list", status=4)

    assert ["alpha", "local", "10.213.0.2", "unreachable", "-", "-", "-", "-", "-"] in shown.rows()
    assert "alpha: no route to [host]" in shown.out
    assert shown.rows()[2][:4] == ["beta", "local", "10.213.0.3", "up"]
    assert json.loads(cli("host", "list", "-o", "json", status=4).out)[0]["state"] == "unreachable"


def test_host_whose_agent_fails_is_unreachable(cli: Cli, lab: MemoryLab) -> None:
    def fail(*_: object) -> None:
        raise HostError("the agent ended")

    lab.host("beta").on_call = fail

    assert "beta: the agent ended" in cli("host", "list", status=4).out


@pytest.mark.parametrize(
    ("facts", "state", "problem"),
    [
        (HostFacts(), "absent", None),
        (HostFacts(problems=("toolkit: missing",)), "absent", "toolkit: missing"),
        (HostFacts(present=True, broken=True, problems=("a", "b")), "broken", "a; b"),
    ],
)
def test_host_that_is_not_there_is_no_error(
    cli: Cli, lab: MemoryLab, facts: HostFacts, state: str, problem: str | None
) -> None:
    lab.host("beta").facts = facts

    found = json.loads(cli("host", "list", "-o", "json").out)

    assert [host["state"] for host in found] == ["up", state]
    assert found[1]["problem"] == problem


def test_missing_rights_end_the_command(cli: Cli, lab: MemoryLab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: MemoryTransport) -> HostFacts:
        raise StateError("only root can look")

    monkeypatch.setattr(MemoryTransport, "facts", refuse)

    assert "error: only root can look" in cli("host", "list", status=1).err


def test_hosts_are_asked_at_the_same_time(cli: Cli, lab: MemoryLab) -> None:
    meeting = threading.Barrier(2, timeout=20)
    for host in lab.hosts.values():
        host.on_call = lambda method, call, params: meeting.wait() if method == "host.facts" else None

    cli("host", "list")


@pytest.mark.parametrize(
    "words", [["list"], ["facts", "alpha"], ["doctor", "alpha", "--only", "memfd"]], ids=lambda words: words[0]
)
def test_agent_that_died_is_started(cli: Cli, lab: MemoryLab, words: Iterable[str]) -> None:
    lab.host("alpha").facts = HostFacts(present=True)

    cli("host", *words)

    assert lab.host("alpha").facts.agent


# -- facts -----------------------------------------------------------------------------------------------------------


def test_facts_are_shown_in_sections(cli: Cli, lab: MemoryLab) -> None:
    shown = cli("host", "facts", "alpha")

    heads = [section.split()[0] for section in re.split(r"\n\s*\n", shown.out)]
    assert heads == ["HOST", "CPU", "MEMORY", "KERNEL", "NUMA", "PCI", "NIC"]
    lines = [" ".join(words) for words in shown.rows()]
    for line in (
        "system Debian GNU/Linux 13 (trixie)",
        "accelerator kvm: KVM runs a guest",
        "sockets, cores, threads 1, 4, 8",
        "nested KVM yes",
        "nested paging -",
        "available 1.5 GiB of 32 GiB",
        "huge pages of 2 MiB free 3 of 4",
        "net.ipv4.ip_forward 1",
        "0 0-7 32 GiB 10",
        "eth0 physical up 02:00:00:00:00:01 1500 1000 Mbit/s e1000e 0000:00:01.0 10.0.0.1/24",
        "lo loopback unknown - 65536 - - - -",
    ):
        assert line in lines


def test_bus_masters_are_marked(cli: Cli, lab: MemoryLab) -> None:
    lines = [" ".join(words) for words in cli("host", "facts", "alpha").rows()]

    head = "8086:10d3 Ethernet controller e1000e 7 -"
    for address, mark in (("01", "yes"), ("02", "yes (off)"), ("03", "?"), ("04", "no")):
        assert f"0000:00:{address}.0 {head} {mark} Intel 82574L [lan]" in lines


def test_facts_reach_the_terminal_without_its_commands(cli: Cli, lab: MemoryLab) -> None:
    assert "\x1b" not in cli("host", "facts", "alpha").out


def test_facts_as_json_are_those_of_the_agent(cli: Cli, lab: MemoryLab) -> None:
    found = json.loads(cli("host", "facts", "beta", "-o", "json").out)

    head = {"name": "beta", "kind": "local", "address": "10.213.0.3", "accel": ACCEL}
    assert found == json.loads(json.dumps(head | INVENTORY))
    assert YAML(typ="safe", pure=True).load(cli("host", "facts", "beta", "-o", "yaml").out) == found


@pytest.mark.parametrize("command", ["facts", "doctor"])
def test_unknown_host_ends_with_1_and_those_that_there_are(cli: Cli, lab: MemoryLab, command: str) -> None:
    shown = cli("host", command, "gamma", status=1)

    assert shown.err.splitlines() == ["error: lab demo has no host gamma", "  hint: its hosts: alpha, beta"]


@pytest.mark.parametrize("command", ["facts", "doctor"])
def test_host_that_is_not_there_ends_with_4_and_what_makes_it(cli: Cli, lab: MemoryLab, command: str) -> None:
    lab.host("alpha").facts = HostFacts()

    shown = cli("host", command, "alpha", status=4)

    assert shown.err.splitlines() == ["error: host alpha: it is not there", "  hint: `orchestrator up` makes it"]


def test_host_that_is_broken_says_what_is(cli: Cli, lab: MemoryLab) -> None:
    lab.host("alpha").facts = HostFacts(present=True, broken=True, problems=("a namespace is missing",))

    assert "error: host alpha: a namespace is missing" in cli("host", "facts", "alpha", status=4).err


# -- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_of_a_host_is_that_of_the_local_command(cli: Cli, lab: MemoryLab) -> None:
    shown = cli("host", "doctor", "alpha", status=1)

    assert shown == cli("doctor", "alpha", status=1)
    assert shown.out.splitlines() == [
        "✓ memfd          memory can be shared",
        "✗ bpf            no [bpf]",
        "    BTF: there",
        "    fix: run as root",
    ]


def test_doctor_passes_names_of_checks_on(cli: Cli, lab: MemoryLab) -> None:
    shown = cli("host", "doctor", "alpha", "--only", "memfd", "-o", "json")

    assert json.loads(shown.out) == FINDINGS[:1]


def test_unknown_check_is_an_error_before_a_host_is_asked(cli: Cli, lab: MemoryLab) -> None:
    shown = cli("host", "doctor", "alpha", "--only", "nonsense", status=1)

    assert "error: there is no check nonsense" in shown.err
    assert lab.host("alpha").calls == []


# -- completion ------------------------------------------------------------------------------------------------------


def test_hosts_are_completed(places: Path) -> None:
    resolved = demo()
    LabState("demo").save(resolved)

    assert complete_hosts("") == ["alpha", "beta"]
    assert complete_hosts("b") == ["beta"]
    LabState("demo").save(resolved.model_copy(update={"hosts": {}}))
    assert complete_hosts("") == []


def test_completion_survives_a_damaged_state(places: Path) -> None:
    LabState("demo").save(demo())
    (LabState("demo").folder / "lab.json").write_text("{")

    assert complete_hosts("") == []


@pytest.mark.parametrize(
    ("size", "shown"),
    [(None, "-"), (0, "0 KiB"), (4 << 10, "4 KiB"), (2 << 20, "2 MiB"), (3 << 29, "1.5 GiB"), (1 << 40, "1024 GiB")],
)
def test_size_for_the_eye(size: int | None, shown: str) -> None:
    assert cli_host._size(size) == shown
