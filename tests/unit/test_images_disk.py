"""Overlays, empty disks and seeds."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.images import disk

SEED = ("instance-id: a\n", "#cloud-config\n", "version: 2\n")


def listing(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    with path.open("wb") as file:
        file.truncate(4 << 20)
    return path


def test_an_overlay_lies_on_its_base_with_the_format_written_down(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "o.qcow2"
    before = base.stat()
    disk.create_overlay(base, "raw", target, 8 << 20)
    about = disk.info(target)
    assert about["virtual-size"] == 8 << 20
    assert about["backing-filename-format"] == "raw"
    assert disk.backing_file(target) == base
    assert (base.stat().st_mtime_ns, base.stat().st_size) == (before.st_mtime_ns, before.st_size)


def test_an_overlay_has_the_size_of_its_base_by_default(base: Path, tmp_path: Path) -> None:
    disk.create_overlay(base, "raw", tmp_path / "o.qcow2", None)
    assert disk.info(tmp_path / "o.qcow2")["virtual-size"] == 4 << 20


def test_an_overlay_smaller_than_its_base_returns_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="a disk of 1M is smaller than its image") as caught:
        disk.create_overlay(base, "raw", tmp_path / "o.qcow2", 1 << 20)
    assert "4M" in str(caught.value.hint)
    assert listing(tmp_path) == ["base.raw"]


def test_a_missing_base_returns_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"base\.raw"):
        disk.create_overlay(tmp_path / "base.raw", "raw", tmp_path / "o.qcow2", None)
    assert listing(tmp_path) == []


def test_a_wrong_format_of_the_base_leaves_nothing(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        disk.create_overlay(base, "qcow2", tmp_path / "o.qcow2", None)
    assert str(caught.value.command).startswith("qemu-img create")
    assert listing(tmp_path) == ["base.raw"]


def test_an_empty_disk_stands_alone(tmp_path: Path) -> None:
    disk.create_empty(tmp_path / "d.qcow2", 16 << 20)
    assert disk.info(tmp_path / "d.qcow2")["format"] == "qcow2"
    assert disk.backing_file(tmp_path / "d.qcow2") is None


def test_a_name_with_braces_and_spaces_works(tmp_path: Path) -> None:
    disk.create_empty(tmp_path / "a {} b.qcow2", 1 << 20)
    assert listing(tmp_path) == ["a {} b.qcow2"]


def test_a_seed_has_the_label_and_the_files(tmp_path: Path) -> None:
    target = tmp_path / "seed.iso"
    disk.create_seed(target, *SEED)
    assert target.read_bytes()[32808:32814] == b"CIDATA"
    assert target.stat().st_mode & 0o777 == 0o644
    for name, text in zip(("meta-data", "user-data", "network-config"), SEED, strict=True):
        out = tmp_path / "out" / name
        command = ["xorriso", "-osirrox", "on", "-indev", str(target), "-extract", f"/{name}", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        assert out.read_text() == text


def test_the_same_seed_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        disk.create_seed(tmp_path / name, *SEED)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_new_seed_takes_the_place_of_the_old(tmp_path: Path) -> None:
    disk.create_seed(tmp_path / "a", *SEED)
    old = (tmp_path / "a").read_bytes()
    disk.create_seed(tmp_path / "a", "instance-id: b\n", *SEED[1:])
    assert (tmp_path / "a").read_bytes() != old
    assert listing(tmp_path) == ["a"]
