"""The accelerator probe with stand-ins for QEMU."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import HostError
from orchestrator.hosts import accel
from orchestrator.hosts.accel import Verdict, choose, probe

ABORTS = "echo 'emulator: error: failed to set MSR 0x10a' >&2; kill -ABRT $$"
RUNS = "exit 33"

MakeEmulator = Callable[..., str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, a /dev/kvm that opens, and QEMU that runs as the caller."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accel, "KVM", device)
    monkeypatch.setattr(accel, "emulator_user", lambda: None)
    return tmp_path


@pytest.fixture
def emulator(place: Path) -> MakeEmulator:
    """Make a program that does one thing under TCG and another under KVM, and notes each run."""

    def make(*, tcg: str = RUNS, kvm: str = RUNS) -> str:
        program = place / "emulator"
        lines = ["#!/bin/sh", f"echo run >> {place}/runs", f'case "$*" in *"-accel kvm"*) {kvm};; *) {tcg};; esac']
        program.write_text("\n".join(lines) + "\n")
        program.chmod(0o755)
        return str(program)

    return make


def runs(place: Path) -> int:
    return len((place / "runs").read_text().splitlines())


def test_kvm_that_runs_a_guest_is_chosen(emulator: MakeEmulator) -> None:
    program = emulator()

    verdict = probe(program)

    assert (verdict.kind, verdict.works, verdict.emulator) == ("kvm", True, program)
    assert verdict.reason == f"KVM runs a guest ({verdict.seconds:.2f} s)"
    assert choose("kvm", program) == choose("auto", program) == ("kvm", verdict.reason)


@pytest.mark.parametrize(
    ("kvm", "words"),
    [
        (ABORTS, "QEMU was ended by SIGABRT: failed to set MSR 0x10a"),
        ("exit 1", "QEMU failed with exit status 1"),
        ("exit 0", "the guest stopped before its end"),
        ("exec sleep 60", "did not end within"),
    ],
)
def test_kvm_that_does_not_run_a_guest_gives_tcg_and_the_reason(emulator: MakeEmulator, kvm: str, words: str) -> None:
    verdict = probe(emulator(kvm=kvm))

    assert (verdict.kind, verdict.works) == ("tcg", True)
    assert verdict.reason.startswith("KVM does not run a guest here: ")
    assert words in verdict.reason
    assert verdict.reason.endswith("; guests run under TCG, slower")


def test_kvm_slower_than_emulation_is_not_chosen(emulator: MakeEmulator) -> None:
    verdict = probe(emulator(kvm="sleep 2; exit 33"))

    assert verdict.kind == "tcg"


def test_a_machine_without_kvm_gives_tcg(emulator: MakeEmulator, place: Path) -> None:
    (place / "kvm").unlink()

    verdict = probe(emulator())

    assert verdict.kind == "tcg"
    assert f"there is no {place}/kvm" in verdict.reason
    assert runs(place) == 1


def test_kvm_alone_is_enough(emulator: MakeEmulator) -> None:
    assert probe(emulator(tcg="exit 1")).kind == "kvm"


def test_kvm_that_the_emulators_user_may_not_open_is_not_chosen(
    emulator: MakeEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "emulator_user", lambda: "somebody")
    monkeypatch.setattr(accel, "allowed", lambda path, mode, user: user is None)

    verdict = probe(emulator())

    assert verdict.kind == "tcg"
    assert "KVM runs a guest" in verdict.reason
    assert "somebody, as whom libvirt runs QEMU, may not open" in verdict.reason


def test_nothing_that_runs_a_guest_is_false_and_not_kept(emulator: MakeEmulator, place: Path) -> None:
    program = emulator(tcg="exit 1", kvm=ABORTS)

    first, _ = probe(program), probe(program)

    assert (first.kind, first.works, first.seconds) == ("tcg", False, None)
    assert "TCG does not run one either: QEMU failed with exit status 1" in first.reason
    assert runs(place) == 4


def test_no_emulator_cannot_be_told() -> None:
    assert probe("no-such-emulator") == Verdict(
        "tcg", None, "no-such-emulator is not installed", None, "no-such-emulator"
    )


def test_a_verdict_is_kept_until_something_changes(emulator: MakeEmulator, place: Path) -> None:
    program = emulator()
    first = probe(program)
    assert probe(program) == first
    assert runs(place) == 2

    probe(program, fresh=True)
    assert runs(place) == 4

    os.utime(program, (1, 1))
    probe(program)
    assert runs(place) == 6

    (place / "kvm").chmod(0o640)
    probe(program)
    assert runs(place) == 8


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"kind": "kvm"}', '{"kind":"xen","works":1,"reason":"","seconds":1,"emulator":""}']
)
def test_a_damaged_verdict_is_ignored(emulator: MakeEmulator, place: Path, damage: str) -> None:
    program = emulator()
    probe(program)
    (kept,) = (place / "cache" / "probes").glob("*.json")
    kept.write_text(damage)

    assert probe(program).kind == "kvm"
    assert runs(place) == 4
    assert kept.read_text() != damage


def test_concurrent_callers_probe_once(emulator: MakeEmulator, place: Path) -> None:
    program = emulator()
    verdicts: list[Verdict] = []
    threads = [threading.Thread(target=lambda: verdicts.append(probe(program))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(verdicts)) == 1
    assert runs(place) == 2


def test_a_cache_that_cannot_be_written_costs_time_only(
    emulator: MakeEmulator, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").touch()
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(place / "file" / "below"))
    program = emulator()

    assert probe(program).kind == probe(program).kind == "kvm"
    assert runs(place) == 4


def test_demanding_kvm_that_does_not_work_is_an_error_with_a_hint(emulator: MakeEmulator) -> None:
    with pytest.raises(HostError, match="failed to set MSR") as caught:
        choose("kvm", emulator(kvm=ABORTS))

    assert "accel: auto" in str(caught.value.hint)


def test_demanding_tcg_probes_nothing(emulator: MakeEmulator, place: Path) -> None:
    assert choose("tcg", emulator())[0] == "tcg"
    assert not (place / "runs").exists()
