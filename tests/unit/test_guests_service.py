"""The agent's calls on guests, with libvirt's own driver for tests in place of QEMU."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import libvirt
import pytest

from orchestrator.errors import CancelledError, GuestError, NotFoundError, StateError
from orchestrator.guests import domain, service
from orchestrator.guests.domain import GuestFacts, Identity
from orchestrator.guests.service import GuestService
from orchestrator.hosts.rpc import Call
from orchestrator.images import disk
from orchestrator.patience import Deadline
from tests.unit.labs import ann, guest_image

IDENTITY = Identity("demo", "0123abcd", "alpha")
PANIC = b"[ 1.0] Kernel panic - not syncing: Fatal exception\r\n"

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")


class Driver:
    """What :class:`orchestrator.guests.libvirtconn.Libvirt` is, without an event loop."""

    def __init__(self, uri: str, name_of: Callable[..., str | None]) -> None:
        libvirt.registerErrorHandler(lambda *_: None, None)
        self.conn = libvirt.open(uri)

    def poke(self) -> None:
        """Nobody waits."""

    def wait(self, done: Callable[[], bool], deadline: Deadline, every: float = 5.0) -> bool:
        return done()


@pytest.fixture
def guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GuestService]:
    monkeypatch.setattr(service, "Libvirt", Driver)
    # The driver knows no ways to ask; all of its guests obey at once.
    monkeypatch.setattr(libvirt.virDomain, "shutdownFlags", lambda dom, flags: dom.shutdown())
    node = tmp_path / "node.xml"  # with a file of its own, a connection shares nothing with others
    node.write_text("<node/>")
    made = GuestService(IDENTITY, f"test://{node}", tmp_path, "demo.")
    yield made
    made.libvirt.conn.close()


@pytest.fixture
def call() -> Call:
    return Call(lambda text: None)


def define(guests: GuestService, name: str = "ann", *, uid: str = "0123abcd", mark: str | None = None) -> Any:
    """A domain that is off, with our mark."""
    if mark is None:
        mark = json.dumps({"guest": ann().model_dump(mode="json"), "image": "tiny-1", "ready": "none"})
    guests.folder(name).mkdir(parents=True, exist_ok=True)
    return guests.libvirt.conn.defineXML(
        f"<domain type='test'><name>demo.{name}</name><memory unit='MiB'>256</memory><os><type>hvm</type></os>"
        f"<metadata><o:guest xmlns:o='{domain.NAMESPACE}' lab='demo' uid='{uid}' name='{name}' host='alpha'>"
        f"{mark}</o:guest></metadata></domain>"
    )


def started(guests: GuestService, name: str = "ann") -> Any:
    dom = define(guests, name)
    dom.create()
    return dom


def facts(guests: GuestService, call: Call) -> list[GuestFacts]:
    return [GuestFacts.from_json(data) for data in guests.facts(call)]


def fact(guests: GuestService, call: Call) -> GuestFacts:
    (found,) = facts(guests, call)
    return found


# -- facts -----------------------------------------------------------------------------------------------------------


def test_facts_are_of_the_domains_of_this_lab_only(guests: GuestService, call: Call) -> None:
    started(guests, "ann")
    define(guests, "bob")
    define(guests, "theirs", uid="ffffffff")

    found = {seen.name: (seen.state, seen.host, seen.image) for seen in facts(guests, call)}

    assert found == {"ann": ("running", "alpha", "tiny-1"), "bob": ("off", "alpha", "tiny-1")}


def test_facts_of_a_guest_that_runs(guests: GuestService, call: Call) -> None:
    started(guests)

    seen = fact(guests, call)

    assert (seen.ready, seen.reason, seen.tail, seen.memory, seen.vcpus) == (True, "", [], 256 << 20, 1)
    assert seen.wish == ann().model_dump(mode="json")


@pytest.mark.parametrize(
    ("act", "state", "reason"),
    [("suspend", "paused", ""), ("destroy", "off", "stopped"), ("shutdown", "off", "shut down")],
)
def test_facts_tell_how_a_guest_ended(guests: GuestService, call: Call, act: str, state: str, reason: str) -> None:
    getattr(started(guests), act)()

    seen = fact(guests, call)

    assert (seen.state, seen.reason, seen.ready, seen.since) == (state, reason, False, None)


@pytest.mark.parametrize("ended", [False, True])
def test_guest_that_panicked_has_crashed_with_its_last_words(guests: GuestService, call: Call, ended: bool) -> None:
    dom = started(guests)
    guests.console_log("ann").write_bytes(b"booting\r\n" + PANIC)
    if ended:
        dom.destroy()

    seen = fact(guests, call)

    assert seen.state == "crashed"
    assert seen.tail == ["booting", "[ 1.0] Kernel panic - not syncing: Fatal exception"]
    assert ended or seen.reason == "Kernel panic - not syncing: Fatal exception"


@pytest.mark.parametrize(("log", "ready"), [(b"booting\r\n", False), (b"booting\r\n\x1b[1mlogin: \r\n", True)])
def test_guest_is_ready_when_its_console_says_so(guests: GuestService, call: Call, log: bytes, ready: bool) -> None:
    wish = ann(ready="console:login: *")
    payload = domain.payload(wish, "tiny-1", str(wish.ready))
    define(guests, mark=payload).create()
    guests.console_log("ann").write_bytes(log)

    assert fact(guests, call).ready == ready


def test_guest_that_waits_for_its_agent_is_not_ready(guests: GuestService, call: Call) -> None:
    define(guests, mark=domain.payload(ann(), "tiny-1", "agent")).create()

    assert not fact(guests, call).ready


@pytest.mark.parametrize(("log", "tail"), [(b"", ["(nothing on its console)"]), (b"hello\r\n", ["hello"])])
def test_wait_that_ends_too_late_tells_what_the_guest_did_meanwhile(
    guests: GuestService, call: Call, log: bytes, tail: list[str]
) -> None:
    started(guests)
    guests.console_log("ann").write_bytes(log)

    with pytest.raises(GuestError, match=r"agent did not come within \d+ s \(\d+ s of processor time") as caught:
        guests.wait(call, ann(ready="agent").model_dump(mode="json"), asdict(guest_image()))

    assert list(caught.value.tail) == tail
    assert caught.value.hint == "orchestrator console ann"


@pytest.mark.parametrize(
    ("booting", "log", "kernel", "resets"),
    [
        (True, b"", "/boot/vmlinuz", 1),
        (False, b"", "/boot/vmlinuz", 0),
        (True, b"hi", "/boot/vmlinuz", 0),
        (True, b"", None, 0),
    ],
)
def test_guest_that_hangs_at_once_is_reset_once_while_it_boots(
    guests: GuestService,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    booting: bool,
    log: bytes,
    kernel: str | None,
    resets: int,
) -> None:
    started(guests)
    guests.console_log("ann").write_bytes(log)
    seen: list[str] = []
    monkeypatch.setattr(libvirt.virDomain, "reset", lambda dom: seen.append(dom.name()))

    with pytest.raises(GuestError, match="agent did not come"):
        guests._wait(call, ann(ready="agent"), guest_image(kernel=kernel), booting=booting)

    assert len(seen) == resets


def test_guest_is_up_since_its_start_whatever_its_console_says(guests: GuestService, call: Call) -> None:
    started(guests)
    log = guests.console_log("ann")
    log.write_bytes(b"booting\r\n")
    began = fact(guests, call).since
    time.sleep(0.02)  # so that the file's times differ

    with log.open("ab") as console:
        console.write(b"tick\r\n")

    assert fact(guests, call).since == began


def test_damaged_domain_does_not_hide_the_others(guests: GuestService, call: Call) -> None:
    started(guests, "ann")
    define(guests, "bob", mark="{")

    assert "ann" in [seen.name for seen in facts(guests, call)]


# -- power -----------------------------------------------------------------------------------------------------------


def test_guest_is_paused_and_resumed_and_again_does_nothing(guests: GuestService, call: Call) -> None:
    dom = started(guests)
    states = []
    for act in (guests.pause, guests.pause, guests.resume, guests.resume):
        act(call, "ann")
        states.append(dom.state()[0])

    assert states == [libvirt.VIR_DOMAIN_PAUSED] * 2 + [libvirt.VIR_DOMAIN_RUNNING] * 2


@pytest.mark.parametrize(("hard", "how"), [(False, "shut down"), (True, "stopped")], ids=["asked", "hard"])
def test_stop_tells_how_the_guest_ended(guests: GuestService, call: Call, hard: bool, how: str) -> None:
    started(guests)

    first = guests.stop(call, "ann", hard=hard)
    second = guests.stop(call, "ann", hard=hard)

    assert (first, second) == (how, "off")


@pytest.mark.parametrize("trouble", ["panic", "paused"])
def test_guest_that_cannot_hear_is_stopped_hard(guests: GuestService, call: Call, trouble: str) -> None:
    dom = started(guests)
    if trouble == "panic":
        guests.console_log("ann").write_bytes(PANIC)
    else:
        dom.suspend()

    assert guests.stop(call, "ann") == "stopped"


def test_stop_that_is_given_up_does_not_stop_the_guest_hard(guests: GuestService, call: Call) -> None:
    dom = started(guests)
    call.cancel()

    with pytest.raises(CancelledError):
        guests.stop(call, "ann")

    assert dom.state() == [
        libvirt.VIR_DOMAIN_SHUTOFF,
        libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN,
    ]  # and was not stopped hard


@pytest.mark.parametrize("act", ["pause", "resume"])
def test_guest_that_is_off_is_refused_with_what_to_do(guests: GuestService, call: Call, act: str) -> None:
    define(guests)

    with pytest.raises(StateError, match="guest ann is not running") as caught:
        getattr(guests, act)(call, "ann")

    assert caught.value.hint == "orchestrator start ann"


@pytest.mark.parametrize("act", ["pause", "resume", "stop", "xml", "snapshots"])
def test_unknown_guest_is_not_found(guests: GuestService, call: Call, act: str) -> None:
    with pytest.raises(NotFoundError, match="there is no guest nobody on host alpha"):
        getattr(guests, act)(call, "nobody")


@pytest.mark.parametrize("act", ["pause", "resume", "stop", "remove", "xml"])
def test_domain_of_somebody_else_is_never_touched(guests: GuestService, call: Call, act: str) -> None:
    dom = define(guests, "theirs", uid="ffffffff")
    dom.create()

    with pytest.raises(StateError, match=r"a domain named demo\.theirs is there and is not of this lab"):
        getattr(guests, act)(call, "theirs")

    assert dom.state()[0] == libvirt.VIR_DOMAIN_RUNNING


def test_removing_what_is_not_there_removes_its_files(guests: GuestService, call: Call) -> None:
    guests.folder("ann").mkdir(parents=True)

    guests.remove(call, "ann")
    guests.remove(call, "ann")

    assert not guests.folder("ann").exists()


def test_guest_without_an_agent_runs_nothing(guests: GuestService, call: Call) -> None:
    started(guests)

    with pytest.raises(GuestError, match="its guest agent is not connected") as caught:
        guests.exec(call, "ann", ["true"])

    assert "orchestrator console ann" in str(caught.value.hint)


def test_names_of_domains_are_known_after_they_have_gone(guests: GuestService, call: Call) -> None:
    ours, theirs = define(guests), define(guests, "theirs", uid="ffffffff")
    before = guests._name_of(ours), guests._name_of(theirs)
    ours.undefine()

    assert before == (guests._name_of(ours), guests._name_of(theirs)) == ("ann", None)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The disk of an image."""
    file = tmp_path / "base.qcow2"
    disk.create_empty(file, 1 << 20)
    return file


def prepare(guests: GuestService, base: Path | None, *, fresh: bool = False, **settings: Any) -> Path:
    """The folder of ``ann`` with what she needs to start."""
    folder = guests.folder("ann")
    folder.mkdir(parents=True, exist_ok=True)
    image = guest_image(disk=str(base) if base else None, disk_format="qcow2" if base else None)
    guests._prepare_files(folder, ann(**settings), image, [], fresh)
    return folder


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU runs as the caller."""
    monkeypatch.setattr(service.accel, "emulator_user", lambda: None)


@needs_qemu_img
def test_first_start_makes_a_disk_on_top_of_the_image(guests: GuestService, base: Path) -> None:
    folder = prepare(guests, base)

    assert disk.backing_file(folder / "root.qcow2") == base


@needs_qemu_img
@pytest.mark.parametrize("fresh", [False, True])
def test_restart_keeps_the_disk_unless_it_shall_be_fresh(guests: GuestService, base: Path, fresh: bool) -> None:
    guests.folder("ann").mkdir(parents=True)
    root = guests.folder("ann") / "root.qcow2"
    disk.create_overlay(base, "qcow2", root, None)
    before = root.stat().st_mtime_ns

    prepare(guests, base, fresh=fresh)

    assert (root.stat().st_mtime_ns != before) == fresh


@needs_qemu_img
def test_disks_of_the_lab_file_are_made_once(guests: GuestService) -> None:
    disks = [{"name": "data", "size": "64M"}]
    file = prepare(guests, None, disks=disks) / "disk-data.qcow2"
    before = file.stat().st_ino

    prepare(guests, None, disks=disks)

    assert disk.info(file)["virtual-size"] == 64 << 20
    assert file.stat().st_ino == before


@needs_qemu_img
def test_recreated_guest_gets_disks_of_the_size_that_is_wished(guests: GuestService) -> None:
    prepare(guests, None, disks=[{"name": "data", "size": "64M"}])

    folder = prepare(guests, None, fresh=True, disks=[{"name": "data", "size": "128M"}])

    assert disk.info(folder / "disk-data.qcow2")["virtual-size"] == 128 << 20


@needs_qemu_img
def test_disk_that_is_taken_away_loses_its_contents(guests: GuestService) -> None:
    prepare(guests, None, disks=[{"name": "data", "size": "64M"}])

    folder = prepare(guests, None)

    assert not (folder / "disk-data.qcow2").exists()


def test_kernels_command_line_has_the_images_then_ours_then_the_users(guests: GuestService) -> None:
    folder = guests.folder("ann")
    folder.mkdir(parents=True)

    words = guests._prepare_files(folder, ann(cmdline="quiet last"), guest_image(), [], False).split()

    assert words[0] == "console=ttyS0"
    assert words[-2:] == ["quiet", "last"]
    assert any("ann" in word for word in words[1:-2])


def test_guest_larger_than_the_memory_of_the_host_is_refused(guests: GuestService) -> None:
    with pytest.raises(GuestError, match=r"guest ann wants 1024T, host alpha has \d+M available"):
        guests.check_fits("ann", ann(memory="1024T").memory)


def test_files_are_given_to_qemus_user_by_root_only(
    guests: GuestService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Path, str]] = []
    monkeypatch.setattr(service.accel, "emulator_user", lambda: "qemu-user")
    monkeypatch.setattr(service.shutil, "chown", lambda file, user: given.append((file, user)))
    for uid in (1000, 0):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        guests.give_to_qemu(tmp_path)

    assert given == [(tmp_path, "qemu-user")]
