"""Migration: the conductor's part on hosts in memory, the agents' parts that need no libvirtd, and the commands."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import base64
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import CancelledError, GuestError, HostError, OrchestratorError, StateError
from orchestrator.guests import domain, migration, migrationservice
from orchestrator.guests.base import Guests
from orchestrator.guests.domain import GuestFacts, Identity
from orchestrator.guests.migration import End, Wanted, migrate
from orchestrator.guests.migrationservice import MigrationService, _Link, _Watched
from orchestrator.hosts.accel import Verdict
from orchestrator.hosts.rpc import Call
from orchestrator.hosts.transport import client
from orchestrator.images import disk
from orchestrator.spec.resolved import ResolvedLab
from orchestrator.testing import MemoryLab, perfect
from tests.unit.labs import ann, guest_image, resolved

SOON = 10.0


# -- the conductor, on hosts in memory -------------------------------------------------------------------------------


def far() -> ResolvedLab:
    hosts = {
        name: {"kind": "ssh", "address": f"192.0.2.{number}"} for number, name in enumerate(("alpha", "beta"), 1)
    }
    return resolved({"lab": "far", "hosts": hosts, "guests": {"ann": {"host": "alpha"}}})


class Pair:
    """Two hosts in memory, ``ann`` on the first."""

    def __init__(self) -> None:
        self.lab = far()
        self.memory = MemoryLab(perfect(self.lab))
        self.ends = {name: self._end(name) for name in ("alpha", "beta")}
        self.said: list[str] = []

    def _end(self, name: str) -> End:
        transport = self.memory.transport(self.lab, name)
        return End(client(transport), lambda: client(transport))

    def migrate(self, cancel: threading.Event | None = None, lose: tuple[str, ...] = ()) -> migration.Report:
        wanted = Wanted(guest="ann", address="192.0.2.2", image=guest_image(), lose=lose)
        return migrate(wanted, self.ends["alpha"], self.ends["beta"], self.said.append, cancel or threading.Event())

    def places(self) -> dict[str, tuple[str, str | None]]:
        found = {}
        for name, host in self.memory.hosts.items():
            for facts in host.guests.values():
                found[name] = (facts.state, facts.arriving_from)
        return found

    def fail(self, host: str, when: str, error: OrchestratorError) -> None:
        def raise_it(method: str, call: Any, params: Mapping[str, Any]) -> None:
            if method == when:
                raise error

        self.memory.host(host).on_call = raise_it


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    for end in made.ends.values():
        end.agent.close()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("migration")]
    assert not left


def test_guest_goes_to_the_other_host_and_runs_there(pair: Pair) -> None:
    report = pair.migrate()

    assert pair.places() == {"beta": ("running", None)}
    assert (report.guest, report.source, report.target, report.passes) == ("ann", "alpha", "beta", 1)
    assert report.seconds >= report.downtime_seconds >= 0
    assert pair.said[0] == "preparing"
    assert any("memory:" in said for said in pair.said)
    assert pair.said[-1] == "switching over"


def test_guest_that_stands_still_stays_so(pair: Pair) -> None:
    pair.memory.host("alpha").guests["ann"].state = "paused"

    report = pair.migrate()

    assert pair.places() == {"beta": ("paused", None)}
    assert report.downtime_seconds == 0


@pytest.mark.parametrize(
    ("host", "when"), [("alpha", "migration.describe"), ("beta", "migration.receive"), ("alpha", "migration.send")]
)
def test_what_fails_on_the_way_leaves_the_guest_where_it_was(pair: Pair, host: str, when: str) -> None:
    pair.fail(host, when, GuestError("no room", hint="make some"))

    with pytest.raises(GuestError, match="no room") as caught:
        pair.migrate()

    assert caught.value.hint == "make some"
    assert pair.places() == {"alpha": ("running", None)}
    pair.memory.host(host).on_call = lambda *_: None
    pair.migrate()
    assert pair.places() == {"beta": ("running", None)}


def test_guest_that_was_handed_over_is_not_discarded_when_it_does_not_go_on(pair: Pair) -> None:
    pair.fail("beta", "migration.arrive", HostError("gone"))

    with pytest.raises(HostError):
        pair.migrate()

    assert pair.places() == {"beta": ("paused", "alpha")}
    assert "migration.discard" not in pair.memory.host("beta").calls


def test_what_it_leaves_behind_need_not_be_cleared_at_once(pair: Pair) -> None:
    pair.fail("alpha", "migration.clear", HostError("gone"))

    pair.migrate()

    assert pair.places() == {"beta": ("running", None)}


def test_migration_that_is_given_up_leaves_the_guest_where_it_was(pair: Pair) -> None:
    cancel = threading.Event()

    def slow(method: str, call: Call, params: Mapping[str, Any]) -> None:
        if method == "migration.send":
            woken = threading.Event()
            call.on_cancel(woken.set)
            cancel.set()
            assert woken.wait(SOON)
            call.check()

    pair.memory.host("alpha").on_call = slow

    with pytest.raises(CancelledError):
        pair.migrate(cancel)

    assert pair.places() == {"alpha": ("running", None)}


def test_cancelling_too_late_does_not_stop_the_guest_half_way(pair: Pair) -> None:
    cancel = threading.Event()
    pair.memory.host("beta").on_call = lambda method, *_: cancel.set() if method == "migration.arrive" else None

    pair.migrate(cancel)

    assert pair.places() == {"beta": ("running", None)}


# -- whether the guest was handed over -------------------------------------------------------------------------------


def frame(procedure: int, kind: int, status: int, body: bytes = b"", program: int = 0x20008086) -> bytes:
    """A message of libvirt's protocol (src/rpc/virnetprotocol.x)."""
    return struct.pack(">IIIIIII", 28 + len(body), program, 1, procedure, kind, 7, status) + body


FINISH, PREPARE = 306, 303
CALL, REPLY, OK, ERROR = 0, 1, 0, 1
HARMLESS = [
    frame(PREPARE, REPLY, OK, b"x" * 900),
    frame(FINISH, CALL, OK),
    frame(FINISH, REPLY, ERROR, b"no"),
    frame(FINISH, REPLY, OK, program=0x20008087),
    frame(1, REPLY, OK),
]


def sent_through(data: bytes, cuts: list[int]) -> tuple[bool, bytes, int]:
    """Whether the link saw the guest being handed over, what reached libvirt, and how often it was told."""
    told: list[None] = []
    link = _Link(Path("/nowhere"), lambda: told.append(None))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watched = _Watched(ours, link)
        pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        for piece in pieces:
            watched.sendall(piece)
        ours.shutdown(socket.SHUT_WR)
        got = b""
        while part := theirs.recv(1 << 16):
            got += part
    assert link.settled.is_set() == link.committed
    return link.committed, got, len(told)


@given(st.lists(st.sampled_from(HARMLESS), max_size=6), st.booleans(), st.data())
def test_handing_over_is_seen_however_the_bytes_are_cut(
    before: list[bytes], handed: bool, draw: st.DataObject
) -> None:
    data = b"".join(before) + (frame(FINISH, REPLY, OK, b"domain") if handed else b"") + HARMLESS[0]
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=8)))

    assert sent_through(data, cuts) == (handed, data, int(handed))


@given(st.binary(max_size=400))
def test_bytes_of_another_kind_are_passed_on_and_mean_nothing(noise: bytes) -> None:
    committed, got, _ = sent_through(noise, [])

    assert (committed, got) == (False, noise)


# -- the agent's part ------------------------------------------------------------------------------------------------

IDENTITY = Identity("demo", "0123abcd", "beta")


class Driver:
    """libvirt's own driver for tests."""

    def __init__(self, uri: str) -> None:
        libvirt.registerErrorHandler(lambda *_: None, None)
        self.conn = libvirt.open(uri)
        self.sequence = 0

    def poke(self) -> None:
        """Nobody waits."""

    def wait(self, done: Callable[[], bool], deadline: Any, every: float = 5.0) -> bool:
        return done()


@pytest.fixture
def guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guests]:
    # The driver knows no firmware to be forgotten.
    monkeypatch.setattr(libvirt.virDomain, "undefineFlags", lambda dom, flags: dom.undefine())
    node = tmp_path / "node.xml"
    node.write_text("<node/>")
    made = Guests(IDENTITY, tmp_path, "demo.")
    made.libvirt = Driver(f"test://{node}")  # type: ignore[assignment]
    yield made
    made.libvirt.conn.close()


@pytest.fixture
def service(guests: Guests) -> MigrationService:
    return MigrationService(guests, "qemu:///system")


@pytest.fixture
def call() -> Call:
    return Call(lambda text: None)


def define(guests: Guests, uid: str = "0123abcd") -> Any:
    mark = domain.payload(ann(), "tiny-1", "none")
    return guests.libvirt.conn.defineXML(
        "<domain type='test'><name>demo.ann</name><memory unit='MiB'>256</memory><os><type>hvm</type></os>"
        f"<metadata><o:guest xmlns:o='{domain.NAMESPACE}' lab='demo' uid='{uid}' name='ann' host='beta'>"
        f"{mark}</o:guest></metadata></domain>"
    )


def described(**changes: Any) -> dict[str, Any]:
    xml = domain.render(
        ann(disks=[{"name": "data", "size": "64M"}]),
        guest_image(),
        Identity("demo", "0123abcd", "alpha"),
        domain_name="demo.ann",
        accel="tcg",
        emulator="/usr/bin/qemu",
        folder=Path("/there"),
        cmdline="",
    )
    return {
        "xml": xml,
        "persistent": xml,
        "running": True,
        "ready": True,
        "since": 1234.5,
        "disks": [{"serial": "data", "size": 64 << 20, "used": 1 << 20}],
        "seed": None,
        "log": base64.b64encode(b"booting\n").decode(),
        "log_end": 8,
    } | changes


def test_embedded_libvirt_cannot_send_or_receive(guests: Guests, call: Call) -> None:
    service = MigrationService(guests, "qemu:///embed?root=/x")

    assert not service.able(call)
    for act in (
        lambda: service.describe(call, "ann", []),
        lambda: service.receive(lambda _: pytest.fail("it opened"), "ann", "alpha", described(), {}),
    ):
        with pytest.raises(StateError, match="libvirt inside the agent") as caught:
            act()
        assert "libvirt: system" in str(caught.value.hint)


needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")


@needs_qemu_img
@pytest.mark.usefixtures("qemu")
def test_files_are_made_for_what_comes(service: MigrationService, guests: Guests) -> None:
    there = service._prepare("ann", "alpha", described(seed=base64.b64encode(b"iso").decode()), guest_image())

    folder = guests.folder("ann")
    assert disk.info(folder / "disk-data.qcow2")["virtual-size"] == 64 << 20
    assert (folder / "seed.iso").read_bytes() == b"iso"
    assert guests.console_log("ann").read_bytes() == b"booting\n"
    assert guests.started("ann").stat().st_mtime == 1234.5
    assert guests.ready("ann").exists()
    assert guests.arriving_from("ann") == "alpha"
    assert str(folder / "disk-data.qcow2") in there["xml"]
    assert 'host="beta"' in there["persistent"]


def test_disk_of_an_image_that_has_none_is_an_error(service: MigrationService) -> None:
    disks = [{"serial": "root", "size": 64 << 20, "used": 0}]

    with pytest.raises(GuestError, match="has no disk"):
        service._prepare("ann", "alpha", described(disks=disks), guest_image(disk=None))


@pytest.fixture
def qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU is here, KVM is not."""
    verdict = Verdict("tcg", True, "there is no /dev/kvm", 0.1, "/usr/bin/qemu")
    monkeypatch.setattr(migrationservice.accel, "probe", lambda emulator: verdict)
    monkeypatch.setattr(migrationservice.shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.usefixtures("qemu")
def test_there_is_room(service: MigrationService) -> None:
    service._check_room("ann", described())


@pytest.mark.usefixtures("qemu")
def test_guest_without_room_on_the_disk_is_refused(service: MigrationService) -> None:
    disks = [{"serial": "data", "size": 1 << 60, "used": 1 << 60}]

    with pytest.raises(GuestError, match=r"guest ann needs \d+ MiB of disk, host beta has \d+ MiB left"):
        service._check_room("ann", described(disks=disks))


@pytest.mark.usefixtures("qemu")
def test_guest_that_does_not_fit_is_refused(service: MigrationService) -> None:
    huge = described()["xml"].replace(f'unit="b">{256 << 20}<', f'unit="b">{1 << 60}<')

    with pytest.raises(GuestError, match=r"guest ann wants \w+, host beta has \d+M available"):
        service._check_room("ann", described(xml=huge))


@pytest.mark.usefixtures("qemu")
def test_guest_under_kvm_is_refused_where_there_is_none(service: MigrationService) -> None:
    accelerated = described()["xml"].replace('<domain type="qemu">', '<domain type="kvm">')

    with pytest.raises(GuestError, match=r"runs under KVM, which host beta has not: there is no /dev/kvm"):
        service._check_room("ann", described(xml=accelerated))


def test_guest_is_refused_where_there_is_no_qemu(service: MigrationService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrationservice.shutil, "which", lambda name: None)

    with pytest.raises(GuestError, match="host beta has no qemu-system-x86_64"):
        service._check_room("ann", described())


@pytest.mark.parametrize(("uid", "match"), [("0123abcd", "is on host beta already"), ("ffffffff", "not of this lab")])
def test_guest_whose_name_is_taken_is_refused(
    service: MigrationService, guests: Guests, uid: str, match: str
) -> None:
    define(guests, uid)

    with pytest.raises(StateError, match=match):
        service._check_room("ann", described())


@pytest.mark.usefixtures("qemu")
def test_files_of_nobody_knows_whom_are_not_removed(service: MigrationService, guests: Guests) -> None:
    guests.folder("ann").mkdir(parents=True)

    with pytest.raises(StateError, match="has files of another guest ann"):
        service._check_room("ann", described())

    assert guests.folder("ann").exists()


@pytest.mark.usefixtures("qemu")
def test_files_of_a_migration_that_was_cut_short_make_room(service: MigrationService, guests: Guests) -> None:
    guests.folder("ann").mkdir(parents=True)
    guests.moving("ann").write_text("alpha")

    service._check_room("ann", described())

    assert not guests.folder("ann").exists()


def arriving(guests: Guests, *, running: bool = True) -> Any:
    dom = define(guests)
    if running:
        dom.create()
        dom.suspend()
    guests.folder("ann").mkdir(parents=True, exist_ok=True)
    guests.moving("ann").write_text("alpha\n")
    return dom


def test_guest_that_arrives_goes_on_with_its_log(service: MigrationService, guests: Guests, call: Call) -> None:
    dom = arriving(guests)
    guests.console_log("ann").write_bytes(b"one\n")

    answer = service.arrive(call, "ann", log=base64.b64encode(b"two\n").decode())
    again = service.arrive(call, "ann")

    assert dom.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    assert guests.console_log("ann").read_bytes() == b"one\ntwo\n"
    assert guests.arriving_from("ann") is None
    assert answer["running"] >= 0
    assert again.keys() == answer.keys()


def test_guest_that_stood_still_arrives_so(service: MigrationService, guests: Guests, call: Call) -> None:
    dom = arriving(guests)

    service.arrive(call, "ann", resume=False)

    assert dom.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    assert guests.arriving_from("ann") is None


def test_only_what_arrives_is_discarded(service: MigrationService, guests: Guests, call: Call) -> None:
    dom = arriving(guests)
    guests.moving("ann").unlink()
    service.discard(call, "ann")
    stayed = dom.isActive()
    guests.moving("ann").write_text("alpha")

    service.discard(call, "ann")

    assert stayed
    assert guests.find("ann") is None
    assert not guests.folder("ann").exists()


def test_end_of_the_stream_takes_back_what_libvirt_has_not(service: MigrationService, guests: Guests) -> None:
    guests.folder("ann").mkdir(parents=True)
    guests.moving("ann").write_text("alpha")

    service._take_back("ann")

    assert not guests.folder("ann").exists()


def test_end_of_the_stream_leaves_what_is_whole(service: MigrationService, guests: Guests) -> None:
    arriving(guests)

    service._take_back("ann")

    assert guests.arriving_from("ann") == "alpha"
    assert guests.find("ann")


@pytest.mark.parametrize("mark", ["alpha", ""], ids=["came", "went"])
@pytest.mark.parametrize("there", [False, True], ids=["no domain", "domain"])
def test_sweeping_removes_files_that_no_domain_uses(
    service: MigrationService, guests: Guests, mark: str, there: bool
) -> None:
    if there:
        define(guests)
    for name in ("ann", "bob"):
        guests.folder(name).mkdir(parents=True)
    guests.moving("ann").write_text(mark)

    service.sweep()

    assert guests.folder("ann").exists() == there
    assert guests.folder("bob").exists()


def test_guest_is_kept_until_it_is_handed_over(service: MigrationService, guests: Guests, call: Call) -> None:
    dom = define(guests)
    guests.folder("ann").mkdir(parents=True)
    off = service.keeps(call, "ann")
    dom.create()
    running = service.keeps(call, "ann")
    guests.moving("ann").write_text("")
    handed_over = service.keeps(call, "ann")
    service.clear(call, "ann")

    assert (off, running, handed_over) == (False, True, False)
    assert guests.find("ann") is None
    assert not guests.folder("ann").exists()


def test_guest_that_was_not_handed_over_is_not_cleared(service: MigrationService, guests: Guests, call: Call) -> None:
    define(guests).create()

    service.clear(call, "ann")

    assert service.keeps(call, "ann")


def test_guest_with_snapshots_goes_only_if_they_may_be_lost(
    service: MigrationService, guests: Guests, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clean:
        name = "clean"

    define(guests).create()
    monkeypatch.setattr(migrationservice.snapshots, "list_all", lambda folder: [Clean])

    with pytest.raises(StateError, match="snapshots cannot go along: clean"):
        service.describe(call, "ann", [])

    assert service.describe(call, "ann", ["clean"])["running"]


def test_guest_that_has_not_arrived_itself_does_not_go_on(
    service: MigrationService, guests: Guests, call: Call
) -> None:
    arriving(guests)

    with pytest.raises(StateError, match="has not quite come from alpha"):
        service.describe(call, "ann", [])


def test_description_has_the_end_of_a_long_log(service: MigrationService, guests: Guests, call: Call) -> None:
    define(guests).create()
    guests.folder("ann").mkdir(parents=True)
    guests.console_log("ann").write_bytes(b"x" * migrationservice.LOG_BYTES + b"end")

    told = service.describe(call, "ann", [])

    assert base64.b64decode(told["log"]) == b"x" * (migrationservice.LOG_BYTES - 3) + b"end"
    assert told["log_end"] == migrationservice.LOG_BYTES + 3
    assert migrationservice._read_log(guests.console_log("ann"), told["log_end"] - 3)[0] == "ZW5k"
    assert migrationservice._read_log(guests.console_log("bob")) == ("", 0)


def test_host_without_libvirtd_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(migrationservice, "SYSTEM_SOCKETS", (str(tmp_path / "sock"),))

    with pytest.raises(HostError, match="no libvirtd listens"), migrationservice._daemon():
        pytest.fail("it connected")


def test_facts_of_old_state_have_the_new_fields() -> None:
    facts = perfect(far()).hosts["alpha"].guests[0].to_json()
    for key in ("snapshots", "arriving_from"):
        del facts[key]

    assert GuestFacts.from_json(facts).arriving_from is None
