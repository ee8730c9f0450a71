"""The accelerator probe with the real QEMU."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pwd
import shutil
from pathlib import Path

import pytest

from orchestrator.hosts import accel

pytestmark = pytest.mark.privileged


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


@pytest.mark.skipif(shutil.which(accel.DEFAULT_EMULATOR) is None, reason="needs QEMU")
def test_some_accelerator_runs_the_tiny_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = accel.probe(fresh=True)
    assert verdict.works
    assert verdict.seconds is not None
    assert accel.probe() == verdict

    monkeypatch.setattr(accel, "KVM", Path("/nonexistent"))
    without = accel.probe()
    assert (without.kind, without.works) == ("tcg", True)
    assert "there is no /nonexistent" in without.reason


def test_access_is_asked_as_the_other_user(tmp_path: Path) -> None:
    # pytest's own folder is closed to others
    open_folder = Path("/tmp", f"orc-test-{tmp_path.name}-{id(tmp_path)}")
    open_folder.mkdir()
    try:
        open_folder.chmod(0o711)
        file = open_folder / "file"
        file.touch()
        file.chmod(0o644)
        nobody = pwd.getpwnam("nobody").pw_name
        assert accel.allowed(file, "r", nobody)
        assert not accel.allowed(file, "rw", nobody)
        assert not accel.allowed(open_folder, "r", nobody)
        assert accel.allowed(open_folder, "x", nobody)
        assert accel.allowed(file, "rw", None)
        open_folder.chmod(0o700)
        assert not accel.allowed(file, "r", nobody)
    finally:
        shutil.rmtree(open_folder)
