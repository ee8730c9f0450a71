"""The table of probes, the checkup, and what probes conclude from what they see."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import pytest

import orchestrator.doctor
from orchestrator.doctor import Finding, __main__, checkup, kernel, list_probes, machine, network, table, virt
from orchestrator.doctor.model import Probe, bad, good
from orchestrator.doctor.table import PROBES
from orchestrator.errors import CommandError, NotFoundError
from orchestrator.hosts import accel


def use(monkeypatch: pytest.MonkeyPatch, *probes: Probe) -> None:
    monkeypatch.setattr(table, "PROBES", probes)
    monkeypatch.setattr(__main__, "PROBES", probes)


# -- the table and the checkup ---------------------------------------------------------------------------------------


def test_the_public_face() -> None:
    assert set(orchestrator.doctor.__all__) == {
        "Finding", "Leftover", "checkup", "clean", "leftovers", "list_probes",
    }  # fmt: skip


def test_every_probe_has_a_name_and_one_line_about_it() -> None:
    assert len({probe.name for probe in PROBES}) == len(PROBES)
    for probe in PROBES:
        assert probe.name.islower()
        assert 0 < len(probe.about) < 60
        assert probe.seconds > 0
    assert ("memfd", "shared, sealed memory") in list_probes()


def test_a_finding_survives_json() -> None:
    finding = Finding("tap", False, "no tap", "run as root", ["one", "two"])

    assert Finding.from_json(json.loads(json.dumps(finding.to_json()))) == finding


def test_only_the_named_probes_run_in_the_tables_order(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, *(Probe(name, "", lambda: good("fine")) for name in "abc"))

    assert [finding.name for finding in checkup(only=["c", "a"])] == ["a", "c"]
    assert [finding.name for finding in checkup()] == ["a", "b", "c"]


def test_an_unknown_probe_is_an_error_that_names_the_others() -> None:
    with pytest.raises(NotFoundError, match="no probe is called nonsense") as caught:
        checkup(only=["nonsense", "memory"])

    assert "userfaultfd" in str(caught.value.hint)


def test_a_probe_that_raises_cannot_tell_and_spares_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> Finding:
        raise KeyError("CapEff")

    def fails() -> Finding:
        raise CommandError("ip failed", hint="install iproute2", tail=["ip: bad"])

    use(monkeypatch, Probe("a", "", breaks), Probe("b", "", fails), Probe("c", "", lambda: good("fine")))

    assert checkup() == [
        Finding("a", None, "cannot be told: KeyError: 'CapEff'"),
        Finding("b", None, "cannot be told: ip failed", "install iproute2", ["ip: bad"]),
        Finding("c", True, "fine"),
    ]


def test_probes_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    meeting = threading.Barrier(2, timeout=20)

    def meet() -> Finding:
        meeting.wait()
        return good("met")

    use(monkeypatch, Probe("a", "", meet), Probe("b", "", meet))

    assert [finding.summary for finding in checkup()] == ["met", "met"]


def test_an_isolated_probe_runs_in_another_process() -> None:
    (apart,) = checkup(only=["disk"])

    assert apart.name == "disk"
    assert apart.ok is not None


def test_an_isolated_probe_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = next(probe for probe in PROBES if probe.name == "libvirt")

    finding = table.examine(Probe(probe.name, "", probe.look, isolated=True, seconds=0.01))

    assert finding.ok is None
    assert "did not end within" in finding.summary


def test_the_module_prints_text_and_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use(monkeypatch, Probe("a", "", lambda: good("fine", "more")), Probe("b", "", lambda: bad("broken", "mend it")))

    assert __main__.main([]) == 1
    assert capsys.readouterr().out.split() == ["ok", "a", "fine", "more", "FAIL", "b", "broken", "→", "mend", "it"]
    assert __main__.main(["--json", "a"]) == 0
    assert json.loads(capsys.readouterr().out) == [Finding("a", True, "fine", None, ["more"]).to_json()]
    with pytest.raises(SystemExit):
        __main__.main(["nonsense"])
    assert "no probe is called nonsense" in capsys.readouterr().err


# -- kernel ----------------------------------------------------------------------------------------------------------


def test_memfd_works_without_privileges() -> None:
    assert kernel.memfd().ok


@pytest.mark.parametrize("probe", [kernel.userfaultfd, kernel.bpf])
def test_an_unknown_architecture_is_no_crash(probe: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_SYSCALLS", {})

    assert callable(probe)
    assert probe().ok is not True


# -- firewall --------------------------------------------------------------------------------------------------------

IPTABLES = """*nat
:FORWARD DROP [0:0]
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD {} [0:0]
COMMIT
"""
NFT = """table ip filter {{
  chain FORWARD {{
    type filter hook {} priority filter; policy {};
  }}
}}
"""


@pytest.mark.parametrize(
    ("rules", "drops"),
    [
        ("", False),
        (IPTABLES.format("ACCEPT"), False),
        (IPTABLES.format("DROP"), True),
        (NFT.format("forward", "accept"), False),
        (NFT.format("input", "drop"), False),
        (NFT.format("forward", "drop"), True),
    ],
)
def test_the_forward_policy_is_found(rules: str, drops: bool) -> None:
    assert network.drops_forwarded(rules) is drops


@pytest.mark.parametrize(
    ("switch", "rules", "ok"),
    [
        (None, IPTABLES.format("DROP"), True),
        ("0", IPTABLES.format("DROP"), True),
        ("1", IPTABLES.format("ACCEPT"), True),
        ("1", IPTABLES.format("DROP"), False),
        ("1", None, None),
    ],
)
def test_a_dropping_firewall_matters_only_where_bridged_frames_pass_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: str | None, rules: str | None, ok: bool | None
) -> None:
    (tmp_path / "bridge").mkdir()
    if switch:
        (tmp_path / "bridge" / "bridge-nf-call-iptables").write_text(switch + "\n")
    monkeypatch.setattr(network, "_SYSCTL", tmp_path)
    monkeypatch.setattr(network, "_rules", lambda: rules)

    finding = network.firewall()

    assert finding.ok is ok
    assert (finding.fix is None) is (ok is True)


# -- machine ---------------------------------------------------------------------------------------------------------


def test_lacking_capabilities_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_status", lambda file: {"CapEff": "0000000000080000"})

    finding = machine.rights()

    assert finding.ok is False
    assert "cap_net_admin" in finding.summary
    assert "cap_sys_ptrace" not in finding.summary


@pytest.mark.parametrize(("available", "ok"), [(1 << 21, True), (1 << 19, False)])
def test_too_little_memory_is_told(monkeypatch: pytest.MonkeyPatch, available: int, ok: bool) -> None:
    facts = {"MemAvailable": f"{available} kB", "MemTotal": "4194304 kB"}
    monkeypatch.setattr(machine, "_status", lambda file: facts)

    finding = machine.memory()

    assert finding.ok is ok
    assert "of 4.0 GiB" in finding.summary


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "not" / "there" / "yet"))
    monkeypatch.setenv("ORCHESTRATOR_STATE", str(tmp_path))
    assert "free" in machine.disk().detail[0]

    monkeypatch.setattr(machine, "DISK_WANTED", 1 << 60)
    finding = machine.disk()

    assert finding.ok is False
    assert "ORCHESTRATOR_CACHE" in str(finding.fix)
    assert "ORCHESTRATOR_STATE" in str(finding.fix)


def test_a_clock_of_the_past_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.time, "gmtime", lambda: time.struct_time((1970, 1, 1, 0, 0, 0, 3, 1, 0)))

    assert machine.clock().summary == "the clock says it is 1970"


def test_a_clock_that_jumps_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([100.0, 50.0, 103.0, 50.2])
    monkeypatch.setattr(machine.time, "clock_gettime", lambda clock: next(readings))

    finding = machine.clock()

    assert finding.ok is False
    assert "jumped by 2.80 s" in finding.summary


def test_too_few_open_files_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))

    finding = machine.limits()

    assert finding.ok is False
    assert "1024 files" in finding.summary


def test_recent_denials_about_qemu_are_found() -> None:
    now = int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6)
    denied = 'apparmor="DENIED" operation="open" profile="libvirt-1234" name="/x" comm="qemu-system-x86"'
    records = [
        f"6,1,{now},-;{denied}\n SUBSYSTEM=x",
        f'6,2,{now},-;audit: avc:  denied  {{ read }} for comm="qemu-kvm"',
        f"6,3,{now - int(2 * machine.RECENT_SECONDS * 1e6)},-;{denied} long ago",
        f'6,4,{now},-;apparmor="DENIED" profile="/usr/sbin/cupsd"',
        f'6,5,{now},-;apparmor="ALLOWED" profile="libvirt-1234"',
        "",
        "6,6,nonsense",
        f"6,7,,-;{denied}",
    ]

    assert machine.denials(iter(records)) == [denied, 'audit: avc:  denied  { read } for comm="qemu-kvm"']


@pytest.mark.parametrize(("refused", "ok"), [(True, False), (False, True)])
def test_refusals_count_where_a_security_module_is_active(
    monkeypatch: pytest.MonkeyPatch, refused: bool, ok: bool
) -> None:
    now = int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6)
    log = [f'6,1,{now},-;apparmor="DENIED" profile="libvirt-1"'] if refused else []
    monkeypatch.setattr(machine, "_read", lambda file: "Y" if "apparmor" in file else None)
    monkeypatch.setattr(machine, "_kernel_log", lambda: iter(log))

    finding = machine.confinement()

    assert finding.ok is ok
    assert finding.summary.startswith("AppArmor")


def test_a_kernel_log_that_cannot_be_read_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(machine, "_read", lambda file: "1" if "selinux" in file else None)
    monkeypatch.setattr(machine, "_kernel_log", forbidden)

    assert machine.confinement().ok is None


# -- what runs guests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "exists", "words"),
    [
        (["svm"], False, "modprobe kvm_amd"),
        (["vmx", "hypervisor"], False, "modprobe kvm_intel"),
        (["hypervisor"], False, "nested virtualization"),
        (["hypervisor"], True, "nested virtualization"),
        ([], False, "firmware"),
        (["svm"], True, "dmesg"),
    ],
)
def test_the_fix_for_kvm_fits_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], exists: bool, words: str
) -> None:
    device = tmp_path / "kvm"
    if exists:
        device.touch()
    monkeypatch.setattr(virt, "KVM", device)

    assert words in virt.kvm_fix(flags)


@pytest.mark.parametrize(
    ("kind", "works", "ok", "has_fix"),
    [("kvm", True, True, False), ("tcg", True, True, True), ("tcg", False, False, True), ("tcg", None, False, True)],
)
def test_an_accelerator_is_wanted_and_kvm_is_better(
    monkeypatch: pytest.MonkeyPatch, kind: str, works: bool | None, ok: bool, has_fix: bool
) -> None:
    verdict = accel.Verdict("kvm" if kind == "kvm" else "tcg", works, "because", 0.1, "qemu")
    monkeypatch.setattr(accel, "probe", lambda fresh: verdict)

    finding = virt.accelerator()

    assert (finding.ok, finding.summary, finding.fix is not None) == (ok, "because", has_fix)


def fake_qemu(folder: Path, version: str, devices: str) -> str:
    program = folder / "qemu"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f"*--version*) echo 'QEMU emulator version {version} (Debian)';;\n"
        "*accel*) printf 'Accelerators supported in QEMU binary:\\ntcg\\n';;\n"
        f"*) echo '{devices}';;\n"
        "esac\n"
    )
    program.chmod(0o755)
    return str(program)


ALL = " ".join(word for kind in virt._NEEDED.values() for word in kind)


@pytest.mark.parametrize(
    ("version", "devices", "ok", "words"),
    [
        ("7.2.0", ALL, True, "QEMU 7.2.0 has all"),
        ("10.0.2", ALL, True, "QEMU 10.0.2 has all"),
        ("6.2.0", ALL, False, "too old"),
        ("8.0.0", ALL.replace("virtio-net-pci", "virtio-net-pci-old"), False, "lacks virtio-net-pci"),
        ("unknown", ALL, None, "does not tell its version"),
    ],
)
def test_qemu_is_judged_by_version_and_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, devices: str, ok: bool | None, words: str
) -> None:
    monkeypatch.setattr(virt, "DEFAULT_EMULATOR", fake_qemu(tmp_path, version, devices))

    finding = virt.qemu()

    assert finding.ok is ok
    assert words in finding.summary


def test_a_missing_qemu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virt, "DEFAULT_EMULATOR", "no-such-qemu")

    assert virt.qemu() == bad("no-such-qemu is not installed", virt._INSTALL_QEMU)


def test_the_folder_that_stops_qemu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STATE", str(tmp_path / "closed" / "state"))
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(accel, "emulator_user", lambda: "somebody")
    monkeypatch.setattr(accel, "allowed", lambda path, mode, user: path.name != "closed")

    finding = virt.emulator_rights()

    assert finding.ok is False
    assert finding.summary.endswith(f"cannot enter {tmp_path}/closed")
    assert str(finding.fix).startswith(f"chmod o+x {tmp_path}/closed")


def test_qemu_that_runs_as_the_caller_needs_no_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "emulator_user", lambda: None)

    assert virt.emulator_rights().ok


def test_nearest_existing_folder(tmp_path: Path) -> None:
    assert machine.existing(tmp_path / "a" / "b") == tmp_path
    assert machine.existing(Path(os.sep)) == Path(os.sep)
