"""Boxes: what is in one, which there are, which go."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import subprocess
import tarfile
from pathlib import Path

import libvirt
import pytest

from orchestrator import boxes
from orchestrator.hosts import libvirtd, vagrantcli
from orchestrator.hosts.vagrantcli import Project
from orchestrator.images import store
from orchestrator.images.store import Image


@pytest.fixture
def image(tmp_path: Path) -> Image:
    folder = tmp_path / "image"
    folder.mkdir()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "disk", "2500M"], check=True)
    return Image(
        id="labhost-1",
        name="labhost",
        source="s",
        kernel=None,
        initrd=None,
        disk=folder / "disk",
        disk_format="qcow2",
        cmdline="",
        cloud_init=False,
        ready="none",
        created="2026-01-01",
        size=5 << 20,
    )


def test_box_has_the_disk_and_says_its_size_in_whole_gigabytes(image: Image, tmp_path: Path) -> None:
    with tarfile.open(boxes._pack(image, tmp_path)) as tar:
        metadata = tar.extractfile("metadata.json")
        assert metadata
        said = json.loads(metadata.read())
        names = tar.getnames()

    assert said == {"provider": "libvirt", "format": "qcow2", "virtual_size": 3}
    assert names == ["metadata.json", "box.img"]


def test_boxes_are_joined_with_their_images_and_pruned(
    image: Image, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ["orchestrator/labhost-0", "orchestrator/labhost-1", "debian/bookworm64"]
    removed: list[str] = []
    monkeypatch.setattr(vagrantcli, "list_boxes", lambda: known)
    monkeypatch.setattr(vagrantcli, "remove_box", removed.append)
    monkeypatch.setattr(store, "all_images", lambda: [image])
    monkeypatch.setattr(store, "remove", lambda image: removed.append(image.id))
    monkeypatch.setattr(libvirtd, "session", contextlib.nullcontext)
    monkeypatch.setattr(libvirtd, "remove_volumes", lambda prefix, keep: removed.extend([prefix, *keep]))
    Project("two").describe({}, "alpha", {"box": "orchestrator/labhost-1"})

    found = {box.name: (box.image, box.known, box.size) for box in boxes.all_boxes()}
    boxes.prune(boxes.in_use())

    assert found == {
        "orchestrator/labhost-1": ("labhost-1", True, 5 << 20),
        "orchestrator/labhost-0": (None, True, 0),
    }
    assert removed == [
        "orchestrator/labhost-0",
        "orchestrator-VAGRANTSLASH-labhost-",
        "orchestrator-VAGRANTSLASH-labhost-1_vagrant_box_image_",
    ]


def test_copies_that_disks_lie_on_stay_in_libvirts_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvirtd, "connect", lambda: libvirt.open("test:///default"))
    with contextlib.closing(libvirt.open("test:///default")) as conn:  # what is made lives as long as this
        pool = conn.storagePoolLookupByName("default-pool")

        def make(name: str, below: libvirt.virStorageVol | None = None) -> libvirt.virStorageVol:
            backing = f"<backingStore><path>{below.path()}</path></backingStore>" if below else ""
            return pool.createXML(f"<volume><name>{name}</name><capacity>4096</capacity>{backing}</volume>")

        make("machine", make("box-used"))
        make("box-unused")
        make("box-kept")

        libvirtd.remove_volumes("box-", keep=["box-k"])

        assert sorted(volume.name() for volume in pool.listAllVolumes()) == ["box-kept", "box-used", "machine"]
