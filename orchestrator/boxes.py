"""Vagrant's boxes for lab hosts: each is one ``labhost`` image, known to Vagrant by the image's id.

The image is built, kept and found like every other one (:mod:`orchestrator.images.store`), so a box depends on the
contents of what it was made from, and is never changed: a newer image is another box.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import tarfile
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from orchestrator.errors import CommandError, ImageError
from orchestrator.hosts import libvirtd, vagrantcli
from orchestrator.hosts.vagrantcli import OUR_BOXES
from orchestrator.images import disk, labhost, store
from orchestrator.images.recipe import Progress

VERSION = "1.0.0"  # Vagrant wants one; boxes are told apart by their names


@dataclass(frozen=True)
class Box:
    """A box that can be had or is there.

    :ivar name: what a Vagrantfile calls it.
    :ivar image: id of the image in the cache; None where that has gone.
    :ivar known: Vagrant has it.
    :ivar size: bytes that the image takes in the cache.
    """

    name: str
    image: str | None
    known: bool
    size: int
    created: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ensure(progress: Progress, *, refresh: bool = False) -> str:
    """Name of the box that new hosts are made from; it is built and made known to Vagrant where it must be.

    :param refresh: build it again, with the newest packages.
    :raise ImageError: it cannot be built, or Vagrant refuses it.
    """
    image = store.ensure(labhost.NAME, None, base=Path.cwd(), progress=progress, refresh=refresh)
    name = OUR_BOXES + image.id
    try:
        with store.workspace(f"box-{image.id}", progress) as folder:
            if name not in vagrantcli.list_boxes():
                progress("adding the box")
                vagrantcli.add_box(name, VERSION, _pack(image, folder))
    except CommandError as error:
        raise ImageError(
            f"box {name} could not be added: {error.message}", hint=error.hint, command=error.command, tail=error.tail
        ) from error
    return name


def _pack(image: store.Image, folder: Path) -> Path:
    """A box as Vagrant's libvirt plugin wants it: a tar file with the disk and what is said about it.

    https://vagrant-libvirt.github.io/vagrant-libvirt/boxes.html
    """
    assert image.disk is not None
    gigabytes = -(-int(disk.info(image.disk)["virtual-size"]) >> 30)
    metadata = json.dumps({"provider": "libvirt", "format": image.disk_format, "virtual_size": gigabytes}).encode()
    target = folder / "labhost.box"
    with tarfile.open(target, "w") as tar:
        entry = tarfile.TarInfo("metadata.json")
        entry.size = len(metadata)
        tar.addfile(entry, BytesIO(metadata))
        tar.add(image.disk, "box.img")
    return target


def find() -> str | None:
    """Name of the box that :func:`ensure` would give without building anything."""
    image = store.find(labhost.NAME, None, Path.cwd())
    return OUR_BOXES + image.id if image else None


def all_boxes() -> list[Box]:
    """Every box of ours, the newest first.

    :raise CommandError: Vagrant is missing or fails.
    """
    known = {name for name in vagrantcli.list_boxes() if name.startswith(f"{OUR_BOXES}{labhost.NAME}-")}
    images = {OUR_BOXES + image.id: image for image in store.all_images() if image.name == labhost.NAME}
    found = []
    for name in sorted({*known, *images}):
        image = images.get(name)
        found.append(
            Box(
                name=name,
                image=image.id if image else None,
                known=name in known,
                size=image.size if image else 0,
                created=image.created if image else "",
            )
        )
    return sorted(found, key=lambda box: box.created, reverse=True)


def in_use() -> set[str]:
    """Names of the boxes that a host of any lab was made from."""
    return {machine["box"] for project in vagrantcli.all_projects() for machine in project.described().values()}


def prune(keep: set[str]) -> list[Box]:
    """Remove every box but those in ``keep``, with their images, and the copies of boxes in libvirt's storage that no
    disk lies on; the boxes that were removed.

    :raise CommandError: Vagrant refuses.
    :raise HostError: libvirtd cannot be started.
    """
    removed = [box for box in all_boxes() if box.name not in keep]
    images = {image.id: image for image in store.all_images()}
    for box in removed:
        if box.known:
            vagrantcli.remove_box(box.name)
        if box.image in images:
            with contextlib.suppress(FileNotFoundError):  # somebody else prunes, too
                store.remove(images[box.image])
    with libvirtd.session():
        ours = f"{OUR_BOXES}{labhost.NAME}-"
        libvirtd.remove_volumes(_in_storage(ours), keep=[f"{_in_storage(name)}_vagrant_box_image_" for name in keep])
    return removed


def _in_storage(name: str) -> str:
    """How vagrant-libvirt spells a box's name, or the beginning of one, in libvirt's storage."""
    return name.replace("/", "-VAGRANTSLASH-")
