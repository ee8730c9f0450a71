"""What the agent of a host does with guests: the calls ``guest.*``.

One lock per guest: two calls on one guest follow each other, calls on different guests do not wait for each other.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import base64
import contextlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import libvirt

from orchestrator.errors import GuestError, NotFoundError, OrchestratorError, StateError
from orchestrator.guests import consolelog, domain, qga, snapshots
from orchestrator.guests.consolelog import Consoles
from orchestrator.guests.domain import DomainView, GuestFacts, GuestImage, Identity
from orchestrator.guests.libvirtconn import OFF_REASONS, STATES, Libvirt, libvirt_errors
from orchestrator.hosts import accel
from orchestrator.hosts.rpc import Call, Server, Stream
from orchestrator.images import disk, seed
from orchestrator.paths import make_dir
from orchestrator.patience import Deadline, scaled
from orchestrator.spec.base import format_size
from orchestrator.spec.resolved import ResolvedDisk, ResolvedGuest, ResolvedNic

log = logging.getLogger(__name__)

READY_SECONDS = 60.0
STOP_SECONDS = 20.0
SETTLE_SECONDS = 60.0
PLUG_SECONDS = 10.0
MAX_CMDLINE = 2047  # COMMAND_LINE_SIZE of x86, less the terminating zero
MEMORY_BLOCK = 128 << 20  # Linux on x86 takes plugged memory in blocks of this size
_LIVE_AND_LATER = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG

ONLINE_CPUS = 'for c in /sys/devices/system/cpu/cpu[0-9]*/online; do [ -e "$c" ] && echo 1 > "$c"; done; exit 0'
# $1 MAC, $2 MTU, then pairs: an address in CIDR notation and its gateway or "-"
CONFIGURE_NIC = r"""
mac=$1; mtu=$2; shift 2; n=0
while [ $n -lt 100 ]; do
  for path in /sys/class/net/*; do
    read -r have < "$path/address" && [ "$have" = "$mac" ] && dev=${path##*/} && break 2
  done
  n=$((n + 1)); sleep 0.1
done
[ -n "$dev" ] || { echo "no NIC has the address $mac" >&2; exit 1; }
ip link set "$dev" mtu "$mtu" up || exit 1
while [ $# -gt 1 ]; do
  case $1 in *:*) ip -6 addr replace "$1" dev "$dev" nodad 2>/dev/null || ip -6 addr add "$1" dev "$dev" ;;
    *) ip addr add "$1" dev "$dev" ;;
  esac || exit 1
  [ "$2" = - ] || ip route replace default via "$2" dev "$dev"
  shift 2
done
"""


class GuestService:
    """The guests of one lab on one host."""

    def __init__(self, identity: Identity, uri: str, state_dir: Path, domain_prefix: str) -> None:
        self.identity = identity
        self._prefix = domain_prefix
        self._folder = state_dir / "guests"
        self._views: dict[str, str | None] = {}
        self.libvirt = Libvirt(uri, self._name_of)
        self._locks: dict[str, threading.Lock] = {}
        self._locks_lock = threading.Lock()
        self._consoles = Consoles()
        self._since: dict[str, float] = {}

    def register(self, server: Server) -> None:
        for handler in (
            self.facts,
            self.settle,
            self.start,
            self.wait,
            self.stop,
            self.restart,
            self.update,
            self.remove,
            self.pause,
            self.resume,
            self.exec,
            self.xml,
            self.events,
            self.snapshots,
            self.snapshot_save,
            self.snapshot_restore,
            self.snapshot_delete,
        ):
            server.register(f"guest.{handler.__name__}", handler)
        server.register_stream("guest.console", self.console)
        server.register_stream("guest.log", self.log)

    # -- finding things ------------------------------------------------------------------------------------------

    def _name_of(self, dom: libvirt.virDomain) -> str | None:
        """Guest's name of one of our domains. Remembered, as an event may come when the domain has gone."""
        name = dom.name()
        if name not in self._views:
            try:
                view = domain.parse(dom.XMLDesc())
            except (libvirt.libvirtError, GuestError):
                return None
            self._views[name] = view.name if view and view.identity.uid == self.identity.uid else None
        return self._views[name]

    def _domain_name(self, guest: str) -> str:
        return f"{self._prefix}{guest}"

    def folder(self, guest: str) -> Path:
        return self._folder / guest

    def console_log(self, guest: str) -> Path:
        return self.folder(guest) / "console.log"

    def _started(self, guest: str) -> Path:
        """A file that was last changed when the guest was last started."""
        return self.folder(guest) / "started"

    def _ready(self, guest: str) -> Path:
        """A file that is there when the guest has been ready since its start."""
        return self.folder(guest) / "ready"

    @contextlib.contextmanager
    def _locked(self, guest: str) -> Iterator[None]:
        with self._locks_lock:
            lock = self._locks.setdefault(guest, threading.Lock())
        with lock:
            yield

    def _find(self, guest: str) -> tuple[libvirt.virDomain, DomainView] | None:
        """:raise StateError: a domain of that name is not ours."""
        try:
            dom = self.libvirt.conn.lookupByName(self._domain_name(guest))
            view = domain.parse(dom.XMLDesc())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise GuestError(f"guest {guest}: {error.get_error_message()}") from error
        if view is None or view.identity.uid != self.identity.uid:
            raise StateError(
                f"a domain named {self._domain_name(guest)} is there and is not of this lab",
                hint="rename the guest, or remove that domain with virsh",
            )
        return dom, view

    def _get(self, guest: str) -> tuple[libvirt.virDomain, DomainView]:
        found = self._find(guest)
        if found is None:
            raise NotFoundError(f"there is no guest {guest} on host {self.identity.host}", hint="`orchestrator up`")
        return found

    def _running(self, guest: str) -> tuple[libvirt.virDomain, DomainView]:
        dom, view = self._get(guest)
        if not dom.isActive():
            raise StateError(f"guest {guest} is not running", hint=f"orchestrator start {guest}")
        return dom, view

    # -- facts ---------------------------------------------------------------------------------------------------

    def facts(self, call: Call) -> list[dict[str, Any]]:
        """What is observed of every guest of this lab here."""
        found = []
        with libvirt_errors("the guests cannot be listed"):
            domains = self.libvirt.conn.listAllDomains()
        for dom in domains:
            try:
                view = domain.parse(dom.XMLDesc())
                state, reason = dom.state()
            except libvirt.libvirtError:
                continue  # it went while we looked
            except GuestError as error:
                log.warning("%s", error)  # a damaged domain must not hide the others
                continue
            if view is None or view.identity.uid != self.identity.uid:
                continue
            found.append(self._facts(view, state, reason).to_json())
        return found

    def settle(self, call: Call) -> None:
        """Wait until no call works on a guest. Whoever holds the lab alone asks this before looking: a command that
        was killed a moment ago may have left a call that is just being taken back.

        :raise GuestError: a call does not end.
        """
        deadline = Deadline(scaled(SETTLE_SECONDS))
        with self._locks_lock:
            locks = dict(self._locks)
        for guest, lock in locks.items():
            if not lock.acquire(timeout=deadline.left):
                raise GuestError(f"guest {guest}: an earlier command still works on it", hint="try again in a minute")
            lock.release()

    def _facts(self, view: DomainView, state: int, reason: int) -> GuestFacts:
        word = STATES.get(state, "unknown")
        why = OFF_REASONS.get(reason, "") if word == "off" else ""
        console = self.console_log(view.name)
        panicked = consolelog.panic(console) if word in ("running", "off", "crashed") else None
        if why in ("crashed", "lost", "failed") or (panicked and word == "off"):
            word = "crashed"
        elif panicked and word == "running":
            word, why = "crashed", panicked
        return GuestFacts(
            name=view.name,
            host=self.identity.host,
            state=word,
            reason=why,
            ready=word == "running" and self._is_ready(view, view.ready),
            wish=view.wish,
            image=view.image,
            accel=view.accel,
            vcpus=view.vcpus,
            memory=view.memory,
            memory_total=view.memory_total,
            nics=view.nics,
            disks=[serial for serial in view.disks if serial not in (domain.ROOT_DISK, domain.SEED_DISK)],
            tail=consolelog.tail(console) if word == "crashed" else [],
            since=_modified(self._started(view.name)) if word == "running" else None,
        )

    def _is_ready(self, view: DomainView, ready: str) -> bool:
        if ready == "agent":
            return view.agent_connected
        if self._ready(view.name).exists():
            return True
        if ready.startswith("console:"):
            raw = consolelog.tail_bytes(self.console_log(view.name))
            return re.search(ready.removeprefix("console:"), "\n".join(consolelog.clean(raw))) is not None
        return True

    # -- start ---------------------------------------------------------------------------------------------------

    def start(
        self, call: Call, guest: dict[str, Any], image: dict[str, Any], keys: list[str], fresh: bool = False
    ) -> str | None:
        """Make the guest run as wished and wait until it is ready. Where it is cancelled on the way, a guest that
        this call made is removed again. Returns why it does not run under KVM, where it asked for the best there is.

        :param keys: SSH public keys for the guest's root.
        :param fresh: give up the contents of the guest's own disk first.
        :raise GuestError: it does not start, panics, or is not ready in time.
        """
        wish, files = ResolvedGuest.model_validate(guest), GuestImage(**image)
        call.on_cancel(self.libvirt.poke)
        with self._locked(wish.name):
            was_there = self._find(wish.name) is not None
            had_files = self.folder(wish.name).exists()  # a reboot takes the domain and leaves the disks
            try:
                return self._start(call, wish, files, keys, fresh)
            except OrchestratorError:
                if call.cancelled and not was_there:
                    self._remove(wish.name, keep_disks=had_files)
                raise

    def _start(
        self, call: Call, wish: ResolvedGuest, image: GuestImage, keys: Sequence[str], fresh: bool
    ) -> str | None:
        found = self._find(wish.name)
        if not (found and found[0].isActive()):
            call.progress("preparing")
            dom = self._define(wish, image, keys, fresh)
            call.check()
            call.progress("starting")
            consolelog.rotate(self.console_log(wish.name))
            with libvirt_errors(f"guest {wish.name} does not start", hint="`orchestrator doctor` tells more"):
                dom.create()
            self._started(wish.name).touch()
            self._ready(wish.name).unlink(missing_ok=True)
        self._wait(call, wish, image)
        chosen, reason = accel.choose(wish.accel, wish.emulator or accel.DEFAULT_EMULATOR)
        return reason if wish.accel == "auto" and chosen != "kvm" else None

    def _define(
        self, wish: ResolvedGuest, image: GuestImage, keys: Sequence[str], fresh: bool = False
    ) -> libvirt.virDomain:
        accelerator, _ = accel.choose(wish.accel, wish.emulator or accel.DEFAULT_EMULATOR)
        folder = make_dir(self.folder(wish.name))
        cmdline = self._prepare_files(folder, wish, image, keys, fresh)
        emulator = shutil.which(wish.emulator or accel.DEFAULT_EMULATOR)
        if emulator is None:
            raise GuestError(
                f"guest {wish.name}: {wish.emulator or accel.DEFAULT_EMULATOR} is not there",
                hint="install QEMU (Debian and Ubuntu: qemu-system-x86), or set `emulator:`",
            )
        self._check_fits(wish)
        xml = domain.render(
            wish,
            image,
            self.identity,
            domain_name=self._domain_name(wish.name),
            accel=accelerator,
            emulator=emulator,
            folder=folder,
            cmdline=cmdline,
        )
        with libvirt_errors(f"guest {wish.name}: libvirt refuses its definition", hint="see `orchestrator inspect`"):
            return self.libvirt.conn.defineXML(xml)

    def _check_fits(self, wish: ResolvedGuest) -> None:
        available = next(
            int(line.split()[1]) << 10
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemAvailable:")
        )
        if wish.memory > available:
            raise GuestError(
                f"guest {wish.name} wants {format_size(wish.memory)}, "
                f"host {self.identity.host} has {available >> 20}M available",
                hint="give it less memory, or put it on another host",
            )

    def _prepare_files(
        self, folder: Path, wish: ResolvedGuest, image: GuestImage, keys: Sequence[str], fresh: bool
    ) -> str:
        """Disks and seed. Returns the kernel's command line."""
        root = folder / "root.qcow2"
        if image.disk:
            if fresh:
                root.unlink(missing_ok=True)
            if root.exists() and disk.backing_file(root) != Path(image.disk):
                raise StateError(
                    f"guest {wish.name}: its disk lies on another image than {image.id}",
                    hint="`orchestrator up --yes` recreates it; its contents are lost",
                )
            if not root.exists():
                disk.create_overlay(Path(image.disk), image.disk_format or "qcow2", root, wish.disk_size)
            self._give_to_qemu(root)
        wanted = {domain.disk_file(folder, extra): extra for extra in wish.disks}
        for file in folder.glob("disk-*.qcow2"):
            if file not in wanted or (fresh and disk.info(file)["virtual-size"] != wanted[file].size):
                file.unlink()
        for extra in wish.disks:
            self._ensure_disk(folder, extra)
        nics = [_seed_nic(nic) for nic in wish.nics]
        words = [image.cmdline]
        if image.cloud_init:
            meta, user, network = seed.render_seed(
                hostname=wish.name, ssh_keys=list(keys), nics=nics, user_data=wish.user_data
            )
            disk.create_seed(folder / "seed.iso", meta, user, network)
        elif image.kernel:
            words.append(seed.tiny_cmdline(hostname=wish.name, ssh_keys=list(keys), nics=nics))
        cmdline = " ".join(word for word in (*words, wish.cmdline) if word)
        length = len(cmdline.encode())
        if length > MAX_CMDLINE:
            raise GuestError(
                f"guest {wish.name}: the kernel command line has {length} bytes; at most {MAX_CMDLINE} work",
                hint="shorten `cmdline`, or give the guest fewer NICs",
            )
        return cmdline

    def _ensure_disk(self, folder: Path, wanted: ResolvedDisk) -> Path:
        file = domain.disk_file(folder, wanted)
        if not file.exists():
            disk.create_empty(file, wanted.size)
        self._give_to_qemu(file)
        return file

    def _give_to_qemu(self, file: Path) -> None:
        """libvirt runs QEMU as another user and, in the agent, is told to leave owners alone."""
        user = accel.emulator_user()
        if user and os.geteuid() == 0:
            shutil.chown(file, user)

    # -- waiting until it is up ----------------------------------------------------------------------------------

    def wait(self, call: Call, guest: dict[str, Any], image: dict[str, Any], **_: Any) -> None:
        """Wait until a running guest is ready."""
        call.on_cancel(self.libvirt.poke)
        self._wait(call, ResolvedGuest.model_validate(guest), GuestImage(**image))

    def _wait(self, call: Call, wish: ResolvedGuest, image: GuestImage) -> None:
        ready = wish.ready or image.ready
        if ready == "none":
            return
        dom, view = self._get(wish.name)
        deadline = Deadline(scaled(READY_SECONDS, emulated=view.accel == "tcg"))
        log = self.console_log(wish.name)
        what = "its guest agent" if ready == "agent" else f"{ready.removeprefix('console:')!r} on its console"
        failure: str | None = None

        def settled() -> bool:
            nonlocal failure
            call.check()
            last = consolelog.tail(log, 1)
            call.progress(f"waiting for {what}" + (f" · {last[0][:60]}" if last else ""))
            if words := consolelog.panic(log):
                failure = words
            elif not dom.isActive():
                failure = "it stopped"
            else:
                current = domain.parse(dom.XMLDesc())
                return current is not None and self._is_ready(current, ready)
            return True

        with libvirt_errors(f"guest {wish.name}"), consolelog.watching(log, self.libvirt.poke):
            in_time = self.libvirt.wait(settled, deadline)
        if failure is None and in_time:
            self._ready(wish.name).touch()
            return
        if consolelog.panic(log):
            self._destroy(dom)  # a kernel that has panicked spins for ever
        raise GuestError(
            f"guest {wish.name}: {failure}"
            if failure
            else f"guest {wish.name}: {what} did not come within {deadline.seconds:.0f} s",
            tail=consolelog.tail(log),
            hint=f"orchestrator console {wish.name}" if in_time is False else f"orchestrator logs {wish.name}",
        )

    # -- stop and remove -----------------------------------------------------------------------------------------

    def stop(self, call: Call, guest: str, timeout: float = STOP_SECONDS, hard: bool = False) -> str:
        """Ask the guest to shut down; after ``timeout`` seconds stop it. Returns how it ended."""
        call.on_cancel(self.libvirt.poke)
        with self._locked(guest):
            return self._stop(call, guest, timeout, hard)

    def _stop(self, call: Call, guest: str, timeout: float, hard: bool) -> str:
        dom, view = self._get(guest)
        if not dom.isActive():
            return "off"
        if (
            not hard
            and not consolelog.panic(self.console_log(guest))
            and dom.state()[0] == libvirt.VIR_DOMAIN_RUNNING
        ):
            call.progress("waiting for it to shut down")
            mode = (
                libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT
                if view.agent_connected
                else libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN
            )

            def off() -> bool:
                call.check()
                return not dom.isActive()

            try:
                dom.shutdownFlags(mode)
            except libvirt.libvirtError:
                pass  # an agent that does not answer: the hard stop follows
            else:
                if self.libvirt.wait(off, Deadline(scaled(timeout))):
                    return "shut down"
        call.progress("stopping it hard")
        self._destroy(dom)
        return "stopped"

    @staticmethod
    def _destroy(dom: libvirt.virDomain) -> None:
        try:
            dom.destroy()
        except libvirt.libvirtError as error:
            if dom.isActive():  # it may have ended by itself meanwhile
                raise GuestError(f"domain {dom.name()}: {error.get_error_message()}") from error

    def restart(
        self,
        call: Call,
        guest: dict[str, Any],
        image: dict[str, Any],
        keys: list[str],
        fresh: bool = False,
        timeout: float = STOP_SECONDS,
        hard: bool = False,
    ) -> str | None:
        """Stop, define anew, start, wait until ready; returns what :meth:`start` does."""
        wish = ResolvedGuest.model_validate(guest)
        call.on_cancel(self.libvirt.poke)
        with self._locked(wish.name):
            if self._find(wish.name):
                self._stop(call, wish.name, timeout, hard)
            return self._start(call, wish, GuestImage(**image), keys, fresh)

    def remove(self, call: Call, guest: str, keep_disks: bool = False) -> None:
        """Stop the guest hard and remove its domain and files; does nothing where there is nothing."""
        with self._locked(guest):
            self._remove(guest, keep_disks)

    def _remove(self, guest: str, keep_disks: bool) -> None:
        found = self._find(guest)
        if found:
            dom, _ = found
            with libvirt_errors(f"guest {guest} cannot be removed"):
                if dom.isActive():
                    self._destroy(dom)
                dom.undefineFlags(
                    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
                )
            self._views.pop(self._domain_name(guest), None)
        if not keep_disks:
            shutil.rmtree(self.folder(guest), ignore_errors=True)

    # -- changes while it runs -----------------------------------------------------------------------------------

    def update(self, call: Call, guest: dict[str, Any], image: dict[str, Any]) -> None:
        """Make a running guest's vCPUs, memory, NICs and disks as wished, and remember the wish.

        :raise GuestError: the guest does not follow, for example it keeps a device.
        """
        wish = ResolvedGuest.model_validate(guest)
        call.on_cancel(self.libvirt.poke)
        with self._locked(wish.name), libvirt_errors(f"guest {wish.name} cannot be changed while it runs"):
            dom, view = self._running(wish.name)
            self._update_nics(call, dom, view, wish)
            self._update_disks(call, dom, view, wish)
            if view.vcpus != wish.vcpus:
                self._update_vcpus(call, dom, wish)
            if view.memory != wish.memory:
                self._update_memory(call, dom, view, wish)
            dom.setMetadata(
                libvirt.VIR_DOMAIN_METADATA_ELEMENT,
                domain.metadata_xml(wish, GuestImage(**image), self.identity),
                "orchestrator",
                domain.NAMESPACE,
                _LIVE_AND_LATER,
            )

    def _settle(self, call: Call, done: Callable[[], bool], what: str, guest: str) -> None:
        def check() -> bool:
            call.check()
            return done()

        deadline = Deadline(scaled(PLUG_SECONDS, emulated=True))
        call.progress(f"waiting for {what}")
        if not self.libvirt.wait(check, deadline, every=0.5):
            raise GuestError(
                f"guest {guest}: {what} did not happen within {deadline.seconds:.0f} s",
                hint=f"the guest's kernel must support it; or apply it with `orchestrator restart {guest}`",
                tail=consolelog.tail(self.console_log(guest), 5),
            )

    def _view(self, dom: libvirt.virDomain) -> DomainView:
        view = domain.parse(dom.XMLDesc())
        if view is None:
            raise GuestError(f"domain {dom.name()} lost its mark")
        return view

    def _update_nics(self, call: Call, dom: libvirt.virDomain, view: DomainView, wish: ResolvedGuest) -> None:
        wanted = {nic.mac: nic for nic in wish.nics}
        for mac in view.nics:
            if mac not in wanted:
                call.progress(f"unplugging NIC {mac}")
                dom.detachDeviceFlags(
                    f'<interface type="ethernet"><mac address="{mac}"/></interface>', _LIVE_AND_LATER
                )
                self._settle(
                    call,
                    partial(self._without_nic, dom, mac),
                    f"NIC {mac} to be released",
                    wish.name,
                )
        for mac, nic in wanted.items():
            if mac not in view.nics:
                call.progress(f"plugging NIC {mac}")
                dom.attachDeviceFlags(domain.interface_xml(nic), _LIVE_AND_LATER)
                if view.agent_connected:
                    self._configure_nic(call, dom, nic)

    def _without_nic(self, dom: libvirt.virDomain, mac: str) -> bool:
        return mac not in self._view(dom).nics

    def _without_disk(self, dom: libvirt.virDomain, serial: str) -> bool:
        return serial not in self._view(dom).disks

    def _configure_nic(self, call: Call, dom: libvirt.virDomain, nic: ResolvedNic) -> None:
        pairs = [
            word
            for address, gateway in ((nic.ipv4, nic.gateway4), (nic.ipv6, nic.gateway6))
            if address
            for word in (address, gateway or "-")
        ]
        argv = ["/bin/sh", "-c", CONFIGURE_NIC, "configure-nic", nic.mac, str(nic.mtu), *pairs]
        output = qga.execute(dom, argv, deadline=Deadline(scaled(30, emulated=True)), check=call.check)
        if output.status:
            raise GuestError(
                f"guest {dom.name()}: NIC {nic.mac} is plugged but could not be configured",
                tail=output.stderr.decode(errors="replace").splitlines()[-5:],
            )

    def _update_disks(self, call: Call, dom: libvirt.virDomain, view: DomainView, wish: ResolvedGuest) -> None:
        ours = {serial for serial in view.disks if serial not in (domain.ROOT_DISK, domain.SEED_DISK)}
        wanted = {extra.name: extra for extra in wish.disks}
        folder = self.folder(wish.name)
        for serial in ours - set(wanted):
            call.progress(f"unplugging disk {serial}")
            target = view.disks[serial]
            dom.detachDeviceFlags(f'<disk type="file" device="disk"><target dev="{target}"/></disk>', _LIVE_AND_LATER)
            self._settle(
                call,
                partial(self._without_disk, dom, serial),
                f"disk {serial} to be released",
                wish.name,
            )
            (folder / f"disk-{serial}.qcow2").unlink(missing_ok=True)
        for name, extra in wanted.items():
            if name not in ours:
                call.progress(f"plugging disk {name}")
                file = self._ensure_disk(folder, extra)
                target = self._free_target(self._view(dom), extra.bus)
                dom.attachDeviceFlags(domain.disk_xml(file, name, extra.bus, target), _LIVE_AND_LATER)

    @staticmethod
    def _free_target(view: DomainView, bus: str) -> str:
        taken = set(view.disks.values())
        return next(target for index in range(26) if (target := domain.disk_target("", bus, index)) not in taken)

    def _update_vcpus(self, call: Call, dom: libvirt.virDomain, wish: ResolvedGuest) -> None:
        call.progress(f"vCPUs: {wish.vcpus}")
        dom.setVcpusFlags(wish.vcpus, _LIVE_AND_LATER)
        self._settle(call, lambda: self._view(dom).vcpus == wish.vcpus, f"{wish.vcpus} vCPUs", wish.name)
        if self._view(dom).agent_connected:
            deadline = Deadline(scaled(30, emulated=True))
            qga.execute(dom, ["/bin/sh", "-c", ONLINE_CPUS], deadline=deadline, check=call.check)

    def _update_memory(self, call: Call, dom: libvirt.virDomain, view: DomainView, wish: ResolvedGuest) -> None:
        missing = wish.memory - view.memory_total
        if missing > 0:
            size = -(-missing // MEMORY_BLOCK) * MEMORY_BLOCK
            call.progress(f"plugging {format_size(size)} of memory")
            dom.attachDeviceFlags(
                f'<memory model="dimm" access="shared"><target><size unit="KiB">{size >> 10}</size>'
                "<node>0</node></target></memory>",
                _LIVE_AND_LATER,
            )
        dom.setMemoryFlags(wish.memory >> 10, _LIVE_AND_LATER)
        self._settle(
            call,
            lambda: abs(self._view(dom).memory - wish.memory) < 1 << 20,
            f"its memory to become {format_size(wish.memory)}",
            wish.name,
        )

    def pause(self, call: Call, guest: str) -> None:
        with self._locked(guest), libvirt_errors(f"guest {guest} cannot be paused"):
            dom, _ = self._running(guest)
            if dom.state()[0] != libvirt.VIR_DOMAIN_PAUSED:
                dom.suspend()

    def resume(self, call: Call, guest: str) -> None:
        with self._locked(guest), libvirt_errors(f"guest {guest} cannot go on"):
            dom, _ = self._running(guest)
            if dom.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                dom.resume()

    # -- using it ------------------------------------------------------------------------------------------------

    def exec(self, call: Call, guest: str, argv: list[str], feed: str = "", timeout: float = 60) -> dict[str, Any]:
        """Run a program in the guest by its guest agent; ``feed`` and the output are base64.

        :param timeout: seconds.
        """
        dom, view = self._running(guest)
        if not view.agent_connected:
            raise GuestError(
                f"guest {guest}: its guest agent is not connected",
                hint=f"it may still boot, or its image has none: `orchestrator console {guest}`",
            )
        output = qga.execute(
            dom, argv, feed=base64.b64decode(feed), deadline=Deadline(scaled(timeout)), check=call.check
        )
        return {
            "status": output.status,
            "stdout": base64.b64encode(output.stdout).decode(),
            "stderr": base64.b64encode(output.stderr).decode(),
            "truncated": output.truncated,
        }

    def xml(self, call: Call, guest: str) -> str:
        """The domain's XML as libvirt has it."""
        dom, _ = self._get(guest)
        with libvirt_errors(f"guest {guest}"):
            return str(dom.XMLDesc())

    def console(self, open_stream: Callable[[], Stream], guest: str, force: bool = False) -> None:
        _, view = self._running(guest)
        if view.console_path is None:
            raise GuestError(f"guest {guest} has no console")
        self._consoles.attach(guest, view.console_path, open_stream, force=force)

    def log(
        self, open_stream: Callable[[], Stream], guest: str, lines: int | None = None, follow: bool = False
    ) -> None:
        self._get(guest)
        log = self.console_log(guest)
        if not log.exists():
            raise NotFoundError(f"guest {guest} has no console log yet", hint=f"orchestrator start {guest}")
        consolelog.follow(log, open_stream(), lines=lines, keep_on=follow)

    def events(self, call: Call, after: int | None = None, timeout: float = 0) -> dict[str, Any]:
        """Events after number ``after`` (None: only what comes from now on); waits up to ``timeout`` seconds."""
        call.on_cancel(self.libvirt.poke)
        if after is None:
            return {"seq": self.libvirt.sequence, "events": []}
        events = self.libvirt.wait_events(after, min(timeout, 60.0))
        return {"seq": events[-1]["seq"] if events else after, "events": events}

    # -- snapshots -----------------------------------------------------------------------------------------------

    def snapshots(self, call: Call, guest: str) -> list[dict[str, Any]]:
        self._get(guest)
        return [snapshot.to_json() for snapshot in snapshots.list_all(self.folder(guest))]

    def snapshot_save(self, call: Call, guest: str, name: str, description: str = "") -> dict[str, Any]:
        with self._locked(guest), libvirt_errors(f"guest {guest}: snapshot {name} cannot be saved"):
            dom, view = self._running(guest)
            snapshot = snapshots.save(dom, view, self.folder(guest), name, description, call.progress)
            return snapshot.to_json()

    def snapshot_restore(self, call: Call, guest: str, name: str) -> None:
        with self._locked(guest), libvirt_errors(f"guest {guest}: snapshot {name} cannot be restored"):
            dom, view = self._get(guest)
            snapshots.restore(self.libvirt.conn, dom, view, self.folder(guest), name, call.progress)
            self._started(guest).touch()

    def snapshot_delete(self, call: Call, guest: str, name: str) -> None:
        with self._locked(guest):
            dom, _ = self._get(guest)
            snapshots.delete(dom, self.folder(guest), name)


def _modified(file: Path) -> float | None:
    """Seconds since the epoch; None where there is no such file."""
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def _seed_nic(nic: ResolvedNic) -> seed.SeedNic:
    return seed.SeedNic(
        mac=nic.mac, ipv4=nic.ipv4, gateway4=nic.gateway4, ipv6=nic.ipv6, gateway6=nic.gateway6, mtu=nic.mtu
    )
