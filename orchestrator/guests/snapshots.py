"""Snapshots of a guest: its memory and its disks at one moment.

libvirt's own snapshots need a qcow2 disk to put the memory in, and guests here may have no disk at all. So a snapshot
is libvirt's *save* of the memory into a file, and a qcow2-internal snapshot of each disk taken while the guest does
not run. Saving stops the guest for as long as writing its memory takes; then it goes on.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import libvirt

from orchestrator.errors import GuestError, NotFoundError, StateError
from orchestrator.guests import consolelog
from orchestrator.guests.domain import SEED_DISK, DomainView
from orchestrator.images import disk
from orchestrator.paths import make_dir, write_atomic
from orchestrator.run import run

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")


@dataclass(frozen=True)
class Snapshot:
    """``created`` in seconds since the epoch, ``size`` of the memory file in bytes."""

    name: str
    created: float
    size: int
    disks: list[str]
    nics: list[str]
    description: str
    tag: str
    """Name of the snapshot inside the disks. Never used twice: a disk keeps it when a guest that runs deletes its
    snapshot. Never a number: qemu-img would take that for a position."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _folder(guest_folder: Path, name: str) -> Path:
    if not NAME.match(name):
        raise GuestError(f"{name!r} is no name for a snapshot", hint="letters, digits, dots, dashes; at most 63")
    return guest_folder / "snapshots" / name


def _disk_files(guest_folder: Path, view: DomainView) -> list[Path]:
    return [
        guest_folder / ("root.qcow2" if serial == "root" else f"disk-{serial}.qcow2")
        for serial in view.disks
        if serial != SEED_DISK
    ]


def list_all(guest_folder: Path) -> list[Snapshot]:
    """Oldest first; what is not complete does not count."""
    found = []
    for manifest in (guest_folder / "snapshots").glob("*/snapshot.json"):
        try:
            data = json.loads(manifest.read_text())
            found.append(Snapshot(**data | {"created": float(data["created"])}))
        except (ValueError, TypeError, KeyError, OSError):
            continue
    return sorted(found, key=lambda snapshot: snapshot.created)


def get(guest_folder: Path, name: str) -> Snapshot:
    """:raise NotFoundError: there is no such snapshot."""
    folder = _folder(guest_folder, name)
    for snapshot in list_all(guest_folder):
        if snapshot.name == name and (folder / "memory").exists():
            return snapshot
    have = ", ".join(snapshot.name for snapshot in list_all(guest_folder)) or "none"
    raise NotFoundError(f"there is no snapshot {name}; there is: {have}")


def save(
    dom: libvirt.virDomain,
    view: DomainView,
    guest_folder: Path,
    name: str,
    description: str,
    progress: Callable[[str], None],
) -> Snapshot:
    """:raise StateError: there is one of that name already."""
    folder = _folder(guest_folder, name)
    if (folder / "snapshot.json").exists():
        raise StateError(f"there is a snapshot {name} already", hint="delete it first, or choose another name")
    shutil.rmtree(folder, ignore_errors=True)
    make_dir(folder)
    memory = folder / "memory"
    tag = f"orc-{uuid.uuid4().hex[:12]}"
    disks = _disk_files(guest_folder, view)
    was_paused = dom.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    conn = dom.connect()
    progress("writing its memory")
    dom.save(str(memory))
    try:
        for file in disks:
            progress(f"disk {file.stem}")
            run(["qemu-img", "snapshot", "-c", tag, file])
    finally:
        progress("going on")
        conn.restoreFlags(
            str(memory), None, libvirt.VIR_DOMAIN_SAVE_PAUSED if was_paused else libvirt.VIR_DOMAIN_SAVE_RUNNING
        )
    snapshot = Snapshot(
        name=name,
        created=time.time(),
        size=memory.stat().st_size,
        disks=[file.stem for file in disks],
        nics=view.nics,
        description=description,
        tag=tag,
    )
    write_atomic(folder / "snapshot.json", json.dumps(snapshot.to_json()))
    return snapshot


def restore(
    conn: libvirt.virConnect,
    dom: libvirt.virDomain,
    view: DomainView,
    guest_folder: Path,
    name: str,
    progress: Callable[[str], None],
) -> None:
    """Put the guest back to where it was; what it did since then is lost.

    :raise StateError: the guest has other disks now than then.
    """
    snapshot = get(guest_folder, name)
    disks = _disk_files(guest_folder, view)
    if sorted(file.stem for file in disks) != sorted(snapshot.disks):
        raise StateError(
            f"snapshot {name} was taken with the disks {', '.join(snapshot.disks) or 'none'}",
            hint="put the disks back as they were, then restore",
        )
    memory = str(_folder(guest_folder, name) / "memory")
    if sorted(snapshot.nics) != sorted(view.nics):
        raise StateError(
            f"snapshot {name} was taken with other NICs", hint="put them back as they were, then restore"
        )
    for file in disks:
        if snapshot.tag not in {inside["name"] for inside in disk.info(file).get("snapshots", [])}:
            raise StateError(f"snapshot {name} does not fit {file.stem}: that disk was made anew since then")
    if dom.isActive():
        progress("stopping it")
        dom.destroy()
    consolelog.rotate(guest_folder / "console.log")  # a panic since then is not its matter
    for file in disks:
        progress(f"disk {file.stem}")
        run(["qemu-img", "snapshot", "-a", snapshot.tag, file])
    progress("reading its memory")
    conn.restoreFlags(memory, None, libvirt.VIR_DOMAIN_SAVE_RUNNING)


def delete(dom: libvirt.virDomain, guest_folder: Path, name: str) -> None:
    """Remove the memory file; the disks' part goes too where the guest does not run, and otherwise with the guest
    (qcow2 files may not be changed under a running QEMU)."""
    snapshot = get(guest_folder, name)
    if not dom.isActive():
        for stem in snapshot.disks:
            run(["qemu-img", "snapshot", "-d", snapshot.tag, guest_folder / f"{stem}.qcow2"], check=False)
    shutil.rmtree(_folder(guest_folder, name))
