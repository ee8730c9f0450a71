"""Snapshots of a guest: names and manifests, and that memory and disks are of one moment."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest

from orchestrator.errors import CommandError, GuestError, NotFoundError, StateError
from orchestrator.guests import snapshots
from orchestrator.guests.domain import DomainView, Identity
from orchestrator.guests.snapshots import Snapshot
from orchestrator.run import run

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")

BAD_NAMES = ["", ".", "..", "../up", "a/b", "/abs", "-a", ".hidden", "a b", "a\n", "ä", "x" * 64]


def quiet(_: str) -> None:
    """Nobody listens to the progress."""


class Guest:
    """A domain in memory, and the libvirt connection that it belongs to. Its memory is a number."""

    def __init__(self, *, state: int = libvirt.VIR_DOMAIN_RUNNING) -> None:
        self.memory = "0"
        self.current = state
        self.log: list[str] = []

    def isActive(self) -> bool:  # noqa: N802 -- libvirt's name
        return self.current != libvirt.VIR_DOMAIN_SHUTOFF

    def state(self) -> list[int]:
        return [self.current, 0]

    def connect(self) -> Guest:
        return self

    def save(self, file: str) -> None:
        Path(file).write_text(self.memory)
        self.current = libvirt.VIR_DOMAIN_SHUTOFF
        self.log.append("save")

    def destroy(self) -> None:
        self.current = libvirt.VIR_DOMAIN_SHUTOFF
        self.log.append("destroy")

    def restoreFlags(self, file: str, xml: str | None, flags: int) -> None:  # noqa: N802
        self.memory = Path(file).read_text()
        paused = flags == libvirt.VIR_DOMAIN_SAVE_PAUSED
        self.current = libvirt.VIR_DOMAIN_PAUSED if paused else libvirt.VIR_DOMAIN_RUNNING
        self.log.append("restore paused" if paused else "restore")


def view(*serials: str) -> DomainView:
    return DomainView(
        name="ann",
        identity=Identity("demo", "0123abcd", "alpha"),
        wish={},
        image="tiny",
        ready="agent",
        accel="tcg",
        vcpus=1,
        memory=0,
        memory_total=0,
        nics=[],
        disks={serial: f"vd{serial[0]}" for serial in serials},
        console_path=None,
        agent_connected=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ann"


def keep(folder: Path, name: str, **changes: object) -> Snapshot:
    """A snapshot as :func:`save` leaves it, without disks."""
    place = folder / "snapshots" / name
    place.mkdir(parents=True)
    (place / "memory").write_text("0")
    data = {"name": name, "created": 1.0, "size": 1, "disks": [], "nics": [], "description": "", "tag": "orc-1"}
    data |= changes
    (place / "snapshot.json").write_text(json.dumps(data))
    return Snapshot(**data)  # type: ignore[arg-type]


# -- names and manifests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_name_is_refused_by_every_function(name: str, folder: Path) -> None:
    guest = Guest()
    calls: list[Callable[[], object]] = [
        lambda: snapshots.get(folder, name),
        lambda: snapshots.save(guest, view(), folder, name, "", quiet),
        lambda: snapshots.restore(guest, guest, view(), folder, name, quiet),
        lambda: snapshots.delete(guest, folder, name),
    ]

    for call in calls:
        with pytest.raises(GuestError, match="is no name for a snapshot"):
            call()
    assert guest.log == []
    assert not folder.exists()


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "9", "x" * 63])
def test_good_name_is_taken(name: str, folder: Path) -> None:
    assert snapshots.save(Guest(), view(), folder, name, "", quiet).name == name
    assert snapshots.get(folder, name).name == name


def test_list_is_oldest_first(folder: Path) -> None:
    newer, older = keep(folder, "a", created=2.0), keep(folder, "b", created=1.0)

    assert snapshots.list_all(folder) == [older, newer]


def test_no_snapshots_is_an_empty_list(folder: Path) -> None:
    assert snapshots.list_all(folder) == []


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "1", "{}", '{"name": "a"}', '{"nonsense": 1}'])
def test_damaged_manifest_does_not_count(content: str, folder: Path) -> None:
    good = keep(folder, "good")
    keep(folder, "bad")
    (folder / "snapshots" / "bad" / "snapshot.json").write_text(content)

    assert snapshots.list_all(folder) == [good]


def test_manifest_with_a_damaged_time_does_not_count(folder: Path) -> None:
    good = keep(folder, "good")
    keep(folder, "bad", created="yesterday")

    assert snapshots.list_all(folder) == [good]


def test_snapshot_that_is_not_complete_does_not_count(folder: Path) -> None:
    (folder / "snapshots" / "half").mkdir(parents=True)
    (folder / "snapshots" / "half" / "memory").write_text("0")

    assert snapshots.list_all(folder) == []
    with pytest.raises(NotFoundError, match="there is no snapshot half; there is: none"):
        snapshots.get(folder, "half")


def test_unknown_snapshot_is_told_with_those_that_there_are(folder: Path) -> None:
    keep(folder, "one")
    keep(folder, "two", created=2.0)

    with pytest.raises(NotFoundError, match="no snapshot three; there is: one, two"):
        snapshots.get(folder, "three")


def test_snapshot_without_its_memory_is_not_found(folder: Path) -> None:
    keep(folder, "one")
    (folder / "snapshots" / "one" / "memory").unlink()

    with pytest.raises(NotFoundError):
        snapshots.get(folder, "one")


# -- saving and restoring, without disks -----------------------------------------------------------------------------


def test_guest_goes_on_after_it_is_saved(folder: Path) -> None:
    guest = Guest()
    guest.memory = "then"

    saved = snapshots.save(guest, view(), folder, "one", "before the test", quiet)

    assert guest.log == ["save", "restore"]
    assert (saved.size, saved.disks, saved.description) == (4, [], "before the test")
    assert snapshots.list_all(folder) == [saved]


def test_paused_guest_stays_paused_when_it_is_saved(folder: Path) -> None:
    guest = Guest(state=libvirt.VIR_DOMAIN_PAUSED)

    snapshots.save(guest, view(), folder, "one", "", quiet)

    assert guest.log == ["save", "restore paused"]


def test_snapshot_of_a_name_that_is_taken_is_refused(folder: Path) -> None:
    guest = Guest()
    snapshots.save(guest, view(), folder, "one", "", quiet)

    with pytest.raises(StateError, match="there is a snapshot one already"):
        snapshots.save(guest, view(), folder, "one", "", quiet)

    assert guest.log == ["save", "restore"]


def test_what_a_broken_save_left_is_replaced(folder: Path) -> None:
    keep(folder, "one")
    (folder / "snapshots" / "one" / "snapshot.json").unlink()

    snapshots.save(Guest(), view(), folder, "one", "", quiet)

    assert [snapshot.name for snapshot in snapshots.list_all(folder)] == ["one"]


@pytest.mark.parametrize("state", [libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_SHUTOFF])
def test_restored_guest_has_its_memory_of_then(state: int, folder: Path) -> None:
    guest = Guest()
    guest.memory = "then"
    snapshots.save(guest, view(), folder, "one", "", quiet)
    guest.memory, guest.current, guest.log = "now", state, []

    snapshots.restore(guest, guest, view(), folder, "one", quiet)

    assert guest.memory == "then"
    assert guest.current == libvirt.VIR_DOMAIN_RUNNING
    assert guest.log == (["destroy", "restore"] if state == libvirt.VIR_DOMAIN_RUNNING else ["restore"])


def test_restore_with_other_disks_is_refused_and_leaves_the_guest_alone(folder: Path) -> None:
    guest = Guest()
    snapshots.save(guest, view(), folder, "one", "", quiet)
    guest.log = []

    with pytest.raises(StateError, match="taken with the disks none"):
        snapshots.restore(guest, guest, view("data"), folder, "one", quiet)

    assert guest.log == []


def test_deleted_snapshot_is_gone(folder: Path) -> None:
    guest = Guest()
    snapshots.save(guest, view(), folder, "one", "", quiet)

    snapshots.delete(guest, folder, "one")

    assert snapshots.list_all(folder) == []
    with pytest.raises(NotFoundError):
        snapshots.delete(guest, folder, "one")


# -- with disks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(folder: Path) -> Path:
    folder.mkdir()
    file = folder / "disk-data.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", file, "1M"])
    return file


def write(disk: Path, value: int) -> None:
    run(["qemu-io", "-c", f"write -P {value} 0 512", disk])


def holds(disk: Path, value: int) -> bool:
    output = run(["qemu-io", "-c", f"read -P {value} 0 512", disk], check=False).stdout
    return b"read 512/512" in output and b"verification failed" not in output


def tags(disk: Path) -> list[str]:
    found = json.loads(run(["qemu-img", "info", "--output=json", disk]).stdout)
    return [snapshot["name"] for snapshot in found.get("snapshots", [])]


@needs_qemu_img
def test_disk_is_of_the_moment_of_the_snapshot(folder: Path, disk: Path) -> None:
    guest = Guest()
    write(disk, 1)
    saved = snapshots.save(guest, view("data", "seed"), folder, "one", "", quiet)
    write(disk, 2)

    snapshots.restore(guest, guest, view("data", "seed"), folder, "one", quiet)

    assert saved.disks == ["disk-data"]
    assert holds(disk, 1)


@needs_qemu_img
def test_guest_goes_on_when_a_disk_cannot_be_saved(folder: Path) -> None:
    guest = Guest()

    with pytest.raises(CommandError, match="qemu-img failed"):
        snapshots.save(guest, view("gone"), folder, "one", "", quiet)

    assert guest.log == ["save", "restore"]
    assert snapshots.list_all(folder) == []


@needs_qemu_img
def test_snapshot_deleted_while_the_guest_is_off_leaves_nothing_in_its_disks(folder: Path, disk: Path) -> None:
    guest = Guest()
    snapshots.save(guest, view("data"), folder, "one", "", quiet)
    guest.destroy()

    snapshots.delete(guest, folder, "one")

    assert tags(disk) == []


@needs_qemu_img
def test_snapshot_deleted_while_the_guest_runs_leaves_its_disks_alone(folder: Path, disk: Path) -> None:
    guest = Guest()
    snapshots.save(guest, view("data"), folder, "one", "", quiet)

    snapshots.delete(guest, folder, "one")

    assert len(tags(disk)) == 1
    assert snapshots.list_all(folder) == []


@needs_qemu_img
def test_name_of_a_deleted_snapshot_can_be_used_again(folder: Path, disk: Path) -> None:
    guest = Guest()
    for value in (1, 2):
        write(disk, value)
        snapshots.save(guest, view("data"), folder, "one", "", quiet)
        if value == 1:
            snapshots.delete(guest, folder, "one")  # while the guest runs
    write(disk, 3)

    snapshots.restore(guest, guest, view("data"), folder, "one", quiet)

    assert holds(disk, 2)


@needs_qemu_img
def test_snapshots_may_have_numbers_for_names(folder: Path, disk: Path) -> None:
    guest = Guest()
    for value, name in ((1, "2"), (2, "1")):
        write(disk, value)
        snapshots.save(guest, view("data"), folder, name, "", quiet)
    write(disk, 3)

    snapshots.restore(guest, guest, view("data"), folder, "1", quiet)

    assert holds(disk, 2)
