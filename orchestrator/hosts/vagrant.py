"""Hosts of kind ``vagrant``: virtual machines of this machine, made by Vagrant and set up by Ansible.

Vagrant creates, starts, halts and destroys them. What can be asked of libvirt is asked of libvirt, because each
command of Vagrant takes seconds. Once a machine runs it is reached by SSH like any other host
(:mod:`orchestrator.hosts.ssh`). The key by which its SSH server proves itself is learnt when a machine that we have
just made answers for the first time, and is kept beside Vagrant's own files until the machine is destroyed.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import paramiko

from orchestrator import names, paths, sshkeys
from orchestrator.errors import CancelledError, HostError, HostKeyError, HostLostError, StateError, TakenError
from orchestrator.hosts import accel, libvirtd, machines, machinesnapshots, provision, roles, underlay
from orchestrator.hosts.model import SshHost, VagrantHost
from orchestrator.hosts.rpc import Client, Progress, Stream
from orchestrator.hosts.ssh import SshTransport
from orchestrator.hosts.transport import HostFacts
from orchestrator.hosts.vagrantcli import BOOT_SECONDS, OUR_BOXES, Project
from orchestrator.patience import Deadline, scaled
from orchestrator.run import tail_of
from orchestrator.spec.base import format_size
from orchestrator.spec.resolved import ResolvedHost, ResolvedLab

log = logging.getLogger(__name__)

BoxProvider = Callable[[Progress], str]
USER = "vagrant"
HALT_SECONDS = 60.0
ANSWER_SECONDS = 180.0
"""For a machine that has started before: it is up in less than a minute, also where it is emulated."""
_NESTED = ("kvm_amd", "kvm_intel")


def choose_driver(wanted: str) -> tuple[str, str]:
    """libvirt's driver for a host, ``kvm`` or ``qemu``, and why, in words.

    A host is there to run guests under its own KVM: this machine's KVM is taken where it can be nested, and else the
    emulator, whose CPU has the virtualization extensions too.

    :raise HostError: KVM is demanded and does not work here.
    """
    if wanted == "tcg":
        return "qemu", "emulated, as the lab file says"
    if wanted == "kvm":
        accel.choose("kvm")
        return "kvm", "under KVM, as the lab file says"
    verdict = accel.probe()
    if verdict.kind != "kvm":
        return "qemu", f"emulated: {verdict.reason.partition(';')[0]}"
    if not any(_reads(Path(f"/sys/module/{name}/parameters/nested"), "Y1") for name in _NESTED):
        return "qemu", "emulated: KVM cannot be nested here (kvm_intel.nested=1 or kvm_amd.nested=1 would let it)"
    return "kvm", "under KVM, which can be nested here"


def _reads(file: Path, values: str) -> bool:
    try:
        return file.read_text().strip() in values
    except OSError:
        return False


class VagrantTransport:
    """A virtual machine of this machine."""

    shares_files = False
    disposable = True

    def __init__(self, lab: ResolvedLab, host: ResolvedHost, box: BoxProvider) -> None:
        """:param box: gives the name of the box for hosts that name none, building it where it must."""
        if not isinstance(host.spec, VagrantHost):
            raise TypeError(f"host {host.name} is of kind {host.spec.kind}")
        self.lab = lab
        self.host = host
        self.spec = host.spec
        self.project = Project(lab.lab)
        self._box = box
        self._mark = names.mark(lab.uid, "machine", host.name)
        self._ssh: SshTransport | None = None

    # -- the machine ---------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return self.project.machine(self.host.name)

    def _domain(self, conn: libvirt.virConnect) -> libvirt.virDomain | None:
        """The machine's domain.

        :raise TakenError: a domain of its name is somebody else's.
        """
        machine = self.project.machine_id(self.host.name)
        try:
            if machine is not None:
                return conn.lookupByUUIDString(machine)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise _refused(self.host.name, error) from error
        return None

    def _clear_remains(self, conn: libvirt.virConnect) -> None:
        """Remove a domain and a disk that a Vagrant that was killed made and did not write down.

        :raise TakenError: they are somebody else's.
        """
        name = f"{machines.prefix(self.lab.lab)}{self.host.name}"
        try:
            dom = conn.lookupByName(name)
        except libvirt.libvirtError:
            machines.erase_disks(name)
            return
        if machines.mark_of(dom) != names.parse_mark(self._mark):
            raise TakenError(
                f"host {self.host.name}: a domain named {name} belongs to somebody else",
                hint=f"rename the lab or the host, or remove it: virsh -c {libvirtd.URI} undefine {name}",
            )
        machines.erase(dom)

    def _running(self, conn: libvirt.virConnect) -> libvirt.virDomain | None:
        dom = self._domain(conn)
        return dom if dom is not None and dom.isActive() else None

    @property
    def _key(self) -> Path:
        """The private key by which a machine of our own box lets us in. For others Vagrant makes one."""
        return self.project.folder / f"{self.host.name}.key"

    def _description(self, box: str) -> dict[str, Any]:
        driver, _ = choose_driver(self.spec.accel)
        has_key = self._key.exists()
        return {
            "box": box,
            "key": str(self._key) if has_key else None,
            "authorized_key": sshkeys.public_key(self._key) if has_key else None,
            "mark": self._mark,
            "address": self.host.underlay,
            "driver": driver,
            "cpu_mode": "host-passthrough" if driver == "kvm" else "maximum",
            "vcpus": self.spec.vcpus,
            "memory": self.spec.memory >> 20,
            "disks": [{"name": disk.name, "size": f"{disk.size >> 20}M"} for disk in self.spec.disks],
            "console": str(self.console),
        }

    def _common(self) -> dict[str, Any]:
        return {
            "prefix": machines.prefix(self.lab.lab),
            "network": underlay.network_name(self.lab),
            "underlay_prefix": self.lab.underlay_prefix,
            "mtu": self.lab.underlay_mtu,
        }

    @property
    def console(self) -> Path:
        """What the machine writes to its serial port."""
        return self.project.folder / f"{self.host.name}.console"

    def _differences(self, dom: libvirt.virDomain) -> list[str]:
        root = ET.fromstring(dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
        vcpus = int(root.findtext("vcpu", "0"))
        memory = int(root.findtext("memory", "0")) << 10
        found = []
        if vcpus != self.spec.vcpus:
            found.append(f"vcpus: {vcpus} → {self.spec.vcpus}")
        if memory != self.spec.memory:
            found.append(f"memory: {format_size(memory)} → {format_size(self.spec.memory)}")
        return found

    # -- reaching it ---------------------------------------------------------------------------------------------

    def _address(self, dom: libvirt.virDomain) -> str | None:
        """The machine's address on Vagrant's own network."""
        try:
            found = dom.interfaceAddresses(libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE)
        except libvirt.libvirtError as error:
            raise _refused(self.host.name, error) from error
        for interface in found.values():
            for address in interface["addrs"] or ():
                if address["type"] == libvirt.VIR_IP_ADDR_TYPE_IPV4:
                    return str(address["addr"])
        return None

    def _connect(self, dom: libvirt.virDomain) -> SshTransport:
        """:raise HostError: it has no address, or cannot be asked for its key."""
        if self._ssh is None:
            address = self._address(dom)
            if address is None:
                raise HostError(f"host {self.host.name} has no address yet", hint=f"its console: {self.console}")
            candidates = (
                self._key,
                self.folder / "private_key",
                Path("~/.vagrant.d/insecure_private_key").expanduser(),
            )
            spec = SshHost(
                kind="ssh",
                address=address,
                user="root" if self._key.exists() else USER,  # our box lets root in, which saves a sudo
                key=next((key for key in candidates if key.exists()), candidates[-1]),
                known_hosts=self._known_hosts(address),
                libvirt="system",
            )
            # The user of a Vagrant box may become root without a password: Vagrant's own rule for boxes.
            self._ssh = SshTransport(self.lab, self.host.model_copy(update={"spec": spec}), may_sudo=True)
        return self._ssh

    def _known_hosts(self, address: str) -> Path:
        """A known_hosts file with the machine's key, which is learnt when it is asked for the first time."""
        learnt, known = self.folder / "host_key", self.folder / "known_hosts"
        if not learnt.exists():
            paths.write_atomic(learnt, _host_key(address))
        line = f"{address} {learnt.read_text()}\n"
        if not known.exists() or known.read_text() != line:
            paths.write_atomic(known, line)
        return known

    def _inner(self) -> SshTransport:
        if self._ssh is None:
            conn = libvirtd.connect()
            dom = self._domain(conn) if conn is not None else None
            if dom is None or dom.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
                raise HostError(f"host {self.host.name}: the machine is {_state(dom)}", hint="orchestrator up")
            self._connect(dom)
            assert self._ssh is not None
        return self._ssh

    def reached_by_ssh(self) -> SshHost:
        """How any SSH client reaches the machine.

        :raise HostError: it does not run.
        """
        _need_root()
        return self._inner().spec

    # -- the transport -------------------------------------------------------------------------------------------

    def facts(self) -> HostFacts:
        _need_root()
        if self.host.name not in self.project.described():
            return HostFacts()
        conn = libvirtd.connect()
        if conn is None:
            return HostFacts(present=True, broken=True, problems=("this machine's libvirtd does not run",))
        dom = self._domain(conn)
        if dom is None or dom.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
            return HostFacts(present=True, broken=True, problems=(f"the machine is {_state(dom)}",))
        differences = self._differences(dom)
        problems = list(differences)
        try:
            inner = self._connect(dom).facts()
        except HostError as error:  # it starts, or hangs: `up` waits for it; `down` can remove it all the same
            return HostFacts(present=True, broken=True, problems=(error.message,))
        if not self._is_provisioned():
            problems.append("provisioning: missing or of another version")
        broken = bool(inner.problems) and not inner.agent  # without the toolkit there can be no agent
        return HostFacts(
            present=True,
            agent=inner.agent,
            problems=(*problems, *inner.problems),
            broken=broken,
            outdated=inner.outdated,
            restart=bool(differences),
        )

    def ensure(self, progress: Progress, cancel: threading.Event | None = None) -> str | None:
        _need_root()
        deadline = Deadline(scaled(BOOT_SECONDS))
        while True:
            try:
                return self._make(progress, cancel)
            except HostLostError:  # it was on its way down when it answered
                if deadline.passed:
                    raise
            self.close()
            progress("it went away: waiting for it to come back")
            time.sleep(1)

    def _make(self, progress: Progress, cancel: threading.Event | None) -> str | None:
        driver = None
        with libvirtd.session() as conn:
            underlay.ensure(self.lab, conn)
            dom = self._running(conn)
            if dom is not None and self._differences(dom):
                self.close()
                self._halt(dom, progress)
                dom = None
            if dom is None:
                driver = choose_driver(self.spec.accel)[1]
                progress(driver)
                self._start(conn, progress, cancel)
            elif dom.state()[0] == libvirt.VIR_DOMAIN_PAUSED:  # by a command that was killed, or by hand
                dom.resume()
            self._await(conn, progress, cancel)
        if not self._is_provisioned():
            self._provision(progress, cancel)
        self._inner().ensure(progress)
        return driver

    def _is_provisioned(self) -> bool:
        """The roles have been played on the machine, as they are now."""
        status, stdout, _ = self._inner().connection.run(f"cat {roles.MARK}")
        return status == 0 and stdout.decode(errors="replace").strip() == roles.digest()

    def _provision(self, progress: Progress, cancel: threading.Event | None) -> None:
        """:raise HostError: Ansible fails."""
        inner = self._inner()
        targets = {self.host.name: inner.spec}
        results = provision.provision(targets, progress=lambda _, text: progress(text), cancel=cancel)
        if error := results[self.host.name].error:
            raise error
        inner.run(f"mkdir -p {roles.MARK.parent} && echo {roles.digest()} > {roles.MARK} && sync {roles.MARK}")

    def _start(self, conn: libvirt.virConnect, progress: Progress, cancel: threading.Event | None) -> None:
        dom, described = self._domain(conn), self.project.described().get(self.host.name)
        box = described["box"] if dom and described else self.spec.box or self._box(progress)
        if dom is None:
            self._clear_remains(conn)
            sshkeys.remove(self._key)
            if box.startswith(OUR_BOXES):
                sshkeys.make(self._key, f"orchestrator-{self.lab.lab}-{self.host.name}")
        self.project.describe(self._common(), self.host.name, self._description(box))
        if dom is not None and self._made.exists() and not self._differences(dom) and _create(dom):
            return
        try:
            self.project.up(self.host.name, progress, cancel)
        except HostError as error:
            raise self._with_console(error) from None
        self._made.touch()

    @property
    def _made(self) -> Path:
        """There when Vagrant has made the machine whole: it can then be started without Vagrant, which is quicker."""
        return self.folder / "made"

    def _halt(self, dom: libvirt.virDomain, progress: Progress) -> None:
        """Shut the machine down, or cut its power when that takes too long."""
        progress("shutting it down")
        deadline = Deadline(scaled(HALT_SECONDS))
        try:
            dom.shutdown()
            while dom.isActive():
                if deadline.passed:
                    progress("it does not shut down: cutting its power")
                    dom.destroy()
                time.sleep(0.5)
        except libvirt.libvirtError as error:
            if dom.isActive():
                raise _refused(self.host.name, error) from error

    def _with_console(self, error: HostError) -> HostError:
        """``error``, which may have its cause in how the machine starts, with the end of what that says."""
        if self.console.exists():
            lines = tail_of(self.console.read_bytes(), 5)
            error.tail = (*error.tail, f"the end of {self.console}:", *lines)
        return error

    def _await(self, conn: libvirt.virConnect, progress: Progress, cancel: threading.Event | None) -> None:
        """Wait until the machine answers to SSH.

        :raise HostError: it does not, in the end.
        """
        deadline = Deadline(scaled(ANSWER_SECONDS))
        while True:
            dom = self._running(conn)
            try:
                if dom is None:
                    raise HostError(f"host {self.host.name} has stopped again")
                self._connect(dom).check()
                return
            except HostKeyError as error:
                error.hint = (
                    f"somebody else may answer in its place. If it was you who changed the key: "
                    f"rm {self.folder / 'host_key'}; if in doubt: orchestrator down"
                )
                raise
            except HostError as error:
                if dom is None:
                    raise self._with_console(error) from None
                if deadline.passed:
                    error.hint = (
                        f"if it hangs, cut its power, then bring the lab up again: "
                        f"virsh -c {libvirtd.URI} destroy {dom.name()}"
                    )
                    raise self._with_console(error) from None
            if cancel is not None and cancel.is_set():
                raise CancelledError(f"host {self.host.name} was given up")
            progress("waiting for it to answer")
            self._ssh = None
            time.sleep(1)

    def start_agent(self) -> None:
        self._inner().start_agent()

    def remove(self, progress: Progress) -> None:
        """Destroy the machine with its disks."""
        _need_root()
        self.close()
        if not self.project.folder.exists():
            return
        with libvirtd.session() as conn:
            if self._domain(conn) is not None:
                self.project.destroy(self.host.name, progress)
            self._clear_remains(conn)
            self.project.describe(self._common(), self.host.name, None)
            self.console.unlink(missing_ok=True)
            sshkeys.remove(self._key)
            underlay.remove(self.lab, conn)

    def halt(self, progress: Progress) -> None:
        """Power the machine off; it stays as it is."""
        _need_root()
        self.close()
        with libvirtd.session() as conn:
            if (dom := self._running(conn)) is not None:
                self._halt(dom, progress)

    def stream(self) -> Stream:
        return self._inner().stream()

    def agent(self) -> Client:
        return self._inner().agent()

    # -- snapshots -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def machine(self) -> Iterator[libvirt.virDomain]:
        """The machine's domain, for :mod:`orchestrator.hosts.machinesnapshots`.

        :raise HostError: there is none.
        """
        _need_root()
        conn = libvirtd.connect()
        dom = self._domain(conn) if conn is not None else None
        if conn is None or dom is None:
            raise HostError(f"host {self.host.name} is not there", hint="`orchestrator up` makes it")
        with contextlib.closing(conn):
            yield dom

    def reset(self, name: str, progress: Progress) -> tuple[str, ...]:
        """Put the machine back to a snapshot, and set its clock, which has stood still.

        :return: the guests on it that were paused for the snapshot.
        :raise NotFoundError: it has no such snapshot.
        :raise HostError: it cannot be put back, or does not answer afterwards.
        """
        self.close()
        with self.machine() as dom:
            progress("putting it back")
            paused = machinesnapshots.restore(self.host.name, dom, name)
        with libvirtd.session() as conn:
            self._await(conn, progress, None)
        self._inner().run(f"date -s @{time.time():.0f}")
        return paused

    def close(self) -> None:
        if self._ssh is not None:
            self._ssh.close()
            self._ssh = None


def _create(dom: libvirt.virDomain) -> bool:
    """Whether libvirt starts it: not where a network or a disk of it is missing."""
    try:
        dom.create()
    except libvirt.libvirtError as error:
        log.info("%s: %s", dom.name(), error)
        return False
    return True


def _state(dom: libvirt.virDomain | None) -> str:
    if dom is None:
        return "missing"
    return {libvirt.VIR_DOMAIN_SHUTOFF: "off", libvirt.VIR_DOMAIN_PAUSED: "paused"}.get(dom.state()[0], "not running")


def _refused(host: str, error: libvirt.libvirtError) -> HostError:
    return HostError(f"host {host}: this machine's libvirtd refuses: {error.get_error_message()}")


def _need_root() -> None:
    if os.geteuid() != 0:
        raise StateError(
            "hosts of kind vagrant are domains of this machine's libvirtd, which only root may change here",
            hint="run the command with sudo",
        )


def _host_key(address: str) -> str:
    """The key of an SSH server as in known_hosts: ``TYPE BASE64``."""
    try:
        with contextlib.closing(socket.create_connection((address, 22), 5)) as stream:
            transport = paramiko.Transport(stream)
            try:
                transport.start_client(timeout=30)
                key = transport.get_remote_server_key()
            finally:
                transport.close()
    except (OSError, EOFError, paramiko.SSHException) as error:
        raise HostError(f"{address} does not answer to SSH yet: {error}") from error
    return f"{key.get_name()} {key.get_base64()}"
