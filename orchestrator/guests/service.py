"""What the agent of a host does with guests: the calls ``guest.*``.

One lock per guest: two calls on one guest follow each other, calls on different guests do not wait for each other.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import base64
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import libvirt

from orchestrator.errors import GuestError, NotFoundError, OrchestratorError, StateError
from orchestrator.guests import consolelog, domain, qga, snapshots
from orchestrator.guests.base import Guests
from orchestrator.guests.consolelog import Consoles
from orchestrator.guests.domain import MIGRATING, DomainView, GuestFacts, GuestImage, Identity
from orchestrator.guests.libvirtconn import OFF_REASONS, STATES, Libvirt, libvirt_errors, processor_seconds
from orchestrator.guests.migrationservice import MigrationService
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


class GuestService(Guests):
    """The guests of one lab on one host."""

    def __init__(self, identity: Identity, uri: str, state_dir: Path, domain_prefix: str) -> None:
        super().__init__(identity, state_dir, domain_prefix)
        self.libvirt = Libvirt(uri, self._name_of)
        self._consoles = Consoles()
        self.migrations = MigrationService(self, uri)

    def register(self, server: Server) -> None:
        for handler in (
            self.facts,
            self.settle,
            self.start,
            self.wait,
            self.stop,
            self.restart,
            self.update,
            self.unplug,
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
        self.migrations.register(server)

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
        for guest in locks:
            with self.locked(guest, deadline.left):
                pass
        self.migrations.sweep()

    def _facts(self, view: DomainView, state: int, reason: int) -> GuestFacts:
        word = STATES.get(state, "unknown")
        why = OFF_REASONS.get(reason, "") if word == "off" else ""
        if word == "paused" and reason == libvirt.VIR_DOMAIN_PAUSED_MIGRATION:
            why = MIGRATING
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
            ready=word == "running" and self.is_ready(view, view.ready),
            wish=view.wish,
            image=view.image,
            accel=view.accel,
            vcpus=view.vcpus,
            memory=view.memory,
            memory_total=view.memory_total,
            nics=view.nics,
            disks=[serial for serial in view.disks if serial not in (domain.ROOT_DISK, domain.SEED_DISK)],
            tail=consolelog.tail(console) if word == "crashed" else [],
            since=_modified(self.started(view.name)) if word == "running" else None,
            snapshots=[snapshot.name for snapshot in snapshots.list_all(self.folder(view.name))],
            arriving_from=self.arriving_from(view.name),
        )

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
        with self.locked(wish.name):
            was_there = self.find(wish.name) is not None
            had_files = self.folder(wish.name).exists()  # a reboot takes the domain and leaves the disks
            try:
                return self._start(call, wish, files, keys, fresh)
            except OrchestratorError:
                if call.cancelled and not was_there:
                    self.erase(wish.name, keep_disks=had_files)
                raise

    def _start(
        self, call: Call, wish: ResolvedGuest, image: GuestImage, keys: Sequence[str], fresh: bool
    ) -> str | None:
        found = self.find(wish.name)
        booting = not (found and found[0].isActive())
        if booting:
            call.progress("preparing")
            dom = self._define(wish, image, keys, fresh)
            call.check()
            call.progress("starting")
            consolelog.rotate(self.console_log(wish.name))
            with libvirt_errors(f"guest {wish.name} does not start", hint="`orchestrator doctor` tells more"):
                dom.create()
            self.started(wish.name).touch()
            self.ready(wish.name).unlink(missing_ok=True)
        self._wait(call, wish, image, booting=booting)
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
        self.check_fits(wish.name, wish.memory)
        xml = domain.render(
            wish,
            image,
            self.identity,
            domain_name=self.domain_name(wish.name),
            accel=accelerator,
            emulator=emulator,
            folder=folder,
            cmdline=cmdline,
        )
        with libvirt_errors(f"guest {wish.name}: libvirt refuses its definition", hint="see `orchestrator inspect`"):
            return self.libvirt.conn.defineXML(xml)

    def _prepare_files(
        self, folder: Path, wish: ResolvedGuest, image: GuestImage, keys: Sequence[str], fresh: bool
    ) -> str:
        """Disks and seed. Returns the kernel's command line."""
        root = folder / domain.file_name(domain.ROOT_DISK)
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
            self.give_to_qemu(root)
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
            disk.create_seed(folder / domain.file_name(domain.SEED_DISK), meta, user, network)
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
        self.give_to_qemu(file)
        return file

    # -- waiting until it is up ----------------------------------------------------------------------------------

    def wait(self, call: Call, guest: dict[str, Any], image: dict[str, Any], **_: Any) -> None:
        """Wait until a running guest is ready."""
        call.on_cancel(self.libvirt.poke)
        self._wait(call, ResolvedGuest.model_validate(guest), GuestImage(**image))

    def _wait(self, call: Call, wish: ResolvedGuest, image: GuestImage, *, booting: bool = False) -> None:
        """:param booting: this call has started it, so nothing is lost where it has to start once more."""
        ready = wish.ready or image.ready
        if ready == "none":
            return
        _, view = self.get(wish.name)
        deadline = Deadline(scaled(READY_SECONDS, emulated=view.accel == "tcg"))
        console = self.console_log(wish.name)
        what = "its guest agent" if ready == "agent" else f"{ready.removeprefix('console:')!r} on its console"
        failure: str | None = None

        def settled() -> bool:
            nonlocal failure
            call.check()
            last = consolelog.tail(console, 1)
            call.progress(f"waiting for {what}" + (f" · {last[0][:60]}" if last else ""))
            try:
                dom, current = self.get(wish.name)  # anew each time, as libvirt may have gone and come back
                if words := consolelog.panic(console):
                    failure = words
                elif not dom.isActive():
                    failure = "it stopped"
                else:
                    return self.is_ready(current, ready)
            except (GuestError, libvirt.libvirtError):
                if self.libvirt.alive:
                    raise
                return False
            return True

        with libvirt_errors(f"guest {wish.name}"):
            with consolelog.watching(console, self.libvirt.poke):
                in_time = self.libvirt.wait(settled, Deadline(deadline.seconds / 2))
                if not in_time and booting and image.kernel and not consolelog.tail(console, 1):
                    # An emulated processor may hang in the first moments of a kernel (docs/lab-hosts.md).
                    log.warning("guest %s: nothing on its console yet: it is reset, once", wish.name)
                    call.progress("nothing on its console yet: resetting it, once")
                    self.get(wish.name)[0].reset()
                    deadline = Deadline(deadline.seconds)
                in_time = in_time or self.libvirt.wait(settled, deadline)
            if not in_time:
                used = processor_seconds(self.get(wish.name)[0])
                failure = f"{what} did not come within {deadline.seconds:.0f} s ({used:.0f} s of processor time)"
        if failure is None:
            self.ready(wish.name).touch()
            return
        if consolelog.panic(console):
            self.destroy(self.get(wish.name)[0])  # a kernel that has panicked spins for ever
        raise GuestError(
            f"guest {wish.name}: {failure}",
            tail=consolelog.tail(console) or ["(nothing on its console)"],
            hint=f"orchestrator console {wish.name}" if not in_time else f"orchestrator logs {wish.name}",
        )

    # -- stop and remove -----------------------------------------------------------------------------------------

    def stop(self, call: Call, guest: str, timeout: float = STOP_SECONDS, hard: bool = False) -> str:
        """Ask the guest to shut down; after ``timeout`` seconds stop it. Returns how it ended."""
        call.on_cancel(self.libvirt.poke)
        with self.locked(guest):
            return self._stop(call, guest, timeout, hard)

    def _stop(self, call: Call, guest: str, timeout: float, hard: bool) -> str:
        dom, view = self.get(guest)
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
        self.destroy(dom)
        return "stopped"

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
        with self.locked(wish.name):
            if self.find(wish.name):
                self._stop(call, wish.name, timeout, hard)
            return self._start(call, wish, GuestImage(**image), keys, fresh)

    def remove(self, call: Call, guest: str, keep_disks: bool = False) -> None:
        """Stop the guest hard and remove its domain and files; does nothing where there is nothing."""
        with self.locked(guest):
            self.erase(guest, keep_disks=keep_disks)

    # -- changes while it runs -----------------------------------------------------------------------------------

    def update(self, call: Call, guest: dict[str, Any], image: dict[str, Any]) -> None:
        """Make a running guest's vCPUs, memory, NICs and disks as wished, and remember the wish.

        :raise GuestError: the guest does not follow, for example it keeps a device.
        """
        wish = ResolvedGuest.model_validate(guest)
        call.on_cancel(self.libvirt.poke)
        with self.locked(wish.name), libvirt_errors(f"guest {wish.name} cannot be changed while it runs"):
            dom, view = self.running(wish.name)
            self._update_nics(call, dom, view, wish)
            self._update_disks(call, dom, view, wish)
            if view.vcpus != wish.vcpus:
                self._update_vcpus(call, dom, wish)
            if view.memory != wish.memory:
                self._update_memory(call, dom, view, wish)
            self._remember(dom, wish, image["id"], wish.ready or image["ready"])

    def unplug(self, call: Call, guest: str, nics: list[str], disks: list[str]) -> None:
        """Take NICs, by MAC, and disks, by name, from a running guest; the disks' contents are removed."""
        call.on_cancel(self.libvirt.poke)
        with self.locked(guest), libvirt_errors(f"guest {guest} cannot be changed while it runs"):
            dom, view = self.running(guest)
            for mac in nics:
                self._unplug_nic(call, dom, view, mac)
            for serial in disks:
                self._unplug_disk(call, dom, view, serial)
            wish = ResolvedGuest.model_validate(view.wish)
            left = {
                "nics": [nic for nic in wish.nics if nic.mac not in nics],
                "disks": [extra for extra in wish.disks if extra.name not in disks],
            }
            self._remember(dom, wish.model_copy(update=left), view.image, view.ready)

    def _remember(self, dom: libvirt.virDomain, wish: ResolvedGuest, image_id: str, ready: str) -> None:
        dom.setMetadata(
            libvirt.VIR_DOMAIN_METADATA_ELEMENT,
            domain.metadata_xml(wish, image_id, ready, self.identity),
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
                self._unplug_nic(call, dom, view, mac)
        for mac, nic in wanted.items():
            if mac not in view.nics:
                call.progress(f"plugging NIC {mac}")
                dom.attachDeviceFlags(domain.interface_xml(nic, self.identity), _LIVE_AND_LATER)
                if view.agent_connected:
                    self._configure_nic(call, dom, nic)

    def _unplug_nic(self, call: Call, dom: libvirt.virDomain, view: DomainView, mac: str) -> None:
        if mac not in view.nics:
            return
        call.progress(f"unplugging NIC {mac}")
        dom.detachDeviceFlags(f'<interface type="ethernet"><mac address="{mac}"/></interface>', _LIVE_AND_LATER)
        self._settle(call, partial(self._without_nic, dom, mac), f"NIC {mac} to be released", view.name)

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
            self._unplug_disk(call, dom, view, serial)
        for name, extra in wanted.items():
            if name not in ours:
                call.progress(f"plugging disk {name}")
                file = self._ensure_disk(folder, extra)
                target = self._free_target(self._view(dom), extra.bus)
                dom.attachDeviceFlags(domain.disk_xml(file, name, extra.bus, target), _LIVE_AND_LATER)

    def _unplug_disk(self, call: Call, dom: libvirt.virDomain, view: DomainView, serial: str) -> None:
        if target := view.disks.get(serial):
            call.progress(f"unplugging disk {serial}")
            dom.detachDeviceFlags(f'<disk type="file" device="disk"><target dev="{target}"/></disk>', _LIVE_AND_LATER)
            self._settle(call, partial(self._without_disk, dom, serial), f"disk {serial} to be released", view.name)
        (self.folder(view.name) / domain.file_name(serial)).unlink(missing_ok=True)

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
        with self.locked(guest), libvirt_errors(f"guest {guest} cannot be paused"):
            dom, _ = self.running(guest)
            if dom.state()[0] != libvirt.VIR_DOMAIN_PAUSED:
                dom.suspend()

    def resume(self, call: Call, guest: str) -> None:
        with self.locked(guest), libvirt_errors(f"guest {guest} cannot go on"):
            dom, _ = self.running(guest)
            if dom.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                dom.resume()

    # -- using it ------------------------------------------------------------------------------------------------

    def exec(self, call: Call, guest: str, argv: list[str], feed: str = "", timeout: float = 60) -> dict[str, Any]:
        """Run a program in the guest by its guest agent; ``feed`` and the output are base64.

        :param timeout: seconds.
        """
        dom, view = self.running(guest)
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
        dom, _ = self.get(guest)
        with libvirt_errors(f"guest {guest}"):
            return str(dom.XMLDesc())

    def console(self, open_stream: Callable[[], Stream], guest: str, force: bool = False) -> None:
        _, view = self.running(guest)
        if view.console_path is None:
            raise GuestError(f"guest {guest} has no console")
        self._consoles.attach(guest, view.console_path, open_stream, force=force)

    def log(
        self, open_stream: Callable[[], Stream], guest: str, lines: int | None = None, follow: bool = False
    ) -> None:
        self.get(guest)
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
        self.get(guest)
        return [snapshot.to_json() for snapshot in snapshots.list_all(self.folder(guest))]

    def snapshot_save(self, call: Call, guest: str, name: str, description: str = "") -> dict[str, Any]:
        with self.locked(guest), libvirt_errors(f"guest {guest}: snapshot {name} cannot be saved"):
            dom, view = self.running(guest)
            snapshot = snapshots.save(dom, view, self.folder(guest), name, description, call.progress)
            return snapshot.to_json()

    def snapshot_restore(self, call: Call, guest: str, name: str) -> None:
        with self.locked(guest), libvirt_errors(f"guest {guest}: snapshot {name} cannot be restored"):
            dom, view = self.get(guest)
            snapshots.restore(self.libvirt.conn, dom, view, self.folder(guest), name, call.progress)
            self.started(guest).touch()

    def snapshot_delete(self, call: Call, guest: str, name: str) -> None:
        with self.locked(guest):
            dom, _ = self.get(guest)
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
