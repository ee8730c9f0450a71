"""What the agents of both hosts do when a guest migrates: the calls ``migration.*``, see
:mod:`orchestrator.guests.migration`."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import select
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt

from orchestrator import names
from orchestrator.errors import GuestError, HostError, OrchestratorError, StateError
from orchestrator.guests import domain, snapshots
from orchestrator.guests.base import Guests
from orchestrator.guests.domain import ROOT_DISK, SEED_DISK, DomainView, GuestImage
from orchestrator.guests.libvirtconn import libvirt_errors
from orchestrator.hosts import accel
from orchestrator.hosts.rpc import Call, Server, Stream, relay
from orchestrator.images import disk
from orchestrator.paths import make_dir
from orchestrator.patience import Deadline, scaled

SYSTEM = "qemu:///system"
SYSTEM_AT = "qemu+unix:///system?socket="
SYSTEM_SOCKETS = ("/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock")
PORTS = "49152 to 49215"  # libvirt's default for migrations

LOOK_SECONDS = 0.5
SAMPLE_SECONDS = 0.1
"""What a small disk has sent is known to libvirt for no longer than a few of these."""
ABORT_SECONDS = 10.0
END_SECONDS = 30.0
TAKE_BACK_SECONDS = 5.0
AGENT_SECONDS = 30.0
LOG_BYTES = 1 << 20
ROOM_BYTES = 64 << 20  # what a disk may grow while it is copied

_FLAGS = (
    libvirt.VIR_MIGRATE_PEER2PEER
    | libvirt.VIR_MIGRATE_LIVE
    | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
    | libvirt.VIR_MIGRATE_PAUSED
    | libvirt.VIR_MIGRATE_AUTO_CONVERGE
    | libvirt.VIR_MIGRATE_ABORT_ON_ERROR
)
_PORTABLE = libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE


class MigrationService:
    """Sends guests to other hosts, and receives them.

    :param uri: of the libvirt that runs the guests; only a daemon can migrate.
    """

    def __init__(self, guests: Guests, uri: str) -> None:
        self._guests = guests
        self._able = uri == SYSTEM
        self._links: dict[str, _Link] = {}

    def register(self, server: Server) -> None:
        for handler in (self.able, self.describe, self.send, self.arrive, self.clear, self.keeps, self.discard):
            server.register(f"migration.{handler.__name__}", handler)
        server.register_stream("migration.receive", self.receive)
        server.register_stream("migration.link", self.link)

    def able(self, call: Call) -> bool:
        """Guests can be sent from here, and received."""
        return self._able

    def _check_able(self) -> None:
        if not self._able:
            raise StateError(
                f"host {self._guests.identity.host} runs its guests by a libvirt inside the agent, "
                "which can neither send nor receive them",
                hint="a host of kind ssh with `libvirt: system` can, and needs a libvirtd",
            )

    # -- the source ----------------------------------------------------------------------------------------------

    def describe(self, call: Call, guest: str, lose: list[str]) -> dict[str, Any]:
        """What a target must know of a running guest. Sizes in bytes; files are base64.

        :param lose: snapshots that may be lost.
        :raise StateError: it cannot go from here, or has snapshots that would be lost.
        """
        self._check_able()
        dom, view = self._guests.running(guest)
        if origin := self._guests.arriving_from(guest):
            raise StateError(f"guest {guest} has not quite come from {origin} itself", hint="orchestrator up")
        folder = self._guests.folder(guest)
        lost = [snapshot.name for snapshot in snapshots.list_all(folder) if snapshot.name not in lose]
        if lost:
            raise StateError(
                f"guest {guest}: its snapshots cannot go along: {', '.join(lost)}",
                hint="delete them with `orchestrator snapshot delete`, or add --yes",
            )
        log, log_end = _read_log(self._guests.console_log(guest))
        with libvirt_errors(f"guest {guest}"):
            xml, persistent = dom.XMLDesc(_PORTABLE), dom.XMLDesc(_PORTABLE | libvirt.VIR_DOMAIN_XML_INACTIVE)
            running = dom.state()[0] == libvirt.VIR_DOMAIN_RUNNING
        seed = folder / domain.file_name(SEED_DISK)
        started = self._guests.started(guest)
        return {
            "xml": xml,
            "persistent": persistent,
            "running": running,
            "ready": self._guests.ready(guest).exists(),
            "since": started.stat().st_mtime if started.exists() else time.time(),
            "disks": [_disk(folder, serial) for serial in view.disks if serial != SEED_DISK],
            "seed": base64.b64encode(seed.read_bytes()).decode() if SEED_DISK in view.disks else None,
            "log": log,
            "log_end": log_end,
        }

    def link(self, open_stream: Callable[[Any], Stream], guest: str) -> None:
        """Carry what libvirt here says to the libvirt of the target, and back. Answers with the link's name, which
        :meth:`send` wants."""
        folder = make_dir(names.runtime_dir(self._guests.identity.uid, self._guests.identity.host))
        path = folder / f"move-{secrets.token_hex(4)}.sock"
        link = _Link(path, lambda: self._guests.moving(guest).write_text(""))
        self._links[path.name] = link
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(str(path))
                path.chmod(0o600)
                listener.listen(1)
                stream = open_stream(path.name)
                poller = select.poll()
                poller.register(listener.fileno(), select.POLLIN)
                poller.register(stream.fileno(), select.POLLIN | select.POLLHUP)
                if any(fd == stream.fileno() for fd, _ in poller.poll()):
                    return  # libvirt says the first word: this is the end
                libvirtd, _ = listener.accept()
            with libvirtd:
                link.libvirtd = libvirtd
                relay(stream, _Watched(libvirtd, link))
        finally:
            self._links.pop(path.name)
            path.unlink(missing_ok=True)

    def send(
        self, call: Call, guest: str, link: str, described: dict[str, Any], address: str, bandwidth: int = 0
    ) -> dict[str, Any]:
        """Migrate a guest; ends when it is the target's, where it is paused.

        :param described: ``xml`` and ``persistent`` as they are on the target.
        :param address: of the target, for memory and disks.
        :param bandwidth: MiB/s at most; 0: no limit.
        :return: ``stopped``: seconds since its processors stand still; ``disk``: bytes of disks that were sent;
            ``log``: the end of its console's log, base64.
        :raise GuestError: it does not work; the guest goes on here.
        """
        if link not in self._links:
            raise GuestError(f"guest {guest}: the link to the other host has gone")
        began = self._guests.libvirt.sequence
        sending = _Sending(self._guests, guest, self._links[link], described, address, bandwidth)
        call.on_cancel(sending.abort)
        sending.start()
        while not sending.link.settled.wait(SAMPLE_SECONDS):
            call.progress(sending.look())
            if call.cancelled:
                sending.give_up()
        if not sending.link.committed and sending.failure:
            call.check()
            raise sending.failure
        stops = [event for event in self._guests.libvirt.since(began) if event["event"] == "paused"]
        stopped = next((event["time"] for event in reversed(stops) if event["guest"] == guest), time.time())
        log, _ = _read_log(self._guests.console_log(guest), described["log_end"])
        return {"stopped": time.time() - stopped, "disk": sending.disk_bytes, "log": log}

    def keeps(self, call: Call, guest: str) -> bool:
        """The guest is here and nowhere else: it has not been handed over."""
        with self._guests.locked(guest, scaled(END_SECONDS)):
            found = self._guests.find(guest)
            gone = self._guests.moving(guest).exists()
            return found is not None and bool(found[0].isActive()) and not gone and not _is_migrating(found[0])

    def clear(self, call: Call, guest: str) -> None:
        """Remove what a guest that was handed over has left here."""
        with self._guests.locked(guest, scaled(END_SECONDS)):  # libvirt may still be at it
            if self._guests.moving(guest).exists() and self._guests.arriving_from(guest) is None:
                self._guests.erase(guest)

    def sweep(self) -> None:
        """Remove files of guests that came or went when a command was killed, and that no domain uses."""
        for guest in self._guests.with_files():
            with self._guests.locked(guest):
                if self._guests.moving(guest).exists() and self._guests.find(guest) is None:
                    shutil.rmtree(self._guests.folder(guest), ignore_errors=True)

    # -- the target ----------------------------------------------------------------------------------------------

    def receive(
        self,
        open_stream: Callable[[Any], Stream],
        guest: str,
        source: str,
        described: dict[str, Any],
        image: dict[str, Any],
    ) -> None:
        """Make room for a guest, answer with its ``xml`` and ``persistent`` as they are here, and carry bytes to
        libvirt. When the stream ends before the guest has arrived, everything is removed again.

        :raise OrchestratorError: it cannot be taken, for a reason that the message tells.
        """
        self._check_able()
        with self._guests.locked(guest, scaled(END_SECONDS)):
            self._check_room(guest, described)
            try:
                there = self._prepare(guest, source, described, GuestImage(**image))
                with _daemon() as libvirtd:
                    relay(open_stream(there), libvirtd)
            finally:
                self._take_back(guest)

    def _check_room(self, guest: str, described: dict[str, Any]) -> None:
        here = self._guests.identity.host
        view = _view(described["xml"])
        if self._guests.find(guest) is not None:
            raise StateError(f"guest {guest} is on host {here} already", hint="orchestrator up")
        folder = self._guests.folder(guest)
        if folder.exists():
            if not self._guests.moving(guest).exists():
                raise StateError(
                    f"host {here} has files of another guest {guest}: {folder}",
                    hint="see whose they are, then remove them",
                )
            shutil.rmtree(folder)
        if shutil.which(_emulator(view)) is None:
            raise GuestError(f"guest {guest}: host {here} has no {_emulator(view)}", hint="install QEMU there")
        if view.accel == "kvm" and (verdict := accel.probe(_emulator(view))).kind != "kvm":
            raise GuestError(
                f"guest {guest} runs under KVM, which host {here} has not: {verdict.reason}",
                hint="only a host with KVM can take it as it runs",
            )
        self._guests.check_fits(guest, view.memory_total)
        needed = sum(each["used"] for each in described["disks"]) + ROOM_BYTES
        free = shutil.disk_usage(make_dir(folder.parent)).free
        if needed > free:
            raise GuestError(
                f"guest {guest} needs {needed >> 20} MiB of disk, host {here} has {free >> 20} MiB left at {folder}",
                hint="free some space there, or take another host",
            )

    def _prepare(self, guest: str, source: str, described: dict[str, Any], image: GuestImage) -> dict[str, Any]:
        """The guest's files, still without contents; what libvirt here is to be told."""
        guests, view = self._guests, _view(described["xml"])
        folder = make_dir(guests.folder(guest))
        guests.moving(guest).write_text(source)
        for each in described["disks"]:
            file = folder / domain.file_name(each["serial"])
            if each["serial"] != ROOT_DISK:
                disk.create_empty(file, each["size"])
            elif image.disk is None:
                raise GuestError(f"guest {guest}: image {image.id} has no disk, the guest has one")
            else:
                disk.create_overlay(Path(image.disk), image.disk_format or "qcow2", file, each["size"])
            guests.give_to_qemu(file)
        if described["seed"] is not None:
            (folder / domain.file_name(SEED_DISK)).write_bytes(base64.b64decode(described["seed"]))
        guests.console_log(guest).write_bytes(base64.b64decode(described["log"]))
        guests.give_to_qemu(guests.console_log(guest))
        guests.started(guest).touch()
        os.utime(guests.started(guest), (described["since"], described["since"]))
        if described["ready"]:
            guests.ready(guest).touch()
        emulator = shutil.which(_emulator(view))
        assert emulator is not None  # it was there a moment ago
        here = guests.identity.host
        return {
            "log_end": described["log_end"],
            **{
                key: domain.relocate(described[key], host=here, emulator=emulator, folder=folder, image=image)
                for key in ("xml", "persistent")
            },
        }

    def _take_back(self, guest: str) -> None:
        """When the stream has ended: remove a guest that has not arrived. Where libvirt has all of it, it stays, with
        its mark: whether it is needed can only be seen on the source. Where it has not, the source's libvirt has had
        no answer to *finish*, and will not get one."""
        if self._guests.arriving_from(guest) is None:
            return

        def settled() -> bool:  # libvirt itself ends what comes in when its connection breaks
            found = self._guests.find(guest)
            return found is None or (bool(found[0].isPersistent()) and not _is_migrating(found[0]))

        with contextlib.suppress(OrchestratorError, libvirt.libvirtError):
            self._guests.libvirt.wait(settled, Deadline(scaled(TAKE_BACK_SECONDS)), every=LOOK_SECONDS)
        found = self._guests.find(guest)
        if found is None or not found[0].isPersistent():
            self._guests.erase(guest)

    def arrive(self, call: Call, guest: str, resume: bool = True, log: str = "") -> dict[str, Any]:
        """Let a guest go on that was handed over; does nothing where it has done so.

        :param resume: it ran on the source.
        :param log: what its console said last there, base64.
        :return: ``running``: for how many seconds it has been running when this answers; ``memory``: bytes that came;
            ``passes``: over its memory.
        """
        dom, view = self._guests.get(guest)
        call.on_cancel(self._guests.libvirt.poke)
        with libvirt_errors(f"guest {guest} does not go on"):
            if self._guests.arriving_from(guest) is not None and _is_migrating(dom):
                raise StateError(f"guest {guest} is still on its way", hint="try again in a minute")
            if log:
                with open(self._guests.console_log(guest), "ab") as out:
                    out.write(base64.b64decode(log))
            self._guests.moving(guest).unlink(missing_ok=True)
            if resume and dom.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                dom.resume()
        resumed = time.monotonic()
        if resume and dom.isActive() and self._guests.ready(guest).exists():
            self._wait_ready(call, guest, view)
        stats: dict[str, Any] = {}
        with contextlib.suppress(libvirt.libvirtError):
            stats = dom.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
        return {
            "running": time.monotonic() - resumed,
            "memory": stats.get("memory_processed", 0),
            "passes": stats.get("memory_iteration", 0),
        }

    def _wait_ready(self, call: Call, guest: str, view: DomainView) -> None:
        """Until its guest agent is connected again. It is no failure if that takes longer: the guest is there."""

        def ready() -> bool:
            call.check()
            return self._guests.is_ready(self._guests.get(guest)[1], view.ready)

        self._guests.libvirt.wait(ready, Deadline(scaled(AGENT_SECONDS, emulated=view.accel == "tcg")))

    def discard(self, call: Call, guest: str) -> None:
        """Remove a guest that came here and is not needed, as the source has it; does nothing for any other."""
        with self._guests.locked(guest, scaled(2 * END_SECONDS)):
            if self._guests.arriving_from(guest) is not None:
                self._guests.erase(guest)


# -- helpers of the source -------------------------------------------------------------------------------------------


class _Link:
    """The way from libvirt on the source to the target.

    :ivar settled: set when the guest was handed over, or stays.
    """

    def __init__(self, path: Path, on_commit: Callable[[], object]) -> None:
        self.path = path
        self.settled = threading.Event()
        self.committed = False
        self.libvirtd: socket.socket | None = None
        self._on_commit = on_commit

    def commit(self) -> None:
        """From now on the guest is the target's."""
        if not self.committed:
            self.committed = True
            self._on_commit()
        self.settled.set()

    def hang_up(self) -> None:
        if self.libvirtd:
            with contextlib.suppress(OSError):
                self.libvirtd.shutdown(socket.SHUT_RDWR)


class _Watched:
    """The connection of libvirt on the source, as a :class:`Stream`, which sees when the guest is handed over:
    libvirt's protocol (``src/rpc/virnetprotocol.x``) says so with a reply of status OK to the procedure
    DOMAIN_MIGRATE_FINISH3_PARAMS. Where this cannot be seen, as in a session that SASL encrypts, the guest stands
    still until libvirt is quite through, which is a little longer."""

    _HEADER = struct.Struct(">IIIIIII")  # length of all, program, version, procedure, type, serial, status
    _PROGRAM, _FINISH3_PARAMS, _REPLY, _OK = 0x20008086, 306, 1, 0
    _LONGEST = 32 << 20  # VIR_NET_MESSAGE_MAX

    def __init__(self, libvirtd: socket.socket, link: _Link) -> None:
        self.recv, self.close, self.fileno = libvirtd.recv, libvirtd.close, libvirtd.fileno
        self._send = libvirtd.sendall
        self._link = link
        self._pending = b""

    def sendall(self, data: bytes, /) -> None:
        self._send(data)
        self._pending += data
        while len(self._pending) >= self._HEADER.size:
            length, program, _, procedure, kind, _, status = self._HEADER.unpack_from(self._pending)
            if not self._HEADER.size <= length <= self._LONGEST:
                self._pending = b""  # not what we take it for
            if len(self._pending) < length:
                return
            self._pending = self._pending[length:]
            if (program, procedure, kind, status) == (self._PROGRAM, self._FINISH3_PARAMS, self._REPLY, self._OK):
                self._link.commit()


class _Sending(threading.Thread):
    """libvirt's call, in a thread that holds the guest's lock until libvirt is through with it: longer than the
    caller waits."""

    def __init__(
        self, guests: Guests, guest: str, link: _Link, described: dict[str, Any], address: str, bandwidth: int
    ) -> None:
        super().__init__(name=f"migration of {guest}", daemon=True)
        self.link = link
        self.failure: OrchestratorError | None = None
        self.disk_bytes = 0
        self._given_up = 0.0
        self._guests, self._guest, self._address = guests, guest, address
        self._dom, view = guests.running(guest)
        disks = any(serial != SEED_DISK for serial in view.disks)
        self._flags = _FLAGS | (libvirt.VIR_MIGRATE_NON_SHARED_INC if disks else 0)
        self._params = {
            libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{address}",
            libvirt.VIR_MIGRATE_PARAM_LISTEN_ADDRESS: address,
            libvirt.VIR_MIGRATE_PARAM_DEST_XML: described["xml"],
            libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: described["persistent"],
            **({libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: bandwidth} if bandwidth else {}),
        }

    def run(self) -> None:
        hint = f"the hosts must reach each other over the underlay, at {self._address} TCP ports {PORTS}"
        try:
            with self._guests.locked(self._guest), libvirt_errors(f"guest {self._guest} stays where it is", hint):
                self._dom.migrateToURI3(f"{SYSTEM_AT}{self.link.path}", self._params, self._flags)
                self.link.commit()
        except OrchestratorError as error:
            self.failure = error
        except Exception as error:
            self.failure = GuestError(f"guest {self._guest}: {error!r}")
        finally:
            self.link.settled.set()

    def abort(self) -> None:
        with contextlib.suppress(libvirt.libvirtError):  # there is nothing yet, or nothing any more
            self._dom.abortJob()

    def give_up(self) -> None:
        """Abort, again and again, as there may have been nothing to abort before. A disk whose other side is silent
        keeps libvirt from that; so after a while the target is hung up on, and ends its QEMU.

        :raise GuestError: not even that has helped.
        """
        self._given_up = self._given_up or time.monotonic()
        waited = time.monotonic() - self._given_up
        self.abort()
        if waited > scaled(ABORT_SECONDS):
            self.link.hang_up()
        if waited > scaled(ABORT_SECONDS + END_SECONDS):
            raise GuestError(
                f"guest {self._guest}: its migration does not end, as the other side is silent; it runs on here",
                hint="libvirt gives up by itself when TCP does, after some minutes",
            )

    def look(self) -> str:
        """What it is doing, in words."""
        try:
            stats = self._dom.jobStats()
        except libvirt.libvirtError:
            return "switching over"
        self.disk_bytes = max(self.disk_bytes, stats.get("disk_processed", 0))
        if stats.get("memory_iteration"):
            sent, left = stats["memory_processed"] >> 20, stats["memory_remaining"] >> 20
            speed = stats.get("memory_bps", 0) >> 20
            return f"memory: {sent} MiB sent, {left} MiB left, {speed} MiB/s, pass {stats['memory_iteration']}"
        if stats.get("disk_total"):
            sent, total = stats["disk_processed"] >> 20, stats["disk_total"] >> 20
            return f"disks: {sent} of {total} MiB, {stats.get('disk_bps', 0) >> 20} MiB/s"
        return "starting it there"


def _is_migrating(dom: libvirt.virDomain) -> bool:
    return tuple(dom.state()) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION)


def _disk(folder: Path, serial: str) -> dict[str, Any]:
    info = disk.info(folder / domain.file_name(serial))
    return {"serial": serial, "size": info["virtual-size"], "used": info["actual-size"]}


def _read_log(log: Path, start: int | None = None) -> tuple[str, int]:
    """The log from byte ``start``, or its last :data:`LOG_BYTES`, as base64, and where it ends."""
    try:
        with open(log, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(start if start is not None and start <= end else 0, end - LOG_BYTES))
            return base64.b64encode(file.read(LOG_BYTES)).decode(), end
    except OSError:
        return "", 0


# -- helpers of the target -------------------------------------------------------------------------------------------


def _view(xml: str) -> DomainView:
    view = domain.parse(xml)
    if view is None:
        raise GuestError("what comes here is no guest of a lab")
    return view


def _emulator(view: DomainView) -> str:
    return view.wish.get("emulator") or accel.DEFAULT_EMULATOR


@contextlib.contextmanager
def _daemon() -> Iterator[socket.socket]:
    """A connection to this host's libvirtd.

    :raise HostError: none listens.
    """
    for path in SYSTEM_SOCKETS:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            if connection.connect_ex(path) == 0:
                yield connection
                return
    raise HostError("no libvirtd listens here", hint="start it: systemctl start libvirtd")
