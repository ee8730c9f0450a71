"""The guests of one lab on one host: their domains, their files, and a lock for each."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import libvirt

from orchestrator.errors import GuestError, NotFoundError, StateError
from orchestrator.guests import consolelog, domain
from orchestrator.guests.domain import DomainView, Identity
from orchestrator.guests.libvirtconn import Libvirt, libvirt_errors
from orchestrator.hosts import accel
from orchestrator.spec.base import format_size


class Guests:
    """What every call on guests needs.

    :param domain_prefix: domain's name = prefix + guest's name.
    """

    def __init__(self, identity: Identity, state_dir: Path, domain_prefix: str) -> None:
        self.identity = identity
        self._prefix = domain_prefix
        self._folder = state_dir / "guests"
        self._views: dict[str, str | None] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._locks_lock = threading.Lock()
        self.libvirt: Libvirt

    # -- files ---------------------------------------------------------------------------------------------------

    def folder(self, guest: str) -> Path:
        return self._folder / guest

    def with_files(self) -> list[str]:
        """Names of all guests that have files here."""
        return sorted(folder.name for folder in self._folder.iterdir()) if self._folder.is_dir() else []

    def console_log(self, guest: str) -> Path:
        return self.folder(guest) / domain.CONSOLE_LOG

    def started(self, guest: str) -> Path:
        """A file that was last changed when the guest was last started."""
        return self.folder(guest) / "started"

    def ready(self, guest: str) -> Path:
        """A file that is there when the guest has been ready since its start."""
        return self.folder(guest) / "ready"

    def moving(self, guest: str) -> Path:
        """A file that is there while the guest comes from another host, whose name it holds, or has left for one.
        The other files are worth something only as long as there is a domain."""
        return self.folder(guest) / "moving"

    def arriving_from(self, guest: str) -> str | None:
        """The host that a guest comes from whose migration was not brought to its end."""
        try:
            return self.moving(guest).read_text().strip() or None
        except OSError:
            return None

    def give_to_qemu(self, file: Path) -> None:
        """libvirt runs QEMU as another user and, in the agent, is told to leave owners alone."""
        user = accel.emulator_user()
        if user and os.geteuid() == 0:
            shutil.chown(file, user)

    # -- domains -------------------------------------------------------------------------------------------------

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

    def domain_name(self, guest: str) -> str:
        return f"{self._prefix}{guest}"

    @contextlib.contextmanager
    def locked(self, guest: str, seconds: float = -1) -> Iterator[None]:
        """Hold the guest's lock.

        :param seconds: how long to wait for it; -1: for ever.
        :raise GuestError: somebody else has held it for so long.
        """
        with self._locks_lock:
            lock = self._locks.setdefault(guest, threading.Lock())
        if not lock.acquire(timeout=seconds):
            raise GuestError(f"guest {guest}: an earlier command still works on it", hint="try again in a minute")
        try:
            yield
        finally:
            lock.release()

    def find(self, guest: str) -> tuple[libvirt.virDomain, DomainView] | None:
        """:raise StateError: a domain of that name is not ours."""
        try:
            dom = self.libvirt.conn.lookupByName(self.domain_name(guest))
            view = domain.parse(dom.XMLDesc())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise GuestError(f"guest {guest}: {error.get_error_message()}") from error
        if view is None or view.identity.uid != self.identity.uid:
            raise StateError(
                f"a domain named {self.domain_name(guest)} is there and is not of this lab",
                hint="rename the guest, or remove that domain with virsh",
            )
        return dom, view

    def get(self, guest: str) -> tuple[libvirt.virDomain, DomainView]:
        """:raise NotFoundError: there is no such guest here."""
        found = self.find(guest)
        if found is None:
            raise NotFoundError(f"there is no guest {guest} on host {self.identity.host}", hint="`orchestrator up`")
        return found

    def running(self, guest: str) -> tuple[libvirt.virDomain, DomainView]:
        """:raise StateError: it does not run."""
        dom, view = self.get(guest)
        if not dom.isActive():
            raise StateError(f"guest {guest} is not running", hint=f"orchestrator start {guest}")
        return dom, view

    def is_ready(self, view: DomainView, ready: str) -> bool:
        if ready == "agent":
            return view.agent_connected
        if self.ready(view.name).exists():
            return True
        if ready.startswith("console:"):
            raw = consolelog.tail_bytes(self.console_log(view.name))
            return re.search(ready.removeprefix("console:"), "\n".join(consolelog.clean(raw))) is not None
        return True

    def check_fits(self, guest: str, memory: int) -> None:
        """:raise GuestError: this host has less than ``memory`` bytes available."""
        available = next(
            int(line.split()[1]) << 10
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemAvailable:")
        )
        if memory > available:
            raise GuestError(
                f"guest {guest} wants {format_size(memory)}, "
                f"host {self.identity.host} has {available >> 20}M available",
                hint="give it less memory, or put it on another host",
            )

    @staticmethod
    def destroy(dom: libvirt.virDomain) -> None:
        try:
            dom.destroy()
        except libvirt.libvirtError as error:
            if dom.isActive():  # it may have ended by itself meanwhile
                raise GuestError(f"domain {dom.name()}: {error.get_error_message()}") from error

    def erase(self, guest: str, *, keep_disks: bool = False) -> None:
        """Stop the guest hard and remove its domain and files; does nothing where there is nothing. For who has its
        lock."""
        found = self.find(guest)
        if found:
            dom, _ = found
            with libvirt_errors(f"guest {guest} cannot be removed"):
                defined = dom.isPersistent()
                if dom.isActive():
                    self.destroy(dom)
                if defined:
                    dom.undefineFlags(
                        libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                        | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                        | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
                    )
        self._views.pop(self.domain_name(guest), None)
        if not keep_disks:
            shutil.rmtree(self.folder(guest), ignore_errors=True)
